"""Measurements of the kernels and of the step."""
