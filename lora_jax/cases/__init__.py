"""Small cases of kernels, with references in dense arithmetic and bounds that rounding explains."""
