"""Studies: questions that were answered once, each with its command and its results."""
