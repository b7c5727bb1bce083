"""Tuning a dense model for sparse-linear attention (SLA, arXiv 2509.24006).

attention     the operator, differentiable
student       a diffusers denoiser with it in its self-attention
objective     the student's prediction is pulled to the dense teacher's
closed_form   its projection by ridge regression, without training
run           jobs of `turbo-opt calibrate sla`
"""
