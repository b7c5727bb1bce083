"""sage-attention: graphs before and after, near misses, options, order, parity, a whole run."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from tests.helpers.variants import VARIANTS, captured_program, compiled, random_inputs
from tests.passes.graphs import calls_of, ops_of, program_of, reasons_of
from turbo_opt.compiler.pipeline import format_pipeline, parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.errors import BadInput
from turbo_opt.ir.edit import user_inputs
from turbo_opt.ir.stages import Stage, is_number, split
from turbo_opt.targets import get_target

T2V = VARIANTS["t2v"]
FLF2V = VARIANTS["flf2v"]  # with image tokens beside the prompt
BASE = "canonicalize,fuse-norms,"
ALL = "sage-attention{attention=all}"
SAGE = "turbo_opt.sage_attention"
X, Y = torch.randn(2, 150, 32), torch.randn(2, 40, 32)
W = {name: torch.randn(256, 32) for name in ("wq", "wk", "wv")}


def captured(variant):
    return captured_program(variant, torch.bfloat16)


def heads(x, weight, head_dim=128):
    return linear(x, weight).unflatten(-1, (-1, head_dim)).transpose(1, 2)


def attention_of(x, y, wq, wk, wv, **options):
    return scaled_dot_product_attention(heads(x, wq), heads(y, wk), heads(y, wv), **options)


def to_itself(x, wq, wk, wv):
    return attention_of(x, x, wq, wk, wv)


def to_both(x, y, wq, wk, wv):
    own, other = attention_of(x, x, wq, wk, wv), attention_of(x, y, wq, wk, wv)
    return own + other


def test_attention_becomes_the_operator_on_the_same_heads(optimize):
    before = program_of(to_itself, X, **W)
    after = optimize(before, "canonicalize,sage-attention")
    assert ops_of(before)[-1] == "aten.scaled_dot_product_attention"
    assert ops_of(after) == [*ops_of(before)[:-1], SAGE]
    (call,) = calls_of(after, SAGE)
    assert call.args[3:] == (None, "16bit")
    assert after.history[-1]["verification"]["worst_sqnr_db"] > 36


@pytest.mark.parametrize(
    ("attention", "keys", "reasons"),
    [
        ("self", [150], ["it is cross-attention, the pass takes attention=self"]),
        ("cross", [40], ["it is self-attention, the pass takes attention=cross"]),
        ("all", [150, 40], []),
    ],
)
def test_the_option_says_which_attention(optimize, attention, keys, reasons):
    pipeline = f"canonicalize,sage-attention{{attention={attention}}}"
    after = optimize(program_of(to_both, X, Y, **W), pipeline)
    assert [call.args[1].meta["val"].shape[2] for call in calls_of(after, SAGE)] == keys
    assert reasons_of(after) == reasons


def test_the_scale_of_the_graph_is_kept(optimize):
    def net(x, wq, wk, wv):
        return attention_of(x, x, wq, wk, wv, scale=0.1)

    (call,) = calls_of(optimize(program_of(net, X, **W), "canonicalize,sage-attention"), SAGE)
    assert call.args[3] == 0.1


def of_unlike_heads(x, y, wq, wk, wv):
    return scaled_dot_product_attention(heads(x, wq), heads(x, wk), heads(x, wv[:64], 32))


def of_one_batch_element(x, y, wq, wk, wv):
    return scaled_dot_product_attention(heads(x, wq), heads(x, wk)[:1], heads(x, wv)[:1])


def of_no_projection(x, y, wq, wk, wv):
    keys = y.unflatten(-1, (2, 16)).repeat(1, 1, 1, 8).transpose(1, 2)
    return scaled_dot_product_attention(heads(x, wq), keys, keys)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (
            lambda x, y, wq, wk, wv: attention_of(
                x, x, wq, wk, wv, attn_mask=x[:1, :, :1].expand(1, 150, 150)
            ),
            "it has a mask",
        ),
        (
            lambda x, y, wq, wk, wv: attention_of(x, x, wq, wk, wv, dropout_p=0.5),
            "it has dropout",
        ),
        (lambda x, y, wq, wk, wv: attention_of(x, x, wq, wk, wv, is_causal=True), "it is causal"),
        (
            lambda x, y, wq, wk, wv: attention_of(x, x, wq, wk[:128], wv[:128], enable_gqa=True),
            "its keys are shared between heads",
        ),
        (of_one_batch_element, "its keys are shared between batch elements"),
        (
            lambda x, y, wq, wk, wv: scaled_dot_product_attention(
                *(heads(x, weight, 32) for weight in (wq, wk, wv))
            ),
            "its head dimension is 32, the operators take 64 or 128",
        ),
        (of_unlike_heads, "v has 32 channels a head, q and k have 128"),
        (
            lambda x, y, wq, wk, wv: scaled_dot_product_attention(
                linear(x, wq), linear(x, wk), linear(x, wv)
            ),
            "q, k and v do not have four axes: batch, heads, tokens and channels",
        ),
        (
            of_no_projection,
            "q or k is no projection, so that it is neither self- nor cross-attention",
        ),
    ],
)
def test_a_near_miss_says_why(optimize, net, reason):
    after = optimize(program_of(net, X, Y, **W), "canonicalize,sage-attention?")
    assert reasons_of(after) == [reason]
    assert not calls_of(after, SAGE)


def test_what_is_no_projection_is_taken_by_all(optimize):
    after = optimize(program_of(of_no_projection, X, Y, **W), f"canonicalize,{ALL}")
    assert len(calls_of(after, SAGE)) == 1


@pytest.mark.parametrize(
    ("target", "pv", "expected"),
    [
        ("h200", "auto", "fp8"),
        ("rtx4090", "auto", "fp8"),
        ("a100", "auto", "16bit"),
        ("cpu", "auto", "16bit"),
        (None, "auto", "16bit"),
        ("h200", '"16bit"', "16bit"),
    ],
)
def test_the_format_of_v_follows_the_target(optimize, target, pv, expected):
    text = f"canonicalize,sage-attention{{pv={pv}}}"
    (call,) = calls_of(optimize(program_of(to_itself, X, **W), text, target=target), SAGE)
    assert call.args[4] == expected


def test_fp8_is_refused_before_any_work_where_it_does_not_run():
    specs = parse_pipeline("canonicalize,sage-attention{pv=fp8}")
    with pytest.raises(BadInput, match="a100 cannot run pv fp8, which needs sm89"):
        validate_pipeline(specs, target=get_target("a100"))
    validate_pipeline(specs, target=get_target("rtx4090"))


def test_options_survive_the_text_form_and_unknown_ones_are_refused():
    text = 'sage-attention{attention=all pv=fp8 skip={names=["blocks.0.*"]}}'
    assert format_pipeline(parse_pipeline(text)) == text
    with pytest.raises(BadInput, match=r"'both' is not allowed.*'self', 'cross' or 'all'"):
        validate_pipeline(parse_pipeline("canonicalize,sage-attention{attention=both}"))


def test_without_canonicalize_the_error_says_what_to_add(optimize):
    with pytest.raises(BadInput, match="add 'canonicalize' before 'sage-attention'"):
        optimize(program_of(to_itself, X, **W), "sage-attention")


def test_skipped_layers_stay_in_16_bits(optimize):
    text = f'{BASE}sage-attention{{attention=all skip={{first=1 names=["blocks.1.attn2"]}}}}'
    after = optimize(captured(T2V), text, "off")
    (call,) = calls_of(after, SAGE)
    assert "blocks.1.attn1" in str(call.meta["nn_module_stack"])
    assert reasons_of(after) == ["skipped by the recipe"]


def test_a_skipped_name_that_matches_nothing_is_an_error(optimize):
    message = r"skip.names '\*.attn2' matches no attention layer; .* 'blocks.0.attn1'"
    with pytest.raises(BadInput, match=message):
        optimize(captured(T2V), f'{BASE}sage-attention{{skip={{names=["*.attn2"]}}}}')


@pytest.mark.parametrize("target", [None, "h200"])
@pytest.mark.parametrize(("variant", "layers"), [(T2V, 4), (FLF2V, 6)], ids=["t2v", "flf2v"])
def test_a_model_stays_close_to_itself(optimize, variant, layers, target):
    before = captured(variant)
    after = optimize(before, BASE + ALL, target=target)
    assert after.history[-1]["matches"] == layers
    assert reasons_of(after) == []
    assert after.history[-1]["verification"]["worst_sqnr_db"] > (36 if target is None else 27)
    inputs = random_inputs(variant, 1, 2, 16, 16, torch.bfloat16)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) >= 40


@pytest.mark.parametrize(
    "pipeline",
    [
        "{},fuse-qk-norm-rope,quantize-linear,fuse-norm-quantize,fuse-qkv,fuse-epilogues",
        "fuse-qk-norm-rope,{},quantize-linear,fuse-norm-quantize,fuse-qkv,fuse-epilogues",
        "fuse-qk-norm-rope,quantize-linear,fuse-norm-quantize,fuse-qkv,fuse-epilogues,{}",
    ],
)
def test_other_passes_may_come_before_or_after(optimize, pipeline):
    after = optimize(
        captured(FLF2V), BASE + pipeline.format("sage-attention{attention=cross}"), "off"
    )
    matched = {record["name"]: record["matches"] for record in after.history}
    assert matched["sage-attention"] == len(calls_of(after, SAGE)) == 4
    assert len(calls_of(after, "turbo_opt.norm_rope")) == 4
    assert matched["quantize-linear"] == 24 and matched["fuse-qkv"] >= 2


def hoisted(program):
    """Shapes without batch of what is kept of a prompt."""
    (denoiser,) = program
    kept = split(denoiser.graph, user_inputs(denoiser.exported), denoiser.stages).kept
    return [tuple(n.meta["val"].shape)[1:] for n in kept[Stage.PROMPT] if not is_number(n)]


def test_keys_and_values_of_the_prompt_are_hoisted_as_without_it(optimize):
    plain = optimize(captured(FLF2V), f"{BASE}hoist-invariants", "off")
    after = optimize(captured(FLF2V), f"{BASE}{ALL},hoist-invariants", "off")
    assert hoisted(after) == hoisted(plain)
    inputs = random_inputs(FLF2V, 1, 2, 16, 16, torch.bfloat16)
    whole = optimize(captured(FLF2V), BASE + ALL, "off")
    with torch.no_grad():
        expected, found = compiled(whole)(**inputs).sample, compiled(after)(**inputs).sample
    assert torch.equal(expected, found)


def test_sparse_attention_comes_first_and_keeps_what_it_has(optimize):
    sparse, late = "sparse-attention{proj_l=zero}", "sparse-attention?{proj_l=zero}"
    after = optimize(captured(T2V), f"{BASE}{sparse},{ALL},fuse-qk-norm-rope", "off")
    (record,) = (record for record in after.history if record["name"] == "sage-attention")
    assert record["matches"] == 2
    assert [miss["reason"] for miss in record["near_misses"]] == [
        "it is sparse already, and keeps its own formats"
    ]
    assert len(calls_of(after, "turbo_opt.norm_rope_sagesla")) == 2
    after = optimize(captured(T2V), f"{BASE}sage-attention,{late}", "off")
    assert "it is sage_attention already: sparse-attention goes before that pass" in reasons_of(
        after
    )


def test_blocks_are_still_found_once_all_attention_is_replaced(optimize):
    text = f"{BASE}{ALL},quantize-linear{{skip={{first=1}}}}"
    (denoiser,) = optimize(captured(T2V), text, "off")
    assert "blocks.0.attn1.to_q.weight" in denoiser.weights
    assert "blocks.1.attn1.to_q.quantized_weight" in denoiser.weights
