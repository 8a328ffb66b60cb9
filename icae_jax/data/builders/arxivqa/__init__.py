"""ArxivQA."""
