"""What is made of each model: pipelines by name, and the schedule of a clip."""

from __future__ import annotations

from turbo_opt.ir.rcm import SIGMA_MAX, rcm_steps, rcm_times
from turbo_opt.ir.schedule import Schedule

_SPARSE = "sparse-attention{{mode={mode} topk=0.1 block_q=64 block_k=128{pv}}}"
_FUSED = (
    "canonicalize,fuse-norms,merge-padding,{attention}fuse-qk-norm-rope,"
    "quantize-linear{{scheme={scheme}}},fuse-norm-quantize,fuse-qkv{{cross_attention=false}},"
    "fuse-epilogues{{linear_gelu=true linear_residual={fp8}}},hoist-invariants"
)
_SAGESLA = _SPARSE.format(mode="sagesla", pv=" pv=fp8") + ","
_SAGE = "sage-attention{pv=fp8},"
PIPELINES = {
    "sla-bf16": "canonicalize,fuse-norms," + _SPARSE.format(mode="sla", pv=""),
    "sagesla-fp8": _FUSED.format(attention=_SAGESLA, scheme="fp8-block", fp8="true"),
    "sagesla-int8": _FUSED.format(attention=_SAGESLA, scheme="int8-block", fp8="false"),
    "fused-fp8": _FUSED.format(attention="", scheme="fp8-block", fp8="true"),
    "sage-fp8": _FUSED.format(attention=_SAGE, scheme="fp8-block", fp8="true"),
    "captured": "",
    "fuse-norms": "canonicalize,fuse-norms",
    "fp8-block": "canonicalize,fuse-norms,quantize-linear{scheme=fp8-block},fuse-norm-quantize",
    "int8-block": "canonicalize,fuse-norms,quantize-linear{scheme=int8-block},fuse-norm-quantize",
}
"""Configurations by name, in the order they run: all of a 14B take twelve minutes. Sparse
attention computes another function than dense: what rounds in it is judged against `sla-bf16`,
which keeps the same share of blocks in 16 bits."""
SPARSE_REFERENCE = "sla-bf16"
STEPS = 4


def four_steps() -> Schedule:
    """Those of an rCM student, unguided."""
    times = rcm_times(STEPS, SIGMA_MAX)
    return Schedule(rcm_steps(times, "sde"), initial_noise_scale=times[0])
