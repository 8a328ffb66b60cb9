"""Model families: config.json <-> `ModelConfig`, tensor names, and sizes of well-known bases."""
