"""From rules to weights: which leaves they choose, with which roles, and their first factors."""
