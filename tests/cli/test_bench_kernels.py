"""`bench kernels`: providers are timed at a recipe's shapes, and the choice decides afterwards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import invoke
from turbo_opt.artifact.manifest import read_manifest
from turbo_opt.kernels import (
    clear_recorded_choices,
    measure,
    provider_table,
    read_provider_tables,
    recorded_choices,
)
from turbo_opt.kernels.operator import forced_providers
from turbo_opt.kernels.provider_table import DeviceRecord, read_table, write_table
from turbo_opt.kernels.timing import Timing

HERE = provider_table.device_name(torch.device("cpu"))


@pytest.fixture
def own(work, monkeypatch):
    """The user's table, not there yet; shipped ones are out of sight."""
    monkeypatch.setenv(provider_table.TABLE_VARIABLE, str(work / "own.json"))
    monkeypatch.setattr(provider_table, "SHIPPED", work / "measured")
    read_provider_tables()
    yield work / "own.json"
    monkeypatch.undo()
    read_provider_tables()


@pytest.fixture
def slow_library(monkeypatch):
    """Every provider takes 5 ms but the reference, which takes 1: no kernel runs."""

    def timed(operator, args, device):
        return Timing(1.0 if forced_providers()[operator.name] == "reference" else 5.0, 0.0, 3)

    monkeypatch.setattr(measure, "_time", timed)


def test_a_recipe_is_timed_and_the_choices_are_written(recipe, own, work):
    result = invoke("bench", "kernels", recipe, "--out", "mine.json", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["device"] == HERE
    assert [Path(path).name for path in record["tables"]] == ["own.json", "mine.json"]
    calls = {row["operator"] for row in record["calls"]}
    assert calls >= {"adaln", "adaln_quantize", "block_linear", "quantize_activation"}
    linear = [row for row in record["calls"] if row["operator"] == "block_linear"]
    assert len({row["call"] for row in linear}) == len(linear) > 1
    assert sum(row["counts"][str(recipe)] for row in linear) == 20
    for row in linear:
        assert set(row["times"]) == {"torch", "reference"}
        assert row["times"]["torch"]["ms"] > 0 and row["recorded"]
        assert "interpreter" in row["skipped"]["triton"]
    assert own.read_bytes() == (work / "mine.json").read_bytes()
    entries = read_table(own)[HERE].operators
    assert {key: entry.provider for key, entry in entries["block_linear"].items()} == {
        row["call"]: row["choice"] for row in linear
    }


def test_the_choice_changes_what_runs_and_is_recorded_in_the_artifact(recipe, own, slow_library):
    before = invoke("run", recipe, "--out", "before", "--no-cache", "--no-verify")
    assert before.exit_code == 0, before.stderr
    assert read_manifest(Path("before")).kernels["block_linear"] == {"torch": 20}
    assert invoke("bench", "kernels", recipe).exit_code == 0
    after = invoke("run", recipe, "--out", "after", "--no-cache", "--no-verify")
    assert after.exit_code == 0, after.stderr
    assert read_manifest(Path("after")).kernels["block_linear"] == {"reference": 20}
    clear_recorded_choices()
    shown = invoke("generate", "before", "--prompt", "a red circle", "--out", "clip.gif")
    assert shown.exit_code == 0, shown.stderr
    assert set(recorded_choices()["block_linear"]) == {"reference"}


def test_several_recipes_share_calls_and_the_table_shows_what_was_left(recipe, own, slow_library):
    other = own.with_name("other.yaml")
    other.write_text(recipe.read_text().replace("width: 32", "width: 48"))
    result = invoke("bench", "kernels", recipe, other)
    assert result.exit_code == 0, result.stderr
    assert "reference (declared: torch)" in result.stdout
    assert "torch 5, reference 1" in result.stdout
    assert "triton, Triton's interpreter is no way to run" in result.stdout
    assert f"choices for {HERE} written to {own}" in result.stdout
    both = json.loads(invoke("bench", "kernels", recipe, other, "--json").stdout)
    alone = json.loads(invoke("bench", "kernels", recipe, "--json").stdout)
    shared = [row for row in both["calls"] if len(row["counts"]) == 2]
    assert shared, "calls on the prompt are the same in both"
    assert len(alone["calls"]) < len(both["calls"]) < 2 * len(alone["calls"])


def test_what_a_table_holds_of_other_devices_stays(recipe, own, work, slow_library):
    there = {"NVIDIA H200": DeviceRecord("sm90", {"torch": "2.11"}, {})}
    write_table(work / "mine.json", there)
    assert invoke("bench", "kernels", recipe, "--out", "mine.json").exit_code == 0
    assert set(read_table(work / "mine.json")) == {"NVIDIA H200", HERE}


def test_a_damaged_table_of_the_user_is_replaced_and_said_so(recipe, own, slow_library):
    own.write_text("{}")
    shown = invoke("env")
    assert shown.exit_code == 0
    assert shown.stderr.count(f"note: ignored: {own}: not a table of measured providers") == 1
    result = invoke("bench", "kernels", recipe)
    assert result.exit_code == 0
    assert f"note: replaced by a new one: {own}: not a table" in result.stderr
    assert HERE in read_table(own)


def test_a_recipe_for_a_gpu_is_timed_on_what_is_here(recipe, own, slow_library):
    result = invoke("bench", "kernels", recipe, "--set", "target=rtx4090", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert f"note: {recipe} is for rtx4090; its calls are timed on {HERE}" in result.stderr
    assert set(read_table(own)) == {HERE}


def test_with_tables_turned_off_only_the_named_file_is_written(recipe, own, work, slow_library):
    os.environ[provider_table.TABLE_VARIABLE] = "0"  # `own` puts it back
    result = invoke("bench", "kernels", recipe, "--out", "mine.json")
    assert result.exit_code == 0, result.stderr
    assert "TURBO_OPT_PROVIDER_TABLE=0: the user's table is left as it is" in result.stderr
    assert not own.exists() and (work / "mine.json").is_file()


def test_wrong_recipes_and_places(refused, recipe, own, work):
    assert "tiny-wan/cpx" in refused("bench", "kernels", "tiny-wan/cpx")
    assert "unknown pass 'fuse-norm'" in refused(
        "bench", "kernels", recipe, "--passes", "fuse-norm"
    )
    assert "a folder; --out names a file" in refused("bench", "kernels", recipe, "--out", work)
    (work / "notes.json").write_text("[1, 2]")
    message = refused("bench", "kernels", recipe, "--out", "notes.json")
    assert "not a table of measured providers; it is not overwritten" in message
    message = refused("bench", "kernels", recipe, "--out", "notes.json/table.json")
    assert "is not a folder" in message
    assert "unknown command 'kernel', did you mean 'kernels'" in refused("bench", "kernel")
    if not torch.cuda.is_available():
        assert "torch sees no CUDA GPU" in refused("bench", "kernels", "--device", "cuda")


def test_a_model_without_a_vae_is_refused(refused, spoiled, own):
    import shutil

    path = spoiled(lambda folder: shutil.rmtree(folder / "vae"))
    assert "no vae/config.json, so the latent size" in refused("bench", "kernels", path)
