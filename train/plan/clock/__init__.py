"""The compiler's estimate of a step: the cycles that it writes into its optimised HLO, by groups.

For TPUs these are estimates of the compiler, which nothing here measures on a chip.
"""
