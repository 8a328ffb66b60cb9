"""What a run would need and take, from the programs that XLA compiles for it: no weights, no accelerator."""
