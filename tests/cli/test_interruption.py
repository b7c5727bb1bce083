"""A run that is stopped in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import invoke

_DRIVER = Path(__file__).with_name("interrupted_run.py")


def _start(work: Path, recipe: Path, *flags: str) -> subprocess.Popen[str]:
    """A run that waits in the middle of saving."""
    command = [sys.executable, str(_DRIVER), "run", str(recipe), "--out", "out", *flags]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        command, cwd=work, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _wait_for_middle(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    if line != "MIDDLE\n":
        pytest.fail(f"{line}{process.communicate()[1]}")


def test_a_killed_run_leaves_no_artifact_and_resume_picks_up(compiled, recipe, work):
    process = _start(work, recipe, "--resume", "--no-verify")
    _wait_for_middle(process)
    process.kill()
    process.communicate()
    assert not (work / "out").exists()
    partial = work / ".out.partial"
    shards = len(list(partial.rglob("*.safetensors")))
    assert shards >= 2
    done = _start(work, recipe, "--resume", "--json", "--finish", "--no-verify")
    output, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    record = json.loads(output)
    assert all(row["cached"] for row in record["passes"])
    total = len(list((work / "out" / "denoisers").glob("*.safetensors")))
    assert errors.count("SHARD") <= total - 2
    assert not partial.exists()
    assert not (work / ".out.partial.journal").exists()


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
    ids=["SIGTERM", "SIGINT"],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_stopped_run_says_so_and_keeps_only_what_can_be_resumed(
    recipe, work, monkeypatch, number, code, word, resume
):
    def stopped(shard, path, tick):
        path.write_bytes(b"half")
        os.kill(os.getpid(), number)

    monkeypatch.setattr("turbo_opt.artifact.save.write_shard", stopped)
    flags = ["--resume"] if resume else []
    # What a shell starts in the background ignores interrupts, these tests too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    result = invoke("run", recipe, "--out", "out", "--no-verify", *flags)
    assert result.exit_code == code
    assert f"error: {word}; " in result.stderr
    assert "out was not written" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (work / "out").exists()
    assert (work / ".out.partial").is_dir() == resume
    assert ("run it again with --resume" in result.stderr) == resume
