"""The decoder-only Llama family and its LoRA adapters. Knows nothing of compression."""
