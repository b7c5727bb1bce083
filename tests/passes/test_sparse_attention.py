"""sparse-attention: graphs before and after, near misses, options, projections, parity."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from tests.helpers.variants import (
    IN_EVERY_DTYPE,
    VARIANTS,
    captured_program,
    compiled,
    random_inputs,
)
from tests.passes.graphs import calls_of, ops_of, program_of, reasons_of
from turbo_opt.compiler.pipeline import format_pipeline, parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.errors import BadInput
from turbo_opt.ir.weights import constant
from turbo_opt.targets import get_target

T2V = VARIANTS["t2v"]
BASE = "canonicalize,fuse-norms,"
SAGESLA = "turbo_opt.sagesla"
ZERO = "sparse-attention{proj_l=zero}"
SLA2 = "sparse-attention{mode=sla2}"
X, Y = torch.randn(2, 150, 32), torch.randn(2, 150, 32)
W = {name: torch.randn(256, 32) for name in ("wq", "wk", "wv")}


def heads(x, weight, head_dim=128):
    return linear(x, weight).unflatten(-1, (-1, head_dim)).transpose(1, 2)


def self_attention(x, wq, wk, wv):
    return scaled_dot_product_attention(heads(x, wq), heads(x, wk), heads(x, wv))


def tuned(dtype=torch.float32, stored=torch.float32):
    """A captured two-layer model with `proj_l` beside its weights."""
    program = captured_program(T2V, dtype)
    (denoiser,) = program
    for layer in range(2):
        stem = f"blocks.{layer}.attn1.proj_l"
        denoiser.unread[f"{stem}.weight"] = constant(torch.randn(128, 128).to(stored))
        denoiser.unread[f"{stem}.bias"] = constant(torch.randn(128).to(stored))
    return program


@pytest.mark.parametrize("mode", ["sla", "sagesla"])
def test_self_attention_becomes_the_sparse_operator_on_the_same_heads(optimize, mode):
    before = program_of(self_attention, X, **W)
    after = optimize(before, f"canonicalize,sparse-attention{{mode={mode} proj_l=zero}}")
    assert ops_of(before)[-1] == "aten.scaled_dot_product_attention"
    assert ops_of(after) == [*ops_of(before)[:-1], f"turbo_opt.{mode}"]
    (call,) = calls_of(after, f"turbo_opt.{mode}")
    assert call.args[3:6] == (None, None, 0.1)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (
            lambda x, y, wq, wk, wv: scaled_dot_product_attention(
                heads(x, wq), heads(y, wk), heads(y, wv)
            ),
            "cross-attention: q, k and v are projections of different tensors",
        ),
        (
            lambda x, y, wq, wk, wv: scaled_dot_product_attention(
                heads(x, wq), heads(x, wk) + heads(y, wk), heads(x, wv)
            ),
            "q, k and v are not each one projection of a hidden state",
        ),
        (
            lambda x, y, wq, wk, wv: scaled_dot_product_attention(
                heads(x, wq),
                heads(x, wk),
                y.unflatten(-1, (2, 16)).repeat(1, 1, 1, 8).transpose(1, 2),
            ),
            "q, k and v are not each one projection of a hidden state",
        ),
        (
            lambda x, y, wq, wk, wv: scaled_dot_product_attention(
                heads(x, wq), heads(x, wk), heads(x, wv), y[:1, :, :1].expand(1, 150, 150)
            ),
            "it has a mask",
        ),
        (
            lambda x, y, wq, wk, wv: scaled_dot_product_attention(
                heads(x, wq), heads(x, wk), heads(x, wv), dropout_p=0.5
            ),
            "it has dropout",
        ),
        (
            lambda x, y, wq, wk, wv: scaled_dot_product_attention(
                heads(x, wq), heads(x, wk), heads(x, wv), is_causal=True
            ),
            "it is causal",
        ),
        (
            lambda x, y, wq, wk, wv: scaled_dot_product_attention(
                heads(x, wq), heads(x, wk[:128]), heads(x, wv[:128]), enable_gqa=True
            ),
            "its keys are shared between heads",
        ),
        (
            lambda x, y, wq, wk, wv: scaled_dot_product_attention(
                heads(x, wq, 64), heads(x, wk, 64), heads(x, wv, 64)
            ),
            "its head dimension is 64, the operators take 128",
        ),
        (
            lambda x, y, wq, wk, wv: scaled_dot_product_attention(
                heads(x, wq), heads(x, wk), heads(x, wv), scale=0.1
            ),
            "its scale is 0.1 instead of 1/√128",
        ),
    ],
)
def test_a_near_miss_says_why(optimize, net, reason):
    after = optimize(program_of(net, X, Y, **W), "canonicalize,sparse-attention?{proj_l=zero}")
    assert reasons_of(after) == [reason]


def test_the_default_scale_may_be_written_out(optimize):
    def net(x, wq, wk, wv):
        return scaled_dot_product_attention(
            heads(x, wq), heads(x, wk), heads(x, wv), scale=128**-0.5
        )

    after = optimize(program_of(net, X, **W), f"canonicalize,{ZERO}")
    assert ops_of(after)[-1] == "turbo_opt.sagesla"


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        ("h200", "", (64, 128, "fp8")),
        ("h100", "", (64, 128, "fp8")),
        ("rtx4090", "", (128, 64, "fp8")),
        ("rtx5090", "", (128, 64, "fp8")),
        ("b200", "", (128, 64, "fp8")),
        ("a100", "", (128, 64, "16bit")),
        ("cpu", "", (128, 64, "16bit")),
        (None, "", (128, 64, "16bit")),
        ("h200", ' block_q=128 pv="16bit"', (128, 128, "16bit")),
        ("cpu", " block_q=64 block_k=128", (64, 128, "16bit")),
    ],
)
def test_blocks_and_the_format_of_v_follow_the_target(optimize, target, options, expected):
    text = f"canonicalize,sparse-attention{{proj_l=zero{options}}}"
    after = optimize(program_of(self_attention, X, **W), text, target=target)
    (call,) = calls_of(after, "turbo_opt.sagesla")
    assert (*call.args[6:8], call.args[9]) == expected


def test_every_layer_may_have_its_own_share_in_the_order_they_run(optimize):
    after = optimize(tuned(), f"{BASE}sparse-attention{{topk=[0.25, 0.5]}}")
    shares = [call.args[5] for call in calls_of(after, "turbo_opt.sagesla")]
    assert shares == [0.25, 0.5]
    skipping = "sparse-attention{topk=[0.25, 0.5] skip={first=1}}"
    (call,) = calls_of(optimize(tuned(), BASE + skipping), "turbo_opt.sagesla")
    assert call.args[5] == 0.5


def test_a_wrong_number_of_shares_names_both_numbers(optimize):
    message = "sparse-attention: topk lists 3 numbers, transformer has 2 self-attention layers"
    with pytest.raises(BadInput, match=message):
        optimize(tuned(), f"{BASE}sparse-attention{{topk=[0.1, 0.2, 0.3]}}")


@pytest.mark.parametrize("topk", ["0", "1.5", "[0.1, 0]"])
def test_a_share_outside_of_zero_and_one_is_refused(topk):
    with pytest.raises(BadInput, match=r"sparse-attention.topk.*must be (greater|less) than"):
        validate_pipeline(parse_pipeline(f"canonicalize,sparse-attention{{topk={topk}}}"))


def test_pv_is_an_option_of_sagesla():
    with pytest.raises(BadInput, match="pv 'fp8' is an option of mode 'sagesla', mode is 'sla'"):
        validate_pipeline(parse_pipeline("canonicalize,sparse-attention{mode=sla pv=fp8}"))


@pytest.mark.parametrize("target", ["a100", "cpu"])
def test_fp8_is_refused_before_any_work_where_it_does_not_run(target):
    specs = parse_pipeline("canonicalize,sparse-attention{pv=fp8}")
    with pytest.raises(BadInput, match=f"{target} cannot run pv fp8, which needs sm89"):
        validate_pipeline(specs, target=get_target(target))
    validate_pipeline(specs, target=get_target("l40s"))


def test_options_survive_the_text_form():
    text = 'sparse-attention{mode=sla topk=[0.1, 0.2] block_q=64 skip={names=["blocks.0.*"]}}'
    assert format_pipeline(parse_pipeline(text)) == text


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_projections_of_the_checkpoint_become_weights_in_float32(optimize, stored):
    before = tuned(torch.bfloat16, stored)
    (old,) = before
    (new,) = optimize(before, f"{BASE}sparse-attention")
    for layer in range(2):
        for part in ("weight", "bias"):
            name = f"blocks.{layer}.attn1.proj_l.{part}"
            assert name not in new.unread and name in old.unread
            assert new.weights[name].dtype == torch.float32
            assert torch.equal(new.weights[name].load(), old.unread[name].load().float())
    for layer, call in enumerate(calls_of(optimize(before, f"{BASE}sparse-attention"), SAGESLA)):
        assert [node.name for node in call.args[3:5]] == [
            f"b_blocks_{layer}_attn1_proj_l_{part}" for part in ("weight", "bias")
        ]


def test_a_checkpoint_without_projections_is_refused_with_the_remedy(optimize):
    with pytest.raises(BadInput) as error:
        optimize(captured_program(T2V), f"{BASE}sparse-attention")
    assert (
        "sparse-attention needs weights named blocks.0.attn1.proj_l.weight and 3 more, which the "
        "checkpoint does not hold: it is not tuned for SLA; `proj_l: zero` runs the training-free "
        "form, without the linear branch"
    ) in str(error.value)


def test_a_single_missing_projection_is_named(optimize):
    program = tuned()
    del program.denoisers["transformer"].unread["blocks.1.attn1.proj_l.bias"]
    with pytest.raises(BadInput, match=r"needs weights named blocks.1.attn1.proj_l.bias, which"):
        optimize(program, f"{BASE}sparse-attention")
    after = optimize(program, f"{BASE}sparse-attention{{skip={{last=1}}}}")
    assert len(calls_of(after, SAGESLA)) == 1


def test_a_projection_of_another_shape_is_refused(optimize):
    program = tuned()
    name = "blocks.0.attn1.proj_l.weight"
    program.denoisers["transformer"].unread[name] = constant(torch.randn(64, 64))
    with pytest.raises(BadInput, match=rf"{name} has shape \[64, 64\], needs \[128, 128\]"):
        optimize(program, f"{BASE}sparse-attention")


def test_without_projections_none_is_read(optimize):
    after = optimize(tuned(), BASE + ZERO)
    (denoiser,) = after
    assert not [name for name in denoiser.weights if "proj_l" in name]
    assert all(call.args[3:5] == (None, None) for call in calls_of(after, SAGESLA))


def test_skipped_layers_stay_dense(optimize):
    after = optimize(tuned(), f'{BASE}sparse-attention{{skip={{names=["blocks.0.attn1"]}}}}')
    assert len(calls_of(after, SAGESLA)) == 1
    assert "skipped by the recipe" in reasons_of(after)


def test_a_skipped_name_that_matches_nothing_is_an_error(optimize):
    message = r"skip.names '\*.attn9' matches no self-attention layer; .* 'blocks.0.attn1'"
    with pytest.raises(BadInput, match=message):
        optimize(tuned(), f'{BASE}sparse-attention{{skip={{names=["*.attn9"]}}}}')


def test_blocks_are_still_found_once_attention_is_sparse(optimize):
    text = f"{BASE}{ZERO},fuse-qk-norm-rope,quantize-linear{{skip={{first=1}}}}"
    (denoiser,) = optimize(captured_program(T2V), text)
    assert "blocks.0.attn1.to_q.weight" in denoiser.weights
    assert "blocks.1.attn1.to_q.quantized_weight" in denoiser.weights


@pytest.mark.parametrize(("name", "dtype"), IN_EVERY_DTYPE)
@pytest.mark.parametrize("mode", ["sla", "sagesla"])
def test_with_every_block_kept_every_variant_is_close_to_dense_attention(
    optimize, name, dtype, mode
):
    variant = VARIANTS[name]
    before = captured_program(variant, dtype)
    text = f"{BASE}sparse-attention{{mode={mode} topk=1 proj_l=zero}}"
    after = optimize(before, text)
    layers = 4 if name == "vace" else 2
    assert len(calls_of(after, f"turbo_opt.{mode}")) == layers
    assert after.history[-1]["verification"]["worst_sqnr_db"] > {"sla": 50, "sagesla": 35}[mode]
    inputs = random_inputs(variant, 1, 2, 16, 16, dtype)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) >= (100 if (mode, dtype) == ("sla", torch.float32) else 42)


ROUTED = {"router.proj_q.weight": (128, 128), "router.proj_k.weight": (128, 128)}
ROUTED |= {"alpha.weight": (2, 128), "alpha.bias": (2,)}


def routed():
    """A captured two-layer model with router and ratio beside its weights, in bfloat16."""
    program = captured_program(T2V)
    (denoiser,) = program
    for layer in range(2):
        for name, shape in ROUTED.items():
            stored = constant(torch.randn(shape).bfloat16())
            denoiser.unread[f"blocks.{layer}.attn1.{name}"] = stored
    return program


@pytest.mark.parametrize(
    ("options", "target", "expected"),
    [
        ("", None, (128, 64, "softmax", "int8", "16bit")),
        ("", "h200", (64, 128, "softmax", "int8", "fp8")),
        (' qk="16bit"', "h200", (64, 128, "softmax", "16bit", "16bit")),
        (' pv="16bit" feature_map=elu', "h200", (64, 128, "elu", "int8", "16bit")),
    ],
)
def test_sla2_takes_router_and_ratio_as_weights_in_float32(optimize, options, target, expected):
    before = routed()
    after = optimize(before, f"{BASE}sparse-attention{{mode=sla2{options}}}", target=target)
    (old,), (new,) = before, after
    first, _ = calls_of(after, "turbo_opt.sla2")
    assert [node.name for node in first.args[3:7]] == [
        f"b_blocks_0_attn1_{name.replace('.', '_')}" for name in ROUTED
    ]
    assert first.args[7] == 0.1 and first.args[8:] == expected
    for layer in range(2):
        for leaf, shape in ROUTED.items():
            name = f"blocks.{layer}.attn1.{leaf}"
            assert name not in new.unread
            assert (new.weights[name].dtype, new.weights[name].shape) == (torch.float32, shape)
            assert torch.equal(new.weights[name].load(), old.unread[name].load().float())


def test_sla2_changes_nothing_else_in_the_graph(optimize):
    dense, sparse = (ops_of(optimize(routed(), text)) for text in (BASE[:-1], f"{BASE}{SLA2}"))
    changed = [pair for pair in zip(dense, sparse, strict=True) if pair[0] != pair[1]]
    assert changed == [("aten.scaled_dot_product_attention", "turbo_opt.sla2")] * 2


def test_sla2_with_every_block_is_close_to_dense_attention(optimize):
    before = routed()
    after = optimize(before, f'{BASE}sparse-attention{{mode=sla2 topk=1 qk="16bit"}}')
    assert after.history[-1]["verification"]["worst_sqnr_db"] > 100
    inputs = random_inputs(T2V, 1, 2, 16, 16, torch.float32)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) >= 90


def test_a_checkpoint_without_router_is_refused_with_the_command_that_makes_one(optimize):
    with pytest.raises(BadInput) as error:
        optimize(tuned(), f"{BASE}{SLA2}")
    assert (
        "sparse-attention needs weights named blocks.0.attn1.router.proj_q.weight and 7 more, "
        "which the checkpoint does not hold: it has no router of SLA2; `turbo-opt calibrate "
        "router` trains one"
    ) in str(error.value)
    program = routed()
    del program.denoisers["transformer"].unread["blocks.1.attn1.alpha.bias"]
    with pytest.raises(BadInput, match=r"needs weights named blocks.1.attn1.alpha.bias, which"):
        optimize(program, f"{BASE}{SLA2}")


def test_a_ratio_for_another_number_of_heads_is_refused(optimize):
    program = routed()
    name = "blocks.0.attn1.alpha.weight"
    program.denoisers["transformer"].unread[name] = constant(torch.randn(12, 128))
    with pytest.raises(BadInput, match=rf"{name} has shape \[12, 128\], needs \[2, 128\]"):
        optimize(program, f"{BASE}{SLA2}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('mode=sla qk="16bit"', "qk '16bit' is an option of mode 'sla2', mode is 'sla'"),
        ("qk=int8", "qk 'int8' is an option of mode 'sla2', mode is 'sagesla'"),
        ('mode=sla2 qk="16bit" pv=fp8', "pv 'fp8' goes with qk 'int8', qk is '16bit'"),
        ("mode=sla2 proj_l=zero", "mode 'sla2' has no proj_l to leave out: set it to 'checkpoint'"),
        ("mode=sla3", "mode"),
    ],
)
def test_options_that_do_not_go_with_the_mode_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        validate_pipeline(parse_pipeline(f"canonicalize,sparse-attention{{{options}}}"))


def test_blocks_of_sla2_are_found_and_rotation_is_fused_before_it(optimize):
    text = f"{BASE}{SLA2},fuse-qk-norm-rope,quantize-linear{{skip={{first=1}}}}"
    after = optimize(routed(), text)
    (denoiser,) = after
    assert len(calls_of(after, "turbo_opt.norm_rope")) == 4
    assert "blocks.0.attn1.to_q.weight" in denoiser.weights
    assert "blocks.1.attn1.to_q.quantized_weight" in denoiser.weights
