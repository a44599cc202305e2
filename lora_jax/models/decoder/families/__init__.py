"""The families of decoders: one declaration file for each family or vendor."""
