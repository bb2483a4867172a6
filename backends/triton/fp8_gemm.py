"""fp8_gemm: no kernels yet."""
