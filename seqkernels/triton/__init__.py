"""Attention kernels for GPUs. Importing this package imports neither Triton nor CUDA."""
