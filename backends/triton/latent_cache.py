"""latent_cache: no kernels yet."""
