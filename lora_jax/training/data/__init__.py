"""Makes examples of rows."""
