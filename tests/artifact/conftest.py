"""Artifacts of the tiny pipelines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.tiny_folder import shared_artifact


@pytest.fixture(scope="session")
def stored() -> Path:
    """An artifact of one denoiser in float32, in several shards. Not to be changed."""
    return shared_artifact()


@pytest.fixture(scope="session")
def stored_pair() -> Path:
    """An artifact of two experts. Not to be changed."""
    return shared_artifact(experts=2)


@pytest.fixture
def copy(stored: Path, tmp_path: Path) -> Path:
    """A copy of `stored` to damage."""
    return Path(shutil.copytree(stored, tmp_path / "copy"))
