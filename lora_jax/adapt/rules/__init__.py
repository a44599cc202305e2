"""The rules for primitives with an adapted weight, one file for each kind; `RULES` has all."""
