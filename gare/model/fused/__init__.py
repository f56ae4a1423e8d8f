"""The factorised form as GPU kernels of Triton."""
