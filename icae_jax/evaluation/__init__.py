"""What a memory is worth: scores and reports."""
