"""Training data: samples of documents and instructions, their order, and which rank reads which."""
