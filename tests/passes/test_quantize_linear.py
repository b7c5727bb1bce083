"""quantize-linear and fuse-norm-quantize: graphs, selectors, sizes, errors, parity."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.variants import (
    VARIANTS,
    Variant,
    captured_program,
    compiled,
    random_inputs,
)
from tests.passes.graphs import ops_of
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.errors import BadInput, BudgetExceeded
from turbo_opt.kernels import dequantize_weight
from turbo_opt.targets import get_target

T2V = VARIANTS["t2v"]
BASE = "canonicalize,fuse-norms,"
SCHEMES = ["int8-block", "fp8-block"]


def counts(program, name):
    return ops_of(program).count(name)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_linear_of_every_block_is_quantized_and_the_output_stays_close(
    optimize, name, scheme
):
    variant = VARIANTS[name]
    before = captured_program(variant)
    after = optimize(before, f"{BASE}quantize-linear{{scheme={scheme}}},fuse-norm-quantize")
    (denoiser,) = after
    left = [n for n in denoiser.graph.nodes if n.target is torch.ops.aten.linear.default]
    names = {denoiser.parameters()[n.args[1]] for n in left}
    assert not [weight for weight in names if "blocks." in weight]
    inputs = random_inputs(variant, 1, 2, 8, 8)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) >= {"int8-block": 33, "fp8-block": 25}[scheme]


def test_quantized_weights_are_stored_at_one_byte_and_stand_for_the_original(optimize):
    before = captured_program(T2V, torch.bfloat16)
    after = optimize(before, f"{BASE}quantize-linear")
    (old,), (new,) = before, after
    name = "blocks.0.attn1.to_q"
    assert f"{name}.weight" not in new.weights
    values, scales = (
        new.weights[f"{name}.quantized_weight"],
        new.weights[f"{name}.weight_scale"],
    )
    assert values.dtype == torch.float8_e4m3fn
    assert values.nbytes == old.weights[f"{name}.weight"].nbytes // 2
    restored = dequantize_weight(values.load(), scales.load())
    assert sqnr_db(old.weights[f"{name}.weight"].load().float(), restored) > 28


def test_layers_that_read_one_activation_share_one_quantization(optimize):
    after = optimize(captured_program(T2V), f"{BASE}quantize-linear")
    # a block: q, k and v read one; out, cross q, cross k+v, cross out, ffn in, ffn out one each;
    # the text embedding is one for both blocks
    assert counts(after, "turbo_opt.block_linear") == 20
    assert counts(after, "turbo_opt.quantize_activation") == 2 * 6 + 1


def test_a_norm_before_quantized_layers_writes_the_quantized_activation(optimize):
    after = optimize(captured_program(T2V), f"{BASE}quantize-linear,fuse-norm-quantize")
    assert counts(after, "turbo_opt.adaln_quantize") == 4
    assert counts(after, "turbo_opt.layer_norm_quantize") == 2
    assert counts(after, "turbo_opt.quantize_activation") == 2 * 3 + 1
    assert counts(after, "turbo_opt.adaln") == 1


def test_a_norm_that_a_16_bit_layer_reads_too_is_a_near_miss(optimize):
    text = f'{BASE}quantize-linear{{skip={{names=["*.attn1.to_v"]}}}},fuse-norm-quantize'
    after = optimize(captured_program(T2V), text)
    (miss,) = after.history[-1]["near_misses"]
    assert miss["count"] == 2
    assert "read by a layer that is not quantized" in miss["reason"]


def test_skip_is_relative_to_the_blocks(optimize):
    after = optimize(captured_program(T2V), f"{BASE}quantize-linear{{skip={{first=1}}}}")
    (denoiser,) = after
    assert "blocks.0.attn1.to_q.weight" in denoiser.weights
    assert "blocks.1.attn1.to_q.quantized_weight" in denoiser.weights
    assert after.history[-1]["near_misses"][0]["count"] == 10


def test_skipping_every_block_is_an_error(optimize):
    with pytest.raises(BadInput, match=r"skip.first 1 and skip.last 1 leave none of the 2 blocks"):
        optimize(captured_program(T2V), f"{BASE}quantize-linear{{skip={{first=1 last=1}}}}")


def test_a_name_that_matches_no_layer_is_an_error(optimize):
    with pytest.raises(BadInput, match=r"skip.names '\*.attn9.\*' matches no linear layer"):
        optimize(captured_program(T2V), f'{BASE}quantize-linear{{skip={{names=["*.attn9.*"]}}}}')


def test_a_dimension_that_the_scheme_cannot_take_names_the_layer_and_the_remedy(optimize):
    odd = Variant("t2v-odd", extra={"ffn_dim": 200})
    VARIANTS[odd.name] = odd
    try:
        program = captured_program(odd)
    finally:
        del VARIANTS[odd.name]
    with pytest.raises(BadInput, match=r"blocks.0.ffn.net.2 has in_features 200.*multiple of 128"):
        optimize(program, f"{BASE}quantize-linear")
    text = f'{BASE}quantize-linear{{skip={{names=["*.ffn.net.2"]}}}}'
    assert counts(optimize(program, text), "turbo_opt.block_linear") == 18


def test_a_target_without_the_number_format_is_refused_before_any_work():
    specs = parse_pipeline("canonicalize,quantize-linear{scheme=fp8-block}")
    with pytest.raises(BadInput, match="a100 cannot run fp8-block, only int8-block"):
        validate_pipeline(specs, target=get_target("a100"))


def test_broken_weights_exceed_the_budget_and_the_layer_is_named(optimize, monkeypatch):
    import turbo_opt.kernels.block_quantize as module

    honest = module.quantize_weight

    def broken(weight, scheme):
        values, scales = honest(weight, scheme)
        return values, scales * 1.5

    monkeypatch.setattr(module, "quantize_weight", broken)
    with pytest.raises(BudgetExceeded, match=r"linear.*blocks.0.attn1.to_q.*dB SQNR"):
        optimize(captured_program(T2V), f"{BASE}quantize-linear")
