"""Memories in the form that other programs read."""
