"""Memory savings in a built model: recomputation, offloading, shared fp32 and bf16 parameters."""
