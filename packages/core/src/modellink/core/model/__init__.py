"""From a ModelSpec to megatron-core's GPTModel, and from a checkpoint to its weights."""
