"""PyTorch core: what a multi-task sentence model is, how it learns, what it writes to disk."""
