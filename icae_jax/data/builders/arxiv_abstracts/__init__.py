"""Abstracts of arXiv papers."""
