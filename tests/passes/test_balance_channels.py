"""balance-channels: graphs, weights, exactness, near misses, and what later passes see."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.scales import write_scales_of
from tests.helpers.variants import VARIANTS, captured_program, compiled, random_inputs
from tests.passes.graphs import calls_of, reasons_of
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.errors import BadInput, PassFailed
from turbo_opt.ir.edit import user_inputs
from turbo_opt.ir.stages import Stage, split
from turbo_opt.ir.weights import from_json, to_json

T2V = VARIANTS["t2v"]
BASE = "canonicalize,fuse-norms,"
QKV = tuple(f"blocks.0.attn1.to_{part}" for part in "qkv")
CROSS, FFN = ("blocks.1.attn2.to_q",), ("blocks.0.ffn.net.0.proj",)
EXPONENTS = [(index % 7) - 3 for index in range(256)]


def group(layers, gain=2.0, exponents=EXPONENTS, divided=40.0):
    return {
        "layers": layers,
        "sqnr": {name: {"int8-block": [divided]} for name in layers},
        "prediction_sqnr": {name: {"int8-block": divided} for name in layers},
        "gain": {"int8-block": gain, "fp8-block": 0.0},
        "exponents": exponents,
    }


@pytest.fixture
def balance(tmp_path):
    """`balance(program, groups…)` is the pass in text form."""

    def text(program, *groups, options="", **numbers):
        path = write_scales_of(program, tmp_path / "scales.json", balance=groups, **numbers)
        return f'{BASE}balance-channels{{scales="{path}"{options}}}'

    return text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divided_channels_change_weights_and_no_value(optimize, balance, dtype):
    before = captured_program(T2V, dtype)
    after = optimize(before, balance(before, group(QKV), group(CROSS), group(FFN)))
    record = after.history[-1]
    assert record["matches"] == 3
    assert record["verification"]["bitwise"] or record["verification"]["worst_sqnr_db"] > 100
    (old,), (new,) = before, after
    factor = torch.exp2(torch.tensor(EXPONENTS)).to(dtype)
    for name in (*QKV, *CROSS, *FFN):
        weight = f"{name}.weight"
        assert torch.equal(new.weights[weight].load(), old.weights[weight].load() * factor)
    for part in ("weight", "bias"):
        name = f"blocks.1.norm2.{part}"
        assert torch.equal(new.weights[name].load() * factor, old.weights[name].load())
    assert not [name for name in new.weights if name.endswith(".divided")]
    inputs = random_inputs(T2V, 1, 2, 16, 16, dtype)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) > (100 if dtype is torch.float32 else 42)


def test_groups_that_gain_too_little_stay_as_they_are(optimize, balance):
    before = captured_program(T2V)
    text = balance(before, group(QKV, gain=0.4), group(FFN), group(CROSS, exponents=[]))
    after = optimize(before, text)
    choices = {item["module"]: item["choice"] for item in after.history[-1]["choices"]}
    assert choices == {**dict.fromkeys((*QKV, *CROSS), "as it is"), FFN[0]: "divided"}
    after = optimize(before, balance(before, group(QKV, gain=0.4), options=" min_gain=0.3"))
    assert after.history[-1]["matches"] == 1


def test_with_nothing_to_gain_the_pass_must_be_optional(optimize, balance):
    before = captured_program(T2V)
    text = balance(before, group(FFN), options=" scheme=fp8-block")
    with pytest.raises(PassFailed, match="balance-channels matched nothing"):
        optimize(before, text)
    optimize(before, text.replace("balance-channels", "balance-channels?"))


@pytest.mark.parametrize(
    ("variant", "layers", "reason"),
    [
        ("t2v", (QKV[0],), "the norm is read by others too"),
        ("t2v", (QKV[0], FFN[0]), "do not read one tensor"),
        ("t2v", ("blocks.0.attn1.to_out.0",), "what the layers read is no fused norm"),
        ("ti2v", FFN, "it is modulated per token"),
    ],
)
def test_a_near_miss_says_why(optimize, balance, variant, layers, reason):
    before = captured_program(VARIANTS[variant])
    good = () if variant == "ti2v" else (group(CROSS),)
    text = balance(before, group(layers), *good).replace("-channels", "-channels?")
    (found,) = reasons_of(optimize(before, text))
    assert reason in found


def test_the_modulation_is_divided_once_a_noise_level(optimize, balance):
    before = captured_program(T2V)
    after = optimize(before, balance(before, group(FFN)) + ",hoist-invariants")
    (denoiser,) = after
    found = split(denoiser.graph, user_inputs(denoiser.exported), denoiser.stages)
    norm = calls_of(after, "turbo_opt.adaln")[1]
    assert set(norm.args[1:3]) <= set(found.kept[Stage.TIMESTEP])


def test_fused_passes_still_fire_and_numbers_of_divided_layers_count(optimize, balance):
    before = captured_program(T2V)
    numbers = {"prediction": {FFN[0]: {"int8-block": 20.0}}}
    later = ",quantize-linear{scheme=int8-block scales=%s min_sqnr=30},fuse-norm-quantize"
    text = balance(before, group(FFN), **numbers)
    scales = text.partition("scales=")[2].removesuffix("}")
    after = optimize(before, text + later % scales)
    assert len(calls_of(after, "turbo_opt.adaln_quantize")) == 4
    without = optimize(before, BASE.rstrip(",") + later % scales)
    assert len(calls_of(without, "turbo_opt.adaln_quantize")) == 3


def test_a_file_that_does_not_know_the_divided_layers_is_refused(optimize, balance, tmp_path):
    before = captured_program(T2V)
    other = write_scales_of(before, tmp_path / "other.json")
    text = balance(before, group(FFN)) + f',quantize-linear{{scales="{other}" min_sqnr=30}}'
    with pytest.raises(BadInput, match=f"nothing of {FFN[0]} with its channels divided"):
        optimize(before, text, "off")


@pytest.mark.parametrize(
    "later",
    [
        "balance-channels{scales=x}",
        "merge-weights{loras=[{weights=x}]}",
        "distill-steps{weights=x}",
    ],
)
def test_what_would_undo_it_is_refused_behind_it(later):
    specs = parse_pipeline(f"{BASE}balance-channels{{scales=x}},{later}")
    with pytest.raises(BadInput, match="cannot run once 'channels-balanced' holds; move it up"):
        validate_pipeline(specs)


def test_divided_weights_are_written_down_and_read_in_bands(optimize, balance):
    before = captured_program(T2V)
    (denoiser,) = optimize(before, balance(before, group(FFN)))
    tensor = denoiser.weights[f"{FFN[0]}.weight"]
    assert torch.equal(from_json(to_json(tensor)).load(), tensor.load())
