"""The rules for primitives that meet an adapted weight, a file for each kind; `RULES` has all."""
