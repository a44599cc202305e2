"""The options of all scripts: those in common, their files and tables."""
