"""fuse-epilogues: options, requirements, and every epilogue of every variant."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.variants import IN_EVERY_DTYPE, VARIANTS, captured_program
from tests.passes.epilogues import (
    GATE,
    QUANTIZED,
    SCHEMES,
    SPARSE_QUANTIZED,
    X,
    Y,
    gated,
    output_sqnr_db,
)
from tests.passes.graphs import ops_of, program_of
from turbo_opt.errors import BadInput


@pytest.mark.parametrize(
    ("option", "left"),
    [
        ("gelu", {"aten.gelu"}),
        ("attention", {"turbo_opt.norm_rope_sagesla"}),
        ("residual_norm", {"turbo_opt.gated_residual", "turbo_opt.adaln_quantize"}),
        ("residual", {"turbo_opt.adaln_quantize"}),
    ],
)
def test_options_leave_kinds_of_epilogues_alone(optimize, option, left):
    text = f"{SPARSE_QUANTIZED},fuse-epilogues{{{option}=false}}"
    after = optimize(captured_program(VARIANTS["t2v"]), text)
    assert left <= set(ops_of(after))


def test_norms_must_be_fused_before(optimize):
    with pytest.raises(BadInput, match="add 'fuse-norms' before 'fuse-epilogues'"):
        optimize(program_of(gated, X, Y, GATE), "canonicalize,fuse-epilogues")


@pytest.mark.parametrize(("name", "dtype"), IN_EVERY_DTYPE)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_epilogue_of_every_variant_is_fused(optimize, name, scheme, dtype):
    variant = VARIANTS[name]
    text = QUANTIZED.format(scheme)
    before = optimize(captured_program(variant, dtype), text, "off")
    after = optimize(captured_program(variant, dtype), f"{text},fuse-epilogues")
    layers = 4 if name == "vace" else 2
    names = ops_of(after)
    assert names.count("turbo_opt.gelu_quantize") == layers
    assert names.count("turbo_opt.residual_layer_norm_quantize") == layers
    assert "turbo_opt.layer_norm_quantize" not in names
    # the first norm of a stack reads the embedding; the last sum is read by the final, 16-bit norm
    assert names.count("turbo_opt.adaln_quantize") == 1
    least = 110 if dtype == torch.float32 else 35
    assert output_sqnr_db(before, after, variant, dtype) >= least
