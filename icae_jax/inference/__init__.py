"""Using a trained compressor: compress once, keep the memory, ask often."""
