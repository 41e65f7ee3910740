"""What the training loop is fed with."""
