"""Shows the completions of one run or of two runs, as a page for a browser or as text."""
