"""Any corpus of texts."""
