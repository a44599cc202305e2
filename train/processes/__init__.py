"""The processes of a run: how they connect, communicate, and end together."""
