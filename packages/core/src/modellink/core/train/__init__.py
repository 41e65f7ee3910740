"""The training loop and what it keeps: optimizer, checkpoints, metrics."""
