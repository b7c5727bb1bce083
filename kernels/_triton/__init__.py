"""Device functions, kernels and launch helpers that the Triton providers share.

`support` imports no Triton and may be imported anywhere; every other module here imports it.
"""
