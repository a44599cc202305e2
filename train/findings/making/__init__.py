"""Makes the data and the bases of findings that need their own."""
