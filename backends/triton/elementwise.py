"""elementwise: no kernels yet."""
