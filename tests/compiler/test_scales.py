"""Files of scales: what is read back, what is refused and with which words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.helpers.scales import scales_data, write_scales_of
from tests.helpers.variants import VARIANTS, captured_program
from turbo_opt.compiler.scales import measured_scales, read_scales, scales_identity
from turbo_opt.errors import BadInput

T2V = VARIANTS["t2v"]
LAYER = "blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def program():
    return captured_program(T2V)


def written(tmp_path, data):
    path = tmp_path / "scales.json"
    path.write_text(json.dumps(data))
    return path


def network(data):
    return data["denoisers"]["transformer"]


def test_a_file_is_read_back_and_found_by_path_or_by_its_name_in_the_recipe(program, tmp_path):
    path = write_scales_of(program, tmp_path / "scales.json", prediction={LAYER: {"fp8-block": 31}})
    by_path = measured_scales(str(path), {}, program)
    by_name = measured_scales("measured", {"measured": str(path)}, program)
    assert by_path == by_name
    assert by_path["transformer"].linear[LAYER].prediction_sqnr["fp8-block"] == 31
    assert [item.name for item in tmp_path.iterdir()] == ["scales.json"]


def test_the_identity_follows_the_content(program, tmp_path):
    path = write_scales_of(program, tmp_path / "scales.json")
    before = scales_identity(str(path), {})
    write_scales_of(program, path, prediction={LAYER: {"fp8-block": 31}})
    assert scales_identity(str(path), {}) != before


def test_a_missing_file_names_what_the_recipe_has(tmp_path):
    with pytest.raises(BadInput, match=r"no scales 'measurd'.*\(measured\).*did you mean 'meas"):
        scales_identity("measurd", {"measured": str(tmp_path / "scales.json")})


def rename(data):
    network(data)["linaer"] = network(data).pop("linear")


def spoil(value):
    return lambda data: network(data)["linear"][LAYER]["sqnr"].update(value)


def lengthen(data):
    network(data)["attention"] = {"blocks.0.attn1": {"errors": [[0.1]], "prediction_errors": []}}


def balance(exponents, layer=LAYER):
    group = {"layers": [layer], "sqnr": {layer: {}}, "gain": {}, "exponents": exponents}
    return lambda data: network(data).update(balance=[group])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "unknown key 'linaer', did you mean 'linear'"),
        (lambda data: data.update(format=2), r"format is 2, not 1\); turbo-opt calibrate scales"),
        (lambda data: data.pop("clips"), "clips: required key is missing"),
        (spoil({"int8-block": [float("nan")]}), "must be a finite number"),
        (spoil({"int8-block": []}), "at least 1 item"),
        (spoil({"int4-block": [30.0]}), "should match pattern"),
        (lengthen, "blocks.0.attn1 has errors of 1 topk, there are 3"),
        (balance([1, 2]), r"has 2 exponents and in_features \[256\]"),
        (balance([99] * 256), "less than or equal to 16"),
        (balance([], "blocks.9.attn1.to_q"), "of which nothing else is said"),
        (lambda data: network(data).update(topk=[0.5, 0.25, 1.0]), "topk must rise"),
        (lambda data: network(data).update(topk=[]), "topk: .*at least 1 item"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_key(program, tmp_path, change, message):
    data = scales_data(program)
    change(data)
    with pytest.raises(BadInput, match=message) as error:
        read_scales(written(tmp_path, data))
    assert "scales.json" in str(error.value)


def test_no_json_is_bad_input(tmp_path):
    path = tmp_path / "scales.json"
    path.write_text("{")
    with pytest.raises(BadInput, match="not valid JSON"):
        read_scales(path)


def test_another_architecture_is_refused_with_what_differs(program, tmp_path):
    path = write_scales_of(program, tmp_path / "scales.json")
    (denoiser,) = program
    larger = replace(denoiser, config={**denoiser.config, "num_layers": 40})
    other = replace(program, denoisers={"transformer": larger})
    with pytest.raises(BadInput, match="num_layers is 2 there and 40 here; measure this model"):
        measured_scales(str(path), {}, other)


def test_keys_that_only_one_release_of_diffusers_writes_do_not_count(program, tmp_path):
    path = write_scales_of(program, tmp_path / "scales.json")
    (denoiser,) = program
    newer = replace(denoiser, config={**denoiser.config, "new_key": 1, "_diffusers_version": "9"})
    measured_scales(str(path), {}, replace(program, denoisers={"transformer": newer}))


def test_a_network_that_was_not_measured_is_named(program, tmp_path):
    path = write_scales_of(program, tmp_path / "scales.json")
    (denoiser,) = program
    pair = replace(program, denoisers={"transformer_2": replace(denoiser, name="transformer_2")})
    with pytest.raises(BadInput, match="measured on transformer, not on transformer_2"):
        measured_scales(str(path), {}, pair)
