"""The engine: owns the arrays, and knows no HTTP."""
