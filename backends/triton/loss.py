"""loss: no kernels yet."""
