"""norms: no kernels yet."""
