"""Applies rules: the leaves that they select, the axis roles, and the initial factors."""
