"""grouped_gemm: no kernels yet."""
