"""attention: no kernels yet."""
