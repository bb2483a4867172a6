"""decode: no kernels yet."""
