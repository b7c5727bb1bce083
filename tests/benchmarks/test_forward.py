"""What a forward's floor counts, by hand, and that a run records it beside every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.forward import CASES, PIPELINES, Bench, Case, rivals
from benchmarks.forward.floors import Computation, Rates, Work, floor
from benchmarks.forward.rivals import RIVALS, Rival, attending_as
from benchmarks.forward.run import run
from benchmarks.kernels._harness import Session
from benchmarks.results import Ceiling, read

TOY = Case("toy", {"num_attention_heads": 1, "num_layers": 3, "ffn_dim": 256}, (1, 32, 32), 1)
"""256 tokens of 128 channels."""


def test_a_dense_block_in_16_bits_is_counted_by_hand() -> None:
    assert Work.of(TOY, Computation.of("")) == Work(
        # 256 tokens through six 128×128 and two 128×256 layers, 512 words through two 128×128.
        linear=2 * (256 * (6 * 16_384 + 2 * 32_768) + 512 * 2 * 16_384),
        attention=2 * 2 * 256 * 256 * 128,
        branch=0,
        cross_attention=2 * 2 * 256 * 512 * 128,
        # Three norms read and write 16 bits; q, k and the prompt's q are normalized.
        moved=(3 * 4 + 3 * 4) * 256 * 128,
    )


def test_a_sparse_block_in_8_bits_is_counted_by_hand() -> None:
    pipeline = PIPELINES["sagesla-fp8"].replace("topk=0.1", "topk=0.6")
    assert Work.of(TOY, Computation.of(pipeline)) == Work(
        linear=2 * 256 * (6 * 16_384 + 2 * 32_768),  # the prompt's keys and values are kept
        attention=2 * 2 * 256 * 128 * 128,  # one of two key blocks
        branch=2 * 2 * 256 * 128 * 128,
        cross_attention=2 * 2 * 256 * 161 * 128,  # 160 words, and one key for the padding
        # Norms write 8 bits; q is read once, k and v twice, each written in 8 bits.
        moved=(3 * 3 + 4 + 3 + 5 + 5) * 256 * 128,
    )


@pytest.mark.parametrize(("tokens", "keys"), [(20, 21), (511, 512), (512, 512)])
def test_a_prompt_of_another_length_has_a_name_and_a_floor_of_its_own(
    tokens: int, keys: int
) -> None:
    case = TOY.with_prompt(tokens)
    assert case.name == f"{TOY.name}-prompt-{tokens}"
    work = Work.of(case, Computation.of(PIPELINES["sagesla-fp8"]))
    assert work.cross_attention == 2 * 2 * 256 * keys * 128
    assert Work.of(case, Computation.of("")) == Work.of(TOY, Computation.of(""))


def test_a_dense_block_in_8_bits_is_counted_by_hand() -> None:
    assert Work.of(TOY, Computation.of(PIPELINES["sage-fp8"])) == Work(
        linear=2 * 256 * (6 * 16_384 + 2 * 32_768),
        attention=2 * 2 * 256 * 256 * 128,
        branch=0,
        cross_attention=2 * 2 * 256 * 161 * 128,
        # Norms write 8 bits; q and k are normalized; k and v are measured; all three are rounded.
        moved=(3 * 3 + 4 + 8 + 4 + 9) * 256 * 128,
    )


@pytest.mark.parametrize("name", ["sage-fp8", "sagesla-fp8"])
def test_attention_in_8_bits_has_p_and_v_in_fp8(name) -> None:
    module, _ = Bench(CASES["tiny"], Session(dry=True)).optimized(PIPELINES[name])
    calls = [node for node in module.graph.graph.nodes if "sage" in str(node.target)]
    assert len(calls) == 2 and all("fp8" in node.args for node in calls)


@pytest.mark.parametrize(
    ("model", "linear", "attention", "moved"),
    [("1.3b", 2.7309e12, 0.6440e12, 1.308e9), ("14b", 45.185e12, 11.691e12, 10.06e9)],
)
def test_full_size_models_count_what_the_budget_says(model, linear, attention, moved) -> None:
    work = Work.of(CASES[model], Computation.of(PIPELINES["sagesla-fp8"]))
    assert work.linear == pytest.approx(linear, rel=1e-3)
    assert work.attention == pytest.approx(attention, rel=1e-3)
    assert work.moved == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "computation"),
    [
        ("captured", Computation()),
        ("int8-block", Computation("int8-block")),
        ("fused-fp8", Computation("fp8-block", padding_once=True, prompt_once=True)),
        ("sage-fp8", Computation("fp8-block", "sage", padding_once=True, prompt_once=True)),
        ("sla-bf16", Computation("bf16", "sla", 0.1)),
        ("sagesla-int8", Computation("int8-block", "sagesla", 0.1, 128, True, True)),
    ],
)
def test_a_pipeline_says_what_is_computed(name, computation) -> None:
    assert Computation.of(PIPELINES[name]) == computation


def rates(**changed: float) -> Rates:
    """Those of a machine that does everything at 1 TFLOP/s and 1 GB/s, or what is `changed`."""

    def rate(name: str) -> Ceiling:
        return Ceiling(changed.get(name, 1.0), "TFLOP/s", name)

    return Rates(
        {"bf16": rate("bf16"), "fp8-block": rate("fp8"), "int8-block": rate("int8")},
        {
            "sla": rate("bf16"),
            "sage": rate("int8_and_fp8"),
            "sage-16bit": rate("int8_and_bf16"),
            "sagesla": rate("int8_and_fp8"),
        },
        rate("library"),
        Ceiling(changed.get("copy", 1.0), "GB/s", "copy"),
    )


SPARSE = Computation("fp8-block", "sagesla", 0.6, 128, True, True)
# Milliseconds of one block of TOY at 1 TFLOP/s and 1 GB/s.
PARTS = {
    "fp8": 0.08388608,
    "int8_and_fp8": 0.016777216,
    "bf16": 0.016777216,
    "library": 0.021102592,
    "copy": 0.851968,
}


def test_a_floor_adds_its_parts_over_blocks_and_forwards() -> None:
    least = floor(TOY, SPARSE, rates())
    assert least.value == pytest.approx(3 * sum(PARTS.values()), rel=1e-12)
    assert least.unit == "ms"
    assert floor(TOY, SPARSE, rates(), forwards=4).value == pytest.approx(4 * least.value)


def test_attention_of_the_package_multiplies_p_and_v_in_16_bits() -> None:
    (rival,) = (each for each in RIVALS if each.package == "sageattention")
    least = floor(TOY, rival.computation, rates()).value
    attention = 4 * TOY.tokens**2 * TOY.channels / 1e9
    for kind, saved in (("int8_and_bf16", attention / 2), ("int8_and_fp8", 0.0)):
        quicker = floor(TOY, rival.computation, rates(**{kind: 2.0})).value
        assert least - quicker == pytest.approx(3 * saved, abs=1e-12), kind


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_a_sparse_floor_is_at_its_own_rate(part) -> None:
    saved = floor(TOY, SPARSE, rates()).value - floor(TOY, SPARSE, rates(**{part: 2.0})).value
    assert saved == pytest.approx(3 * PARTS[part] / 2, rel=1e-9)


def test_dense_attention_in_8_bits_is_at_their_rate() -> None:
    sage = Computation.of(PIPELINES["sage-fp8"])
    saved = floor(TOY, sage, rates()).value - floor(TOY, sage, rates(int8_and_fp8=2.0)).value
    assert saved == pytest.approx(3 * 0.033554432 / 2, rel=1e-9)


@pytest.mark.parametrize("part", ["int8_and_fp8", "fp8", "int8"])
def test_a_dense_floor_in_16_bits_knows_no_8_bit_rate(part) -> None:
    dense = Computation()
    assert floor(TOY, dense, rates(**{part: 9.0})) == floor(TOY, dense, rates())


def test_a_run_records_a_floor_beside_every_time(tmp_path: Path) -> None:
    run(CASES["tiny"], Session(dry=True), ["sagesla-fp8"], tmp_path)
    records = {record.name: record for record in read(tmp_path / "forward.json")}
    names = ("diffusers-eager/forward_ms", "sagesla-fp8/forward_ms", "sagesla-fp8/four_steps_ms")
    assert sorted(records) == [f"dry/tiny-random/{name}" for name in names]
    for record in records.values():
        assert record.ceiling is not None
        assert record.share_of_ceiling == pytest.approx(record.ceiling.value / record.value)
    eager, forward, clip = (records[f"dry/tiny-random/{name}"] for name in names)
    assert clip.ceiling.value == pytest.approx(4 * forward.ceiling.value)
    assert forward.baseline == {"diffusers-eager": eager.value}
    assert clip.baseline == {"diffusers-eager": 100 * eager.value}
    assert eager.baseline == {}


def _with_a_rival(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """One that runs anywhere: a layer is a hundredth too large, attention is counted."""

    class Other(nn.Parameter):
        pass

    def change(blocks: nn.Module) -> None:
        layer = blocks[0].ffn.net[2]  # type: ignore[index]
        layer.weight = Other(layer.weight.detach() * 1.01)

    original = nn.functional.scaled_dot_product_attention

    def attention(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    rival = Rival("faster", "torch", change, lambda: attention, Computation("fp8-block"))
    monkeypatch.setattr("benchmarks.forward.run.RIVALS", [rival])
    monkeypatch.setattr("benchmarks.forward.run.missing", lambda rival, device: None)
    monkeypatch.setattr(Bench, "compiled", Bench.eager)


def test_a_rival_is_recorded_and_stands_beside_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    _with_a_rival(monkeypatch, calls)
    run(CASES["tiny"], Session(dry=True), ["rivals", "captured"], tmp_path)
    records = {record.name.split("/")[2]: record for record in read(tmp_path / "forward.json")}
    assert sorted(records) == ["captured", "diffusers-eager", "faster"]
    faster, captured = records["faster"], records["captured"]
    assert 20 < faster.quality["sqnr_db_vs_eager_bf16"] < 60
    assert captured.baseline["faster"] == faster.value
    assert captured.quality["sqnr_db_vs_eager_bf16"] == 200  # its weights are the reference's
    assert (
        len(calls) == 2 * 2 * 3
    )  # layers, attentions of a layer, one call to warm up and two timed
    assert "fp8 library matmul" in faster.ceiling.what


def test_weights_in_another_form_are_not_counted_twice() -> None:
    class Other(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    weights = {name: value.detach() for name, value in model.named_parameters()}
    assert rivals.replaced_bytes(model, weights) == 0
    model[0].weight = Other(model[0].weight.detach())
    assert rivals.replaced_bytes(model, weights) == 4 * 8


def test_attention_is_pytorchs_again_after_a_failure() -> None:
    original = nn.functional.scaled_dot_product_attention
    rival = Rival("broken", "torch", lambda blocks: None, lambda: min, Computation())
    with pytest.raises(TypeError, match="at least 1 argument"), attending_as(rival):
        nn.functional.scaled_dot_product_attention()
    assert nn.functional.scaled_dot_product_attention is original


def test_a_rival_that_cannot_run_is_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(CASES["tiny"], Session(dry=True), ["rivals"], tmp_path)
    said = capsys.readouterr().out
    for rival in rivals.RIVALS:
        assert f"{rival.name} is left out: " in said
    absent = Rival("absent", "no_such_package", lambda blocks: None, None, Computation())
    reason = rivals.missing(absent, torch.device("cpu"))
    assert reason == "the package no_such_package is not installed"
