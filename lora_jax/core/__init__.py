"""What an adapted weight is made of: its axes, its arrays, its base, and products with them."""
