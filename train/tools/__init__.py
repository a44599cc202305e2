"""Tools and environments: what a completion of several turns calls."""
