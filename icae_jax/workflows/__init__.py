"""Whole jobs that put several parts of the package together."""
