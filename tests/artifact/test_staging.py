"""An artifact appears whole or not at all, and a killed save can be continued."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_folder import SHARD_BYTES, tiny_program
from turbo_opt.artifact import staging
from turbo_opt.artifact.manifest import read_manifest
from turbo_opt.artifact.save import save
from turbo_opt.artifact.shards import Shard
from turbo_opt.artifact.verify import verify
from turbo_opt.errors import BadInput
from turbo_opt.ir import disk
from turbo_opt.ir.weights import to_json

KILLED = """
import json, os, signal, sys
from turbo_opt.artifact.save import save
from turbo_opt.ir.program import Components, Denoiser, Program
from turbo_opt.ir.schedule import Schedule
from turbo_opt.ir.weights import WeightStore, from_json

out, weights, shard_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = WeightStore({name: from_json(item) for name, item in json.load(open(weights)).items()})
denoiser = Denoiser("transformer", None, store, "WanTransformer3DModel", {})
program = Program({"transformer": denoiser}, Schedule(()), Components("x", "WanPipeline", {}))

def die(stage, done, total):
    if done >= 0.7 * total:
        os.kill(os.getpid(), signal.SIGKILL)

save(program, out, resume=True, max_shard_bytes=shard_bytes, progress=die)
"""


def test_a_save_killed_in_the_middle_leaves_nothing_and_resumes_from_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "artifact"
    weights = tiny_program().denoisers["transformer"].weights
    stored = tmp_path / "weights.json"
    stored.write_text(json.dumps({name: to_json(tensor) for name, tensor in weights.items()}))
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(out),
        str(tmp_path / "weights.json"),
        str(SHARD_BYTES),
    ]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()

    partial = tmp_path / ".artifact.partial"
    finished = _finished(tmp_path / ".artifact.partial.journal")
    assert len(finished) >= 2
    before = {file: (partial / file).stat().st_mtime_ns for file in finished}
    # One finished shard is damaged on disk meanwhile: it must not be trusted.
    damaged = finished[0]
    _flip_byte(partial / damaged)
    written: list[str] = []
    real = staging.Staging.record

    def record(self: staging.Staging, shard: Shard, digest: str) -> None:
        written.append(shard.file)
        real(self, shard, digest)

    monkeypatch.setattr(staging.Staging, "record", record)
    save(tiny_program(), out, resume=True, max_shard_bytes=SHARD_BYTES)
    reused = {file for file in finished if file not in written}
    assert damaged in written
    assert len(reused) == len(finished) - 1
    for file in reused:
        assert (out / file).stat().st_mtime_ns == before[file]
    assert verify(out).passed
    assert _names(tmp_path) == {"artifact", "weights.json"}


def test_a_save_that_fails_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        save(tiny_program(), tmp_path / "a", progress=_raise_at(0.5), max_shard_bytes=SHARD_BYTES)
    assert _names(tmp_path) == set()


def test_a_resumable_save_that_fails_keeps_its_shards(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        save(
            tiny_program(), tmp_path / "a", progress=_raise_at(0.9), resume=True,
            max_shard_bytes=SHARD_BYTES,
        )  # fmt: skip
    assert not (tmp_path / "a").exists()
    assert _finished(tmp_path / ".a.partial.journal")


def test_left_over_files_of_another_program_do_not_enter_the_artifact(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        save(
            tiny_program(experts=2), tmp_path / "a", progress=_raise_at(0.9), resume=True,
            max_shard_bytes=SHARD_BYTES,
        )  # fmt: skip
    assert verify(save(tiny_program(), tmp_path / "a", resume=True)).passed


def test_a_disk_too_small_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BadInput, match=r"needs 0\.07 GiB, 0\.00 GiB are free on") as caught:
        save(tiny_program(), tmp_path / "a")
    assert caught.value.exit_code == 2
    assert _names(tmp_path) == set()


@pytest.mark.parametrize("after", [0, 1, 30])
def test_a_disk_that_fills_up_meanwhile_is_bad_input_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    real, calls = os.pwrite, iter(range(10**6))

    def full(*args: Any) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(disk, "_BUFFER_BYTES", 2**16)
    with pytest.raises(BadInput, match="GiB are free on"):
        save(tiny_program(), tmp_path / "a")
    assert _names(tmp_path) == set()


def test_a_folder_that_is_no_artifact_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "documents"
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "my web app"}')
    with pytest.raises(BadInput, match="is not a turbo_opt artifact"):
        save(tiny_program(), out, overwrite=True)
    assert _names(out) == {"manifest.json"}
    assert _names(tmp_path) == {"documents"}


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(BadInput, match="not a directory"):
        save(tiny_program(), tmp_path / "a", overwrite=True)
    assert (tmp_path / "a").read_text() == "mine"


def test_a_stranger_under_the_temporary_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "mine").touch()
    with pytest.raises(BadInput, match="not left by a save of ours"):
        save(tiny_program(), tmp_path / "a")
    assert (tmp_path / ".a.partial" / "mine").exists()


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert read_manifest(save(tiny_program(), tmp_path / "a", replay=False))


@pytest.mark.parametrize("exchange", [True, False])
def test_an_artifact_is_replaced_only_when_asked(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    out = Path(shutil.copytree(stored, tmp_path / "a"))
    with pytest.raises(BadInput, match="pass overwrite"):
        save(tiny_program(), out)
    assert read_manifest(out).recipe["model"]
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    save(tiny_program(), out, overwrite=True, recipe={"second": True}, replay=False)
    assert read_manifest(out).recipe == {"second": True}
    assert _names(tmp_path) == {"a"}


def test_a_failing_overwrite_keeps_the_old_artifact(stored: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(stored, tmp_path / "a"))
    with pytest.raises(RuntimeError, match="stop"):
        save(tiny_program(), out, overwrite=True, progress=_raise_at(0.5))
    assert verify(out).passed


def test_two_saves_to_one_place_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "a"
    with (
        staging.Staging.open(out, resume=False),
        pytest.raises(BadInput, match="another process is saving"),
    ):
        save(tiny_program(), out)


def _raise_at(share: float) -> Any:
    def progress(stage: str, done: int, total: int) -> None:
        if done >= share * total:
            raise RuntimeError("stop")

    return progress


def _finished(journal: Path) -> list[str]:
    return [json.loads(line)["file"] for line in journal.read_text().splitlines()]


def _flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}
