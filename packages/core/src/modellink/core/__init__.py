"""Training of large language models over megatron-core on NPU, CUDA and CPU."""

__version__ = "0.1.0"
