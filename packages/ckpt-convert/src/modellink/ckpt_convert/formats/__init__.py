"""File formats: each module reads (and where it says so writes) one of them, tensor slice by tensor slice."""
