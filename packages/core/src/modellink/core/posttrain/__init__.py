"""What follows pretraining: fine-tuning on instructions, adapters."""
