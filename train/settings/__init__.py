"""Combines a command line with options in files: --config, --many, an adapter's, a run's own."""
