"""attention_backward: no kernels yet."""
