"""What a comparison shows of its measurements: tables, pictures, a recommendation, files."""
