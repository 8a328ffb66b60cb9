"""From files to fixed-shape batches: sources, tokens, batches."""
