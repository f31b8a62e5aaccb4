"""Triton kernels behind the operators; imported only when one is chosen."""
