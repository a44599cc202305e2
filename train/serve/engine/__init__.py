"""The engine, which owns the arrays and is independent of HTTP."""
