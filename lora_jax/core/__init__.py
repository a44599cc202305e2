"""Adapted weights: their axes, arrays and base, and the products with them."""
