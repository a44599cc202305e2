"""The FLOPs and traffic of a compiled step."""
