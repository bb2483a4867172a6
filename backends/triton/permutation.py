"""permutation: no kernels yet."""
