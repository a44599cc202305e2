"""The rules for primitives that meet an adapted weight, by what they do; `table` has them all."""
