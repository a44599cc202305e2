"""Finds and loads adapters from folders of runs, of this library, or of PEFT."""
