"""Targets: which record answers, in which unit, and what is said of a miss."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.results import RESULTS, Ceiling, Record, read
from benchmarks.targets import (
    FILE,
    HEADLINES,
    MEMORY_BOUND,
    Limits,
    Sense,
    Verdict,
    complete,
    derived,
    measured,
)

MODEL = "h200/wan2.1-t2v-1.3b-480p"
AT_MOST, AT_LEAST = Limits(Sense.AT_MOST, 135, 115), Limits(Sense.AT_LEAST, 0.80, 0.92)


def record(name: str, value: float, unit: str = "ms", **facts) -> Record:
    return Record(name, value, unit, 0.5, 7, commit="abc", date="2026-01-02", **facts)


def only(records: list[Record], name: str) -> Record:
    (found,) = [each for each in derived(records) if each.name == name]
    return found


@pytest.mark.parametrize(
    ("limits", "value", "verdict"),
    [
        (AT_MOST, 135.01, Verdict.MISSED),
        (AT_MOST, 135, Verdict.MUST),
        (AT_MOST, 115, Verdict.AIM),
        (AT_LEAST, 0.799, Verdict.MISSED),
        (AT_LEAST, 0.80, Verdict.MUST),
        (AT_LEAST, 0.92, Verdict.AIM),
        (Limits(Sense.BELOW, 0.02), 0.02, Verdict.MISSED),
        (Limits(Sense.BELOW, 0.02), 0.019, Verdict.MUST),
        (AT_MOST, float("nan"), Verdict.MISSED),
        (AT_LEAST, float("nan"), Verdict.MISSED),
    ],
)
def test_a_limit_itself_counts_as_its_sign_says(limits, value, verdict):
    assert limits.verdict(value) is verdict


@given(st.floats(0, 300), st.floats(0, 300))
def test_the_best_record_never_has_the_worse_verdict(one, other):
    order = [Verdict.MISSED, Verdict.MUST, Verdict.AIM]
    for limits in (AT_MOST, AT_LEAST):
        best = limits.best([record("one", one), record("other", other)]).value
        verdicts = [order.index(limits.verdict(value)) for value in (best, one, other)]
        assert verdicts[0] == max(verdicts)


def test_the_targets_are_those_that_were_asked_for():
    asked = {
        target.name.removeprefix("h200/"): (target.limits.must, target.limits.aim)
        for target in HEADLINES
    }
    small, large = "wan2.1-t2v-1.3b-480p", "wan2.1-t2v-14b-720p"
    assert asked == {
        f"{small}/forward_ms": (135, 115),
        f"{small}/four_steps_s": (0.55, 0.46),
        f"{large}/forward_ms": (2700, 2350),
        f"{large}/four_steps_s": (10.8, 9.4),
        f"{large}/peak_gib": (22, 19),
        "sagesla/12x32760_ms": (1.5, 1.15),
        "sagesla/40x75600_ms": (19, 15.5),
        "block_sparse_attention/40x75600_tops": (780, 950),
        "gemm_int8_block/75600x13824x5120_tops": (780, 950),
        "gemm_fp8_block/75600x13824x5120_tflops": (1000, 1150),
        f"{small}/gpu_idle_share": (0.02, None),
    }


def test_milliseconds_become_seconds_with_all_that_stands_beside():
    clip = record(
        f"{MODEL}/sagesla-fp8/four_steps_ms", 540,
        ceiling=Ceiling(400, "ms", "four forwards"), share_of_ceiling=400 / 540,
        baseline={"diffusers-eager": 62_000}, config={"peak_gib": 1.9},
    )  # fmt: skip
    target = only([clip], f"{MODEL}/four_steps_s")
    assert (target.value, target.unit, target.spread) == (pytest.approx(0.54), "s", 0.0005)
    assert target.ceiling == Ceiling(pytest.approx(0.4), "s", "four forwards")
    assert target.baseline == {"diffusers-eager": pytest.approx(62)}
    assert target.share_of_ceiling == clip.share_of_ceiling
    assert (target.commit, target.date, target.runs) == (clip.commit, clip.date, clip.runs)
    assert target.config["source"] == clip.name
    assert target.config["verdict"] == "must reached"


def test_the_peak_is_that_of_the_whole_clip():
    model = "h200/wan2.1-t2v-14b-720p"
    peaks = {"forward_ms": 14.4, "four_steps_ms": 14.7}
    records = [
        record(f"{model}/sagesla-fp8/{name}", 1.0, config={"peak_gib": peak})
        for name, peak in peaks.items()
    ]
    target = only(records, f"{model}/peak_gib")
    assert (target.value, target.unit, target.spread, target.runs) == (14.7, "GiB", 0, 1)
    assert target.config["verdict"] == "aim reached"


def test_beside_the_peak_stand_those_of_diffusers_in_the_same_run():
    def forward(name: str, peak: float) -> Record:
        return record(f"h200/{name}/forward_ms", 1.0, config={"peak_gib": peak})

    model, other = "wan2.1-t2v-14b-720p", "wan2.1-t2v-1.3b-480p"
    clip = record(f"h200/{model}/sagesla-fp8/four_steps_ms", 1.0, config={"peak_gib": 14.7})
    eager, compiled = (forward(f"{model}/diffusers-{name}", 31.2) for name in ("eager", "compiled"))
    records = [
        clip,
        eager,
        replace(compiled, commit="earlier"),
        forward(f"{model}/torchao-fp8", 20.0),
        forward(f"{other}/diffusers-compiled", 5.0),
    ]
    assert only(records, f"h200/{model}/peak_gib").baseline == {"diffusers-eager": 31.2}
    target = only([clip, eager, compiled], f"h200/{model}/peak_gib")
    assert set(target.baseline) == {"diffusers-eager", "diffusers-compiled"}


def test_the_best_provider_answers_and_is_named():
    shape = "h200/block_linear/{}-block/75600x13824x5120/{}/tflops"
    records = [
        record(shape.format(scheme, name), value, "TFLOP/s", config={"provider": name})
        for scheme, name, value in [
            ("int8", "triton", 900),
            ("fp8", "cuda", 990),
            ("fp8", "torch", 1143),
            ("fp8", "triton", 785),
        ]
    ]
    fp8 = only(records, "h200/gemm_fp8_block/75600x13824x5120_tflops")
    assert (fp8.value, fp8.unit, fp8.config["provider"]) == (1143, "TFLOP/s", "torch")
    int8 = only(records, "h200/gemm_int8_block/75600x13824x5120_tops")
    assert (int8.value, int8.unit) == (900, "TOPS")


@pytest.mark.parametrize(
    "name",
    [
        f"{MODEL}/fused-fp8/forward_ms",
        f"{MODEL}/sagesla-int8/forward_ms",
        "dry/tiny-random/sagesla-fp8/forward_ms",
        "h200/block_sparse_attention_backward/40x75600_tops",
        "h200/sagesla_after_norm_rope/12x32760_ms",
        "h200/sagesla/112x32760_ms",
        "h200/block_linear/int8-block/75600x13824x5120/triton/chain/tflops",
        "h200/linear_gated_residual/int8-block/75600x13824x5120/triton/tflops",
        f"{MODEL}/other/run/gpu_idle_share",
    ],
)
def test_a_record_of_something_else_answers_no_target(name):
    assert derived([record(name, 1.0)]) == []


def test_every_kernel_scheme_and_shape_has_one_share_of_copy():
    values = {
        "adaln/8x4/cuda": 0.93,
        "adaln/8x4/triton": 0.5,
        "adaln_quantize/int8-block/8x4/triton": 0.79,
    }
    records = [record(f"h200/{name}/share_of_copy", value, "") for name, value in values.items()]
    verdicts = {each.name: each.config["verdict"] for each in derived(records)}
    assert verdicts == {
        "h200/adaln/8x4/share_of_copy": "aim reached",
        "h200/adaln_quantize/int8-block/8x4/share_of_copy": "missed",
    }


def test_a_memory_bound_kernel_without_a_record_is_missed():
    found = {each.name: each for each in complete([])}
    assert list(found) == sorted(f"h200/{kernel}/share_of_copy" for kernel in MEMORY_BOUND)
    missing = found["h200/measure_rms/32760x1536/share_of_copy"]
    assert missing.config["source"] == missing.config["provider"] == "not recorded"
    assert missing.config["verdict"] == "missed" and missing.runs == 0


def test_a_record_takes_the_place_of_what_says_that_there_is_none():
    records = [
        record("h200/measure_rms/32760x1536/share_of_copy", 0.93, ""),
        record("h200/rms_norm/75600x5120/triton/share_of_copy", 0.5, ""),
    ]
    assert len(complete(records)) == len(MEMORY_BOUND)
    answered = {each.name: each.config for each in complete(records) if each.runs}
    assert {name: config["verdict"] for name, config in answered.items()} == {
        "h200/measure_rms/32760x1536/share_of_copy": "aim reached",
        "h200/rms_norm/75600x5120/share_of_copy": "missed",
    }


def test_the_file_of_targets_is_what_the_other_records_give():
    assert read(RESULTS / FILE) == complete(measured()), "run: python -m benchmarks.targets"
