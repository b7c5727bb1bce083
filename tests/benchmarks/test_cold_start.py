"""The benchmark of cold starts: a process of its own makes a clip, and says where its time went."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cold_start
from benchmarks.forward import CASES


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cold_start.prepare("tiny", tmp_path_factory.mktemp("work"), torch.device("cpu"))


def test_a_run_says_where_its_seconds_went(artifact: Path, tmp_path: Path) -> None:
    found = cold_start.first_clip(artifact, "cpu", CASES["tiny"], tmp_path)
    total = found.pop("total_s")
    assert tuple(found) == cold_start.PARTS
    assert min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(total)


def test_what_is_compiled_has_four_steps_and_components_of_its_own(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert len(manifest["schedule"]["steps"]) == 4
    checkpoint = artifact.parent / "checkpoint-tiny"
    for part in ("text_encoder", "tokenizer", "vae"):
        assert (
            checkpoint / part / ("tokenizer.json" if part == "tokenizer" else "config.json")
        ).is_file()


def test_an_artifact_is_used_again(artifact: Path) -> None:
    before = (artifact / "manifest.json").stat().st_mtime_ns
    assert cold_start.prepare("tiny", artifact.parent, torch.device("cpu")) == artifact
    assert (artifact / "manifest.json").stat().st_mtime_ns == before
