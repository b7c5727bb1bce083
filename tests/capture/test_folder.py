"""Where the folder of a model is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbo_opt.capture.folder import find_source
from turbo_opt.errors import BadInput


def pipeline(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_path_in_a_file_starts_at_the_file(tmp_path: Path, monkeypatch) -> None:
    """Whatever lies in the current folder under the same name."""
    mine, other = pipeline(tmp_path / "home" / "teacher"), pipeline(tmp_path / "here" / "teacher")
    monkeypatch.chdir(tmp_path / "here")
    assert find_source("./teacher", tmp_path / "home") == mine
    assert find_source("./teacher") == other
    (other / "model_index.json").unlink()
    assert find_source("teacher", tmp_path / "home") == mine


def test_the_current_folder_comes_after_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "home").mkdir()
    found = pipeline(tmp_path / "here" / "teacher")
    monkeypatch.chdir(tmp_path / "here")
    assert find_source("./teacher", tmp_path / "home") == found


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    with pytest.raises(BadInput, match=r"teacher: no model_index\.json in it"):
        find_source("teacher", tmp_path)
