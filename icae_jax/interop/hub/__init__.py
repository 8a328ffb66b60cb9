"""Base models in the formats of the model hub: where they are, their weights, their tokenizers."""
