"""Kernels in CUDA C++, where Triton is not enough: compiled by NVRTC at first use, then cached."""
