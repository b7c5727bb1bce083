"""Kernel benchmarks at the models' real shapes; `benchmarks.kernels.all` runs them all."""
