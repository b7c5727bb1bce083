"""`calibrate scales`: what is measured against what it means, the command, and its messages."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch.nn.functional import scaled_dot_product_attention

from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.flow import NoiseLevels
from turbo_opt.calibration.networks import DenoiserFolder, open_denoiser
from turbo_opt.calibration.scales import measure
from turbo_opt.calibration.scales.evaluations import Evaluations, Measuring
from turbo_opt.calibration.scales.measure import measure_denoiser
from turbo_opt.calibration.scales.run import noise_range
from turbo_opt.cli.main import cli
from turbo_opt.compiler.scales import DenoiserScales, read_scales
from turbo_opt.errors import TurboOptError
from turbo_opt.kernels import (
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
    sla,
)

CPU = torch.device("cpu")
LEVELS = NoiseLevels(3.0, 0.0, 1.0)
MEASURING = Measuring(
    clips=2,
    held_out=2,
    noise_levels=2,
    topk=(0.5, 1.0),
    block_q=64,
    block_k=64,
    probes=8,
    compute=torch.float32,
)
FFN = "blocks.1.ffn.net.2"


@pytest.fixture(scope="module")
def folder(home: Path) -> DenoiserFolder:
    return open_denoiser(str(home / "teacher"), "transformer")


@pytest.fixture(scope="module")
def samples(home: Path) -> SampleSet:
    return SampleSet.open(home / "samples")


@pytest.fixture(scope="module")
def measured(folder: DenoiserFolder, samples: SampleSet) -> DenoiserScales:
    return measure_denoiser(folder, samples, LEVELS, MEASURING, CPU)


@pytest.fixture(scope="module")
def evaluations(folder: DenoiserFolder, samples: SampleSet) -> Evaluations:
    return Evaluations(folder, samples, LEVELS, MEASURING, CPU, lambda *told: None, None)


def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    noise = sum((f - e).square().sum() for f, e in zip(found, expected, strict=True))
    return float((noise / sum(e.square().sum() for e in expected)).sqrt())


def quantized_output(layer, args, output):
    values = dequantize_activation(*quantize_activation(args[0], "fp8-block"), "fp8-block")
    weight = dequantize_weight(*quantize_weight(layer.weight, "fp8-block"))
    return torch.nn.functional.linear(values, weight, layer.bias)


def test_every_layer_of_the_blocks_is_measured(measured: DenoiserScales) -> None:
    assert len(measured.linear) == 20 and len(measured.attention) == 2
    assert measured.linear[FFN].shape == (256, 256)
    assert all(set(layer.sqnr) == {"int8-block", "fp8-block"} for layer in measured.linear.values())
    assert all(20 < min(layer.sqnr["fp8-block"]) < 60 for layer in measured.linear.values())
    assert measured.noise_levels == pytest.approx((0.5, 0.9), abs=1e-4)
    assert [group.layers[0] for group in measured.balance[:3]] == [
        "blocks.0.attn1.to_q", "blocks.0.attn2.to_q", "blocks.0.ffn.net.0.proj"
    ]  # fmt: skip


def test_the_effect_of_a_layer_is_that_of_quantizing_it_alone(
    measured: DenoiserScales, evaluations: Evaluations
) -> None:
    with torch.no_grad():
        exact = [step.run() for step in evaluations.on_held_out("exact")]
        handle = evaluations.linear[FFN].register_forward_hook(quantized_output)
        changed = [step.run() for step in evaluations.on_held_out("changed")]
        handle.remove()
    decibels = -20 * torch.log10(torch.tensor(relative(changed, exact))).item()
    assert measured.linear[FFN].prediction_sqnr["fp8-block"] == pytest.approx(decibels, abs=2.5)


def test_the_error_of_attention_is_that_of_the_operator_on_its_operands(
    measured: DenoiserScales, evaluations: Evaluations
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(attn, q, k, v):
        o = scaled_dot_product_attention(q, k, v)
        if evaluations.name_of(attn) == "blocks.1.attn1":
            seen.append((sla(q, k, v, None, None, 0.5, 64, 64), o))
        return o

    with torch.no_grad(), evaluations.watched(lambda *told: None, attend):
        for step in evaluations.on_held_out("q, k and v"):
            step.run()
    found = measured.attention["blocks.1.attn1"]
    first_level = seen[0::2]
    expected = relative([s for s, _ in first_level], [o for _, o in first_level])
    assert found.errors[0][0] == pytest.approx(expected, rel=1e-3)
    assert max(found.errors[1]) < 1e-5, "every block is kept"
    assert found.prediction_errors[0] > 1e-3 > found.prediction_errors[1]
    half, all_blocks = measured.together
    assert (half.mean, half.shares) == (0.5, dict.fromkeys(measured.attention, 0.5))
    assert half.error == half.uniform_error > 1e-3 > all_blocks.error


def test_block_by_block_gives_the_same_and_leaves_no_weights_behind(
    folder: DenoiserFolder, samples: SampleSet
) -> None:
    little = replace(MEASURING, held_out=1, topk=(0.5,), probes=1)
    found, expected = (
        measure_denoiser(folder, samples, LEVELS, little, CPU, whole=whole)
        for whole in (False, True)
    )
    assert found == expected
    streamed = Evaluations(folder, samples, LEVELS, MEASURING, CPU, lambda *told: None, False)
    with torch.no_grad():
        next(streamed.on_held_out("one")).run()
    assert {p.device.type for p in streamed.network.blocks.parameters()} == {"meta"}


def test_a_projection_in_the_checkpoint_is_used(evaluations: Evaluations) -> None:
    from turbo_opt.ir.weights import constant

    attn = evaluations.attentions["blocks.0.attn1"]
    q, k, v = torch.randn(3, 1, 2, 128, 128).unbind()
    plain = evaluations.sparse(attn, q, k, v, 0.5)
    weight, bias = torch.randn(128, 128), torch.randn(128)
    names = [f"blocks.0.attn1.proj_l.{part}" for part in ("weight", "bias")]
    for name, value in zip(names, (weight, bias), strict=True):
        evaluations.checkpoint.unread[name] = constant(value)
    found = evaluations.sparse(attn, q, k, v, 0.5)
    for name in names:
        del evaluations.checkpoint.unread[name]
    assert torch.equal(found, sla(q, k, v, weight, bias, 0.5, 64, 64))
    assert not torch.equal(found, plain)


def test_experts_are_measured_on_their_side_of_the_boundary(tmp_path: Path) -> None:
    from tests.helpers.tiny_folder import shared_folder

    pair = [open_denoiser(str(shared_folder(2)), name) for name in ("transformer", "transformer_2")]
    assert [noise_range(each) for each in pair] == [
        NoiseLevels(3.0, 0.7, 1.0), NoiseLevels(3.0, 0.0, 0.7)
    ]  # fmt: skip
    assert noise_range(pair[0], 5.0).shift == 5.0


RECIPE = """\
schema_version: 1
model: {source: ./teacher, dtype: float32}
target: cpu
passes:
  - canonicalize
  - sparse-attention: {block_q: 64, proj_l: zero}
generate: {height: 64, width: 64, num_frames: 5, max_sequence_length: 16}
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(item) for item in arguments], prog_name="turbo-opt")


@pytest.fixture(scope="module")
def command(home: Path) -> tuple[object, ...]:
    (home / "scales.yaml").write_text(RECIPE)
    data = ("--data", home / "samples", "--device", "cpu", "--noise-levels", 1)
    return ("calibrate", "scales", home / "scales.yaml", *data)


def test_the_file_serves_the_passes(home: Path, command, tmp_path: Path) -> None:
    out = tmp_path / "scales.json"
    amount = ("--clips", 1, "--held-out", 1, "--topk", 0.5, "--topk", 1.0, "--probes", 1)
    result = invoke(*command, "--out", out, *amount)
    assert result.exit_code == 0, result.stderr
    assert "blocks.0.attn1" in result.stdout and "channels divided" in result.stdout
    scales = read_scales(out).denoisers["transformer"]
    assert (scales.block_q, scales.block_k, scales.topk) == (64, 64, (0.5, 1.0))
    passes = (
        "canonicalize,fuse-norms,"
        f'sparse-attention{{proj_l=zero block_q=64 topk=0.75 scales="{out}"}},'
        f'quantize-linear?{{scheme=int8-block scales="{out}" min_sqnr=1000}}'
    )
    plan = invoke("plan", home / "scales.yaml", "--passes", passes)
    assert plan.exit_code == 0, plan.stderr
    assert "chosen, quantize-linear: 16 bits for 20 of 20 layers" in plan.stdout
    assert "chosen, sparse-attention: topk " in plan.stdout
    again = invoke(*command, "--out", out)
    assert again.exit_code == 2 and "--overwrite replaces it" in again.stderr


def test_a_pair_of_experts_is_measured_into_one_file_in_bfloat16(
    home: Path, tmp_path: Path
) -> None:
    from tests.helpers.tiny_folder import shared_folder

    recipe = tmp_path / "pair.yaml"
    text = RECIPE.replace("./teacher", str(shared_folder(2))).replace("float32", "bfloat16")
    recipe.write_text(text)
    amount = ("--clips", 1, "--held-out", 1, "--noise-levels", 1, "--topk", 0.5, "--probes", 1)
    out = tmp_path / "scales.json"
    data = ("--data", home / "samples", "--out", out, "--device", "cpu")
    result = invoke("calibrate", "scales", recipe, *data, *amount)
    assert result.exit_code == 0, result.stderr
    assert "transformer_2 worst layers" in result.stdout
    high, low = read_scales(out).denoisers.values()
    assert high.noise_levels[0] > 0.7 > low.noise_levels[0]
    first = "blocks.0.attn1.to_q"
    assert high.linear[first].sqnr != low.linear[first].sqnr


def test_broken_samples_are_skipped_up_to_the_share_that_is_given(
    home: Path, command, tmp_path: Path
) -> None:
    samples, out = tmp_path / "samples", tmp_path / "scales.json"
    shutil.copytree(home / "samples", samples)
    (samples / "000003.safetensors").unlink()
    amount = ("--clips", 1, "--held-out", 1, "--topk", 0.5, "--probes", 0)
    words = (*command, "--data", samples, "--out", out, *amount)
    refused = invoke(*words)
    assert refused.exit_code == 2 and "--broken-share allows 0% (000003" in refused.stderr
    assert not out.exists()
    assert invoke(*words, "--broken-share", 0.2).exit_code == 0


def test_other_samples_take_the_place_of_broken_ones(folder, samples: SampleSet) -> None:
    known = replace(samples, broken={0: "missing", 2: "missing", 7: "missing"})
    evaluations = Evaluations(folder, known, LEVELS, MEASURING, CPU, lambda *told: None, True)
    steps = [*evaluations.on_clips("statistics"), *evaluations.on_held_out("errors")]
    names = [step._batch.names[0] for step in steps]
    assert names[:: MEASURING.noise_levels] == [f"{n:06d}.safetensors" for n in (1, 3, 5, 6)]


def test_without_probes_no_effect_is_measured(command, tmp_path: Path) -> None:
    out = tmp_path / "scales.json"
    amount = ("--clips", 1, "--held-out", 1, "--topk", 0.5, "--probes", 0)
    result = invoke(*command, "--out", out, *amount, "--json")
    assert json.loads(result.stdout)["denoisers"]["transformer"]["linear_layers"] == 20
    scales = read_scales(out).denoisers["transformer"]
    assert not any(layer.prediction_sqnr for layer in scales.linear.values())
    assert not any(layer.prediction_errors for layer in scales.attention.values())


def test_a_model_with_values_that_are_not_finite_is_named(
    folder: DenoiserFolder, samples: SampleSet, monkeypatch
) -> None:
    evaluations = Evaluations(folder, samples, LEVELS, MEASURING, CPU, lambda *told: None, True)
    evaluations.network.get_submodule(FFN).weight[0, 0] = float("nan")
    monkeypatch.setattr(measure, "Evaluations", lambda *_: evaluations)
    with pytest.raises(TurboOptError, match=r"^transformer: its prediction at noise .* not finite"):
        measure_denoiser(folder, samples, LEVELS, MEASURING, CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "scales.yaml"), "the file is JSON; name it .json"),
        (("--clips", 7), "holds 8 samples, --clips 7 and --held-out 2 take 9"),
        (("--data", "none"), "none: no such folder of samples"),
        (("--topk", 0), "0.0 is not in the range 0<x<=1"),
    ],
)
def test_bad_input_writes_nothing(command, tmp_path: Path, monkeypatch, options, message) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*command, "--out", "scales.json", *options)
    assert result.exit_code == 2 and message in result.stderr
    assert not list(tmp_path.iterdir())
