"""Choices of single layers by measured numbers: quantize-linear and sparse-attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.scales import TOPK, scales_data, write_scales_of
from tests.helpers.variants import VARIANTS, captured_program, compiled, random_inputs
from tests.passes.graphs import calls_of, ops_of, reasons_of
from turbo_opt.compiler.manager import PassManager
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.scales import Scales, write_scales
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.errors import BadInput
from turbo_opt.passes._layer_choices import best_shares
from turbo_opt.targets import get_target

T2V = VARIANTS["t2v"]
BASE = "canonicalize,fuse-norms,"
FFN, Q, K = "blocks.1.ffn.net.2", "blocks.0.attn1.to_q", "blocks.0.attn1.to_k"
BLOCKS = [f"blocks.{layer}.attn1" for layer in range(2)]


@pytest.fixture(scope="module")
def program():
    return captured_program(T2V)


@pytest.fixture
def chosen_by(optimize):
    """Runs a pipeline; the numbers of its rewrites are verified in the tests of the passes."""
    return lambda program, text: optimize(program, BASE + text, "off")


@pytest.fixture
def scales(program, tmp_path):
    """`scales(prediction=…)` writes a file and gives the option that names it."""

    def write(**numbers):
        return f'scales="{write_scales_of(program, tmp_path / "scales.json", **numbers)}"'

    return write


def quantized(program):
    (denoiser,) = program
    return {
        name.removesuffix(".quantized_weight"): tensor.dtype
        for name, tensor in denoiser.weights.items()
        if name.endswith(".quantized_weight")
    }


def chosen(program):
    return {item["module"]: item for item in program.history[-1]["choices"]}


def test_a_layer_below_the_threshold_stays_in_16_bits_and_says_why(chosen_by, program, scales):
    measured = scales(prediction={FFN: {"fp8-block": 29.5}})
    after = chosen_by(program, f"quantize-linear{{{measured} min_sqnr=30}}")
    assert len(quantized(after)) == 19 and FFN not in quantized(after)
    assert reasons_of(after) == ["measured below min_sqnr"]
    assert chosen(after)[FFN] == {
        "denoiser": "transformer",
        "module": FFN,
        "choice": "16 bits",
        "reason": "fp8-block has 29.5 dB",
    }
    assert chosen(after)[Q]["choice"] == "fp8-block"


def test_layers_that_read_one_tensor_go_with_the_worst_of_them(chosen_by, program, scales):
    measured = scales(prediction={K: {"fp8-block": 20.0}})
    text = f"quantize-linear{{{measured} min_sqnr=30}},fuse-norm-quantize,fuse-qkv"
    after = chosen_by(program, text)
    assert chosen_in(after, "16 bits") == [f"blocks.0.attn1.to_{part}" for part in "qkv"]
    first = next(record for record in after.history if record["name"] == "quantize-linear")
    reason = {item["module"]: item["reason"] for item in first["choices"]}[Q]
    assert reason == f"fp8-block has 20.0 dB in {K}, which reads the same"


def chosen_in(program, choice):
    return [
        item["module"]
        for record in program.history
        for item in record["choices"]
        if item["choice"] == choice
    ]


def test_the_other_scheme_takes_over_where_it_is_good_enough(chosen_by, program, scales):
    bad = {"fp8-block": 20.0, "int8-block": 20.0}
    measured = scales(prediction={FFN: {"fp8-block": 20.0}, "blocks.0.ffn.net.2": bad})
    options = f"{measured} min_sqnr=30 below=other-scheme"
    after = chosen_by(program, f"quantize-linear{{{options}}},fuse-norm-quantize,fuse-qkv")
    assert quantized(after)[FFN] == torch.int8
    assert chosen_in(after, "int8-block") == [FFN]
    assert chosen_in(after, "16 bits") == ["blocks.0.ffn.net.2"]
    inputs = random_inputs(T2V, 1, 2, 16, 16)
    with torch.no_grad():
        expected, found = compiled(program)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) > 25


def test_layers_may_be_judged_by_their_own_output(chosen_by, program, scales):
    measured = scales(output={FFN: {"fp8-block": 20.0}}, prediction={Q: {"fp8-block": 20.0}})
    text = f"quantize-linear{{{measured} min_sqnr=30 judged_by=output}}"
    assert chosen_in(chosen_by(program, text), "16 bits") == [FFN]


def test_skipped_layers_are_not_chosen_and_do_not_drag_others_along(chosen_by, program, scales):
    measured = scales(prediction={K: {"fp8-block": 20.0}})
    text = f'quantize-linear{{{measured} min_sqnr=30 skip={{names=["{K}"]}}}}'
    after = chosen_by(program, text)
    assert K not in chosen(after) and Q in quantized(after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("min_sqnr=30", "scales and min_sqnr are given together"),
        ("scales=x", "scales and min_sqnr are given together"),
        ("below=other-scheme", "below is for layers below min_sqnr"),
    ],
)
def test_options_that_need_each_other_say_so(options, message):
    with pytest.raises(BadInput, match=message):
        validate_pipeline(parse_pipeline(f"{BASE}quantize-linear{{{options}}}"))


def test_a_target_must_run_the_other_scheme_too():
    options = "scheme=int8-block scales=x min_sqnr=30 below=other-scheme"
    specs = parse_pipeline(f"{BASE}quantize-linear{{{options}}}")
    with pytest.raises(BadInput, match="a100 cannot run fp8-block, only int8-block"):
        validate_pipeline(specs, target=get_target("a100"))


def test_a_file_without_effects_on_the_prediction_names_the_remedy(chosen_by, program, tmp_path):
    import json

    path = write_scales_of(program, tmp_path / "scales.json")
    data = json.loads(path.read_text())
    for layer in data["denoisers"]["transformer"]["linear"].values():
        layer["prediction_sqnr"] = {}
    path.write_text(json.dumps(data))
    with pytest.raises(BadInput, match="measured with --probes 0; set judged_by=output"):
        chosen_by(program, f'quantize-linear{{scales="{path}" min_sqnr=30}}')


def test_a_changed_file_changes_the_key_of_the_cache(program, scales):
    from turbo_opt.compiler.cache import next_key

    def key():
        text = f"{BASE}quantize-linear{{{scales(prediction={FFN: {'fp8-block': next(numbers)}})}"
        planned = validate_pipeline(parse_pipeline(f"{text} min_sqnr=30}}"))
        return next_key("", planned[-1], None)

    numbers = iter((40.0, 40.0, 41.0))
    first, same, other = key(), key(), key()
    assert first == same != other


def test_shares_are_divided_by_their_effects_within_the_mean(chosen_by, program, scales):
    measured = scales(attention={BLOCKS[0]: (0.3, 0.2, 0.0), BLOCKS[1]: (0.1, 0.05, 0.0)})
    text = f"sparse-attention{{proj_l=zero topk=0.625 {measured}}}"
    after = chosen_by(program, text)
    assert [call.args[5] for call in calls_of(after, "turbo_opt.sagesla")] == [1.0, 0.25]
    assert chosen(after)[BLOCKS[1]]["choice"] == "topk 0.25"
    assert "prediction off by 0.1 at 0.25, 0.05 at 0.5" in chosen(after)[BLOCKS[1]]["reason"]


@pytest.mark.parametrize(("uniform_error", "shares"), [(0.3, [1.0, 0.25]), (0.1, [0.625] * 2)])
def test_shares_that_were_worse_together_than_alike_are_not_taken(
    chosen_by, program, scales, uniform_error, shares
):
    tried = {
        "mean": 0.625,
        "shares": {BLOCKS[0]: 1.0, BLOCKS[1]: 0.25},
        "error": 0.2,
        "uniform_error": uniform_error,
    }
    attention = {BLOCKS[0]: (0.3, 0.2, 0.0), BLOCKS[1]: (0.1, 0.05, 0.0)}
    measured = scales(attention=attention, together=(tried,))
    after = chosen_by(program, f"sparse-attention{{proj_l=zero topk=0.625 {measured}}}")
    assert [call.args[5] for call in calls_of(after, "turbo_opt.sagesla")] == shares
    reason = chosen(after)[BLOCKS[0]]["reason"]
    assert f"all layers together 0.2, {uniform_error} if alike" in reason


def test_skipped_layers_take_no_part_in_the_mean(chosen_by, program, scales):
    measured = scales(attention=dict.fromkeys(BLOCKS, (0.3, 0.2, 0.0)))
    text = f"sparse-attention{{proj_l=zero topk=0.5 skip={{first=1}} {measured}}}"
    (call,) = calls_of(chosen_by(program, text), "turbo_opt.sagesla")
    assert call.args[5] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("topk=0.1", "topk 0.1 is below 0.25, the smallest share .* --topk 0.1"),
        ("topk=0.5 block_q=64", "scales are of blocks of 128×64 tokens, the pass has 64×64"),
        ("topk=[0.5, 0.5]", "with scales, topk is the mean share"),
        ("topk=0.5 mode=sla2 proj_l=checkpoint", "scales hold the errors of SLA, mode is 'sla2'"),
    ],
)
def test_shares_that_cannot_be_chosen_say_why(chosen_by, program, scales, options, message):
    measured = scales(attention=dict.fromkeys(BLOCKS, (0.3, 0.2, 0.0)))
    proj = "" if "proj_l" in options else "proj_l=zero "
    with pytest.raises(BadInput, match=message):
        chosen_by(program, f"sparse-attention{{{proj}{options} {measured}}}")


def test_a_linear_layer_that_was_not_measured_is_named(chosen_by, program, tmp_path):
    data = scales_data(program)
    del data["denoisers"]["transformer"]["linear"][FFN]
    write_scales(Scales.model_validate(data), tmp_path / "scales.json")
    named = f"nothing of {FFN}, which transformer has; measure .*`turbo-opt calibrate scales R"
    with pytest.raises(BadInput, match=named):
        chosen_by(program, f'quantize-linear{{scales="{tmp_path}/scales.json" min_sqnr=30}}')


def test_a_self_attention_that_was_not_measured_is_named(chosen_by, program, scales):
    named = r"nothing of the self-attention blocks.0.attn1; measure .*`turbo-opt calibrate scales R"
    with pytest.raises(BadInput, match=named):
        chosen_by(program, f"sparse-attention{{proj_l=zero topk=0.5 {scales()}}}")


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(
        st.lists(st.floats(0, 1), min_size=3, max_size=3).map(lambda c: sorted(c, reverse=True)),
        min_size=1,
        max_size=5,
    ),
    budget=st.sampled_from([0.25, 0.3, 0.5, 0.75, 1.0]),
)
def test_the_choice_of_shares_is_the_best_of_all(costs, budget):
    named = {str(index): cost for index, cost in enumerate(costs)}
    found = best_shares(budget, TOPK, named)
    assert sum(found.values()) <= budget * len(costs) + 1e-9
    best = min(
        sum(cost[pick] for cost, pick in zip(costs, picks, strict=True))
        for picks in itertools.product(range(3), repeat=len(costs))
        if sum(TOPK[pick] for pick in picks) <= budget * len(costs) + 1e-9
    )
    total = sum(named[name][TOPK.index(share)] for name, share in found.items())
    assert total == pytest.approx(best)


def test_plans_need_no_weights(program, scales):
    from turbo_opt.compiler.manager import Verification

    measured = scales(prediction={FFN: {"fp8-block": 20.0}})
    planned = validate_pipeline(parse_pipeline(f"{BASE}quantize-linear{{{measured} min_sqnr=30}}"))
    after = PassManager(planned, verification=Verification("off")).run(program)
    assert chosen_in(after, "16 bits") == [FFN]
    assert ops_of(after).count("turbo_opt.block_linear") == 19
