"""routing: no kernels yet."""
