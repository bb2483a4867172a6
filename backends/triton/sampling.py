"""sampling: no kernels yet."""
