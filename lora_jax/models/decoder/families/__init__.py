"""The families of decoders: a file of facts for each, or for those of one maker."""
