"""`icae serve`: answers from memories over HTTP; see README.md."""
