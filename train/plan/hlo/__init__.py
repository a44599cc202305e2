"""Optimised HLO as text: its computations, its products, and how often each part runs."""
