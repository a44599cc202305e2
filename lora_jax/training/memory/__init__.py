"""The memory of a step before it is compiled, and what rematerialisation keeps within it."""
