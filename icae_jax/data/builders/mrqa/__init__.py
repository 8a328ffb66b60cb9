"""The MRQA 2019 shared task."""
