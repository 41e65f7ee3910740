"""What is evaluated: the one protocol (backend.py), and a local model (local.py)."""
