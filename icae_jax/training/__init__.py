"""From a configuration to a trained adapter: one loop, jitted steps, checkpoints that resume bit-exactly."""
