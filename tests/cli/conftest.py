"""One small model and one compiled artifact, shared by all tests of the command line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.helpers.tiny_folder import write_tiny_folder
from turbo_opt.cli.main import cli

RECIPE = """\
schema_version: 1
description: a small random model
model: {source: SOURCE, dtype: float32}
target: cpu
passes:
  - canonicalize
  - fuse-norms
  - quantize-linear:
      scheme: int8-block
  - fuse-norm-quantize
verify: {end_to_end: true}
generate:
  {height: 32, width: 32, num_frames: 5, fps: 8, num_inference_steps: 2, max_sequence_length: 16}
"""


def invoke(*arguments: object) -> Result:
    """Run a command line in this process."""
    return CliRunner().invoke(cli, [str(item) for item in arguments], prog_name="turbo-opt")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below `folder`, with size and time."""
    found = {}
    for item in sorted(folder.rglob("*")):
        stat = item.lstat()
        found[str(item.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns)
    return found


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model, its recipe and the artifact lie."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(shared: Path) -> Path:
    """The pass cache of these tests."""
    folder = shared / "cache"
    os.environ["TURBO_OPT_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Trace each model once for all tests: a captured graph is never changed, only copied."""
    from turbo_opt.capture import export

    trace, kept = export.export_denoiser, {}

    def trace_once(class_name, config, dtype, expand_timesteps):
        key = json.dumps([class_name, config, str(dtype), expand_timesteps], default=str)
        if key not in kept:
            kept[key] = trace(class_name, config, dtype, expand_timesteps)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_denoiser", trace_once)
        yield


@pytest.fixture(scope="session")
def model(shared: Path) -> Path:
    """A whole WanPipeline with random weights."""
    return write_tiny_folder(shared / "model")


@pytest.fixture(scope="session")
def recipe(shared: Path, model: Path) -> Path:
    """A recipe for the model."""
    path = shared / "recipe.yaml"
    path.write_text(RECIPE.replace("SOURCE", str(model)))
    return path


@pytest.fixture(scope="session")
def compiled(shared: Path, recipe: Path) -> tuple[Path, Result]:
    """The artifact of the recipe, and the run that made it."""
    result = invoke("run", recipe, "--out", shared / "artifact", "--json")
    assert result.exit_code == 0, result.stderr
    return shared / "artifact", result


@pytest.fixture(scope="session")
def artifact(compiled: tuple[Path, Result]) -> Path:
    """The artifact of the recipe."""
    return compiled[0]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def spoiled(work: Path, model: Path, recipe: Path) -> Callable[[Callable[[Path], None]], Path]:
    """A recipe for a copy of the model that a function has changed."""

    def make(change: Callable[[Path], None]) -> Path:
        folder = work / "model"
        shutil.copytree(model, folder)
        change(folder)
        path = work / "recipe.yaml"
        path.write_text(recipe.read_text().replace(str(model), str(folder)))
        return path

    return make


@pytest.fixture
def refused(work: Path, cache_folder: Path) -> Callable[..., str]:
    """Run a command line that must exit with 2, say why, and write nothing; the message."""

    def run(*arguments: object) -> str:
        before = listing(work), listing(cache_folder)
        result = invoke(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        at = next(index for index, line in enumerate(lines) if line.startswith("error: "))
        assert "Traceback" not in result.stderr
        assert (listing(work), listing(cache_folder)) == before
        return "\n".join(lines[at:]).removeprefix("error: ")

    return run
