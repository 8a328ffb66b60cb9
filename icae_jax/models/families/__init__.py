"""Model families: config.json to `ModelConfig` and back, and the sizes of well-known bases."""
