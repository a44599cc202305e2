"""Parses optimised HLO: its computations, its products, and the number of their executions."""
