"""Writes the result of a finding: a table and a picture."""
