"""Reads the compiler's estimate of a step, in cycles, from the optimised HLO, by groups of work.

For TPUs these are estimates of the compiler, which nothing here measures on a chip.
"""
