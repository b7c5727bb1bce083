"""What the tests of fuse-epilogues share: operands, small nets and pipelines."""

from __future__ import annotations

import torch

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)
from tests.helpers.variants import compiled, random_inputs
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.kernels import quantize_activation, quantize_weight

BASE = "canonicalize,fuse-norms?,"
QUANTIZED = "canonicalize,fuse-norms,quantize-linear{{scheme={}}},fuse-norm-quantize"
SPARSE_QUANTIZED = (
    "canonicalize,fuse-norms,sparse-attention{proj_l=zero topk=0.5 pv=fp8},fuse-qk-norm-rope,"
    "quantize-linear{scheme=fp8-block},fuse-norm-quantize"
)
SCHEMES = ["int8-block", "fp8-block"]
X, Y = torch.randn(2, 150, 128), torch.randn(2, 150, 128)
GATE, SCALE, SHIFT = (torch.randn(2, 1, 128) for _ in range(3))
ops = torch.ops.turbo_opt


def dequantized(pair):
    return pair[0].float() * pair[1].sum()


def output_sqnr_db(before, after, variant, dtype):
    """How close the model's output stays, on random inputs."""
    inputs = random_inputs(variant, 1, 2, 8, 8, dtype)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    return sqnr_db(expected, found)


def layer_operands(scheme="fp8-block"):
    """q and its scale, then the weight, its scale and a bias by name."""
    names = ("weight", "weight_scale", "bias")
    weights = (*quantize_weight(torch.randn(256, 128), scheme), torch.randn(256).bfloat16())
    activation = quantize_activation(torch.randn(2, 50, 128), scheme)
    return activation, dict(zip(names, weights, strict=True))


def gated(x, y, gate):
    return (x.float() + y * gate).type_as(x)
