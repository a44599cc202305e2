"""Writes what came of a finding: a table and a picture."""
