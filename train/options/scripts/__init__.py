"""The options of each script, and what scripts share."""
