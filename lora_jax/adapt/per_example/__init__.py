"""Follows the examples of a batch through a function in which each example has its own adapter.

The function is evaluated once, on the whole batch, as it is written. Its result for example n is
``fn(tree, *args)[n]`` of the tree with the adapter of example n alone. Whatever does not depend on
examples (constants, random numbers from one key, the size of the batch) is the same in both.

`walk` follows the examples through a jaxpr; `labels` says what is known of a value. Where some
tokens alone see an adapter, `walk` follows the tokens, by `tokens`.
"""
