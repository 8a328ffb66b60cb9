"""Trained compressors on disk: this package's adapter folder, PEFT, released checkpoints."""
