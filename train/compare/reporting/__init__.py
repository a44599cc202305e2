"""The report of a comparison: tables, pictures, a recommendation, files."""
