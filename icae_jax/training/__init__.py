"""Training: one loop, its tasks, jitted steps, and checkpoints that resume bit-exactly."""
