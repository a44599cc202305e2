"""Makes an adapted weight: its axes, its arrays, its base, and products with them."""
