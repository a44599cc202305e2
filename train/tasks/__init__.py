"""The tasks that come with the scripts."""
