"""From files and Hub datasets to batches."""
