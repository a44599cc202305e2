"""Progress on stderr, results on stdout or in a file: shared by scripts that read and answer."""
