"""The idea of the package: an encoder writes a context into a small memory, the frozen base reads it."""
