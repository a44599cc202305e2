"""The options of the scripts: those in common, and each script's own."""
