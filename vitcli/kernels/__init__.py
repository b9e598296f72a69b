"""Kernels of our own, in Triton, for what compilers and libraries leave apart."""
