"""Sparse-linear attention with a learned router and ratio (SLA2, arXiv 2602.12675).

soft       a differentiable choice of blocks
router     the learned modules, and what `turbo_opt::sla2` computes with them, differentiable
compare    routed attention with soft or hard choices against dense attention, on some queries
objective  stage 1: router and ratio are trained on a frozen model's q, k and v
schema     what a job says
run        jobs of `turbo-opt calibrate router`

Stage 2, the model around a frozen router, is `turbo-opt calibrate sla` with `mode: sla2`.
"""
