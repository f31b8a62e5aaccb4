"""Adapters of what the kernels are compared with; one that cannot run here raises `Unavailable`."""
