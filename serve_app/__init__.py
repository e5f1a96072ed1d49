"""Serving an artifact with Ray Serve: one shared encoder, a deployment for each head."""
