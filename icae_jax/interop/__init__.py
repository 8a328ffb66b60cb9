"""In and out of the formats that other tools read: base models and adapters of the model hub."""
