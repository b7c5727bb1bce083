"""merge-padding: graphs before and after, near misses, and models on padded prompts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention

from tests.helpers.variants import VARIANTS, captured_program, compiled, random_inputs
from tests.passes.graphs import calls_of, ops_of, program_of, reasons_of
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.ir.edit import user_inputs
from turbo_opt.ir.stages import Stage, split

T2V, FLF2V = VARIANTS["t2v"], VARIANTS["flf2v"]  # the second with image tokens beside the prompt
PADDED = "turbo_opt.padded_attention"
QUANTIZED = "turbo_opt.padded_attention_quantize"
BASE = "canonicalize,fuse-norms,"
FP8 = "quantize-linear{scheme=fp8-block},fuse-norm-quantize,fuse-epilogues"
X, PROMPT = torch.randn(2, 150, 32), torch.randn(2, 40, 24)
W = {
    "wq": torch.randn(256, 32),
    "we": torch.randn(32, 24),
    "wk": torch.randn(256, 32) / 6,
    "wv": torch.randn(256, 32),
    "gain": torch.randn(256),
}


def heads(x, weight, head_dim=128):
    return linear(x, weight).unflatten(-1, (-1, head_dim)).transpose(1, 2)


def to_a_prompt(x, prompt, wq, we, wk, wv, gain, **options):
    """As a Wan block does: the prompt is projected, and its keys are normalized."""
    embeds = gelu(linear(prompt, we), approximate="tanh")
    k = rms_norm(linear(embeds, wk), (256,), gain).unflatten(-1, (-1, 128)).transpose(1, 2)
    return scaled_dot_product_attention(heads(x, wq), k, heads(embeds, wv), **options)


def padded(prompt, start):
    """`prompt` with its row at `start` in place of all later ones."""
    return torch.cat(
        [prompt[:, :start], prompt[:, start : start + 1].expand_as(prompt[:, start:])], 1
    )


def test_attention_to_a_prompt_counts_its_padding(optimize):
    before = program_of(to_a_prompt, X, PROMPT, **W)
    after = optimize(before, "canonicalize,merge-padding")
    assert ops_of(before)[-1] == "aten.scaled_dot_product_attention"
    assert ops_of(after)[-1] == PADDED
    (call,) = calls_of(after, PADDED)
    start = call.args[3]
    assert (start.meta["val"].dtype, tuple(start.meta["val"].shape[1:])) == (torch.int32, ())
    assert after.history[-1]["verification"]["worst_sqnr_db"] > 90


def test_the_start_is_found_once_in_the_embeddings_themselves(optimize):
    def twice(x, prompt, **weights):
        return to_a_prompt(to_a_prompt(x, prompt, **weights)[:, 0, :, :32], prompt, **weights)

    after = optimize(program_of(twice, X, PROMPT, **W), "canonicalize,merge-padding")
    calls = calls_of(after, PADDED)
    node, *others = {call.args[3] for call in calls}
    assert len(calls) == 2 and not others
    while node.op != "placeholder":
        node = node.all_input_nodes[0]
    (denoiser,) = after
    assert node is user_inputs(denoiser.exported)[1]


def behind_of(start):
    """The operators between a start and the prompt."""
    found = []
    while start.op != "placeholder":
        found.append(str(start.target))
        start = start.all_input_nodes[0]
    return found


def from_two_sources(x, prompt, wq, we, wk, wv, gain):
    return scaled_dot_product_attention(
        heads(x, wq), heads(linear(prompt, we), wk), heads(linear(prompt.flip(1), we), wv)
    )


def mixing_rows(x, prompt, wq, we, wk, wv, gain):
    mixed = linear(prompt, we).cumsum(1)
    return scaled_dot_product_attention(heads(x, wq), heads(mixed, wk), heads(mixed, wv))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (lambda *a, **w: to_a_prompt(*a, **w, is_causal=True), "it is causal"),
        (
            from_two_sources,
            "k and v do not follow row by row from one sequence of embeddings",
        ),
    ],
)
def test_a_near_miss_says_why(optimize, net, reason):
    after = optimize(program_of(net, X, PROMPT, **W), "canonicalize,merge-padding?")
    assert reasons_of(after) == [reason]
    assert not calls_of(after, PADDED)


def test_what_mixes_rows_is_searched_for_padding_behind_it(optimize):
    after = optimize(program_of(mixing_rows, X, PROMPT, **W), "canonicalize,merge-padding")
    (call,) = calls_of(after, PADDED)
    assert "aten.linear.default" in behind_of(call.args[3])  # the mixed rows, not the prompt


def normalized_over_rows(x, prompt, wq, we, wk, wv, gain):
    normal = layer_norm(linear(prompt, we), (40, 32))
    return scaled_dot_product_attention(heads(x, wq), heads(normal, wk), heads(normal, wv))


def test_a_norm_over_rows_mixes_them(optimize):
    after = optimize(program_of(normalized_over_rows, X, PROMPT, **W), "canonicalize,merge-padding")
    (call,) = calls_of(after, PADDED)
    assert "aten.layer_norm.default" in behind_of(call.args[3])


def test_quantized_layers_hide_the_prompt(optimize):
    after = optimize(
        captured_program(T2V, torch.bfloat16),
        f"{BASE}quantize-linear{{scheme=fp8-block}},merge-padding?",
        "off",
    )
    assert set(reasons_of(after)) == {
        "k and v do not follow row by row from one sequence of embeddings"
    }


@pytest.mark.parametrize(("variant", "layers"), [(T2V, 2), (FLF2V, 4)], ids=["t2v", "flf2v"])
@pytest.mark.parametrize("start", [0, 3])
def test_a_model_on_a_padded_prompt_is_the_same(optimize, variant, layers, start):
    before = captured_program(variant, torch.float32)
    after = optimize(before, BASE + "merge-padding", "off")
    assert len(calls_of(after, PADDED)) == layers
    inputs = random_inputs(variant, 1, 2, 16, 16, torch.float32)
    inputs["encoder_hidden_states"] = padded(inputs["encoder_hidden_states"], start)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) > 90


def test_the_start_belongs_to_the_prompts_stage(optimize):
    after = optimize(
        captured_program(T2V, torch.bfloat16), BASE + "merge-padding,hoist-invariants", "off"
    )
    (denoiser,) = after
    found = split(denoiser.graph, user_inputs(denoiser.exported), denoiser.stages)
    starts = {call.args[3] for call in calls_of(after, PADDED)}
    assert starts <= set(found.kept[Stage.PROMPT])


def test_its_result_is_quantized_at_once(optimize):
    before = captured_program(T2V, torch.bfloat16)
    after = optimize(before, f"{BASE}merge-padding,{FP8}")
    assert len(calls_of(after, QUANTIZED)) == 2
    assert not calls_of(after, PADDED)
    whole = optimize(before, f"{BASE}merge-padding,{FP8}{{attention=false}}")
    assert len(calls_of(whole, PADDED)) == 2


def test_blocks_of_several_tokens_are_quantized_apart(optimize):
    pipeline = f"{BASE}merge-padding,{FP8.replace('fp8', 'int8')}"
    after = optimize(captured_program(T2V, torch.bfloat16), pipeline, "off")
    assert len(calls_of(after, PADDED)) == 2
    assert any("spans more tokens than attention holds" in reason for reason in reasons_of(after))
