"""Checkpoints of a training: whole or not there, written while it goes on.

    checkpoints/
      step-000200/        a DCP folder, and training.json: what it is of
      latest              the name of the newest whole one

A checkpoint is written as `.step-000200.partial` and renamed when every process's part and the
metadata are on disk; only then does `latest` change. A killed save leaves the earlier one as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from turbo_opt.artifact.staging import sync, write_synced
from turbo_opt.calibration.jobs.schema import Saving
from turbo_opt.calibration.training.dcp import Damaged, read_metadata, read_tensors, reason
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput, TurboOptError

RECORD, LATEST = "training.json", "latest"
_FORMAT = 1
_NAME = re.compile(r"step-[0-9]{6,}")


@dataclass
class _Pending:
    step: int
    partial: Path
    record: Mapping[str, Any]
    done: Future[Any]


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: where they are; made when the first is saved.
        world: all its processes save together.
    """

    def __init__(self, folder: Path, settings: Saving, world: World) -> None:
        self.folder = folder
        self._settings, self._world = settings, world
        self._pending: _Pending | None = None
        # Collectives of a save in the background must not meet those of the training.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Begin to save; what is not asynchronous is finished on return. All processes call."""
        self.finish()
        partial = self.folder / f".{_name(step)}.partial"
        if self._world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        self._world.wait()
        writer, group = FileSystemWriter(partial), self._group
        state: dict[str, Any] = dict(tensors)
        alone = group is None
        with _failure_named(step, partial):
            if self._settings.asynchronous:
                done: Any = dcp.async_save(
                    state, storage_writer=writer, process_group=group, no_dist=alone
                )
                self._pending = _Pending(step, partial, record, done)
                return
            dcp.save(state, storage_writer=writer, process_group=group, no_dist=alone)
        self._publish(step, partial, record)

    def poll(self) -> None:
        """Publish a save that has been finished in the meantime; never waits."""
        pending = self._pending
        # The main process's part ends with the metadata, after every other's.
        if pending is not None and self._world.is_main and pending.done.done():
            self._complete(pending)

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one. All processes call."""
        if self._pending is not None:
            self._complete(self._pending)
        self._world.wait()

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None.

        Raises:
            BadInput: `latest` names one that is not there.
        """
        pointer = self.folder / LATEST
        if not pointer.is_file():
            return None
        name = pointer.read_text(encoding="utf-8").strip()
        if not _NAME.fullmatch(name) or not (self.folder / name).is_dir():
            raise BadInput(f"{pointer}: names {name!r}, which is no checkpoint in {self.folder}")
        return self.folder / name

    def record(self, path: Path) -> dict[str, Any]:
        """training.json of one of these checkpoints.

        Raises:
            BadInput: there is none that can be read; the message says how to go on without it.
        """
        try:
            return read_record(path)
        except BadInput as error:
            raise BadInput(f"{error}; {self.way_around(path)}") from error

    def way_around(self, path: Path) -> str:
        """How to go on without this checkpoint: from the newest whole one before it."""
        older = [
            item
            for item in self.folder.iterdir()
            if _NAME.fullmatch(item.name) and step_of(item) < step_of(path)
        ]
        for item in sorted(older, key=step_of, reverse=True):
            with contextlib.suppress(BadInput):
                read_record(item)
                return (
                    f"write {item.name} into {self.folder / LATEST}, and --resume goes on from "
                    "the checkpoint before it"
                )
        return "there is no checkpoint before it: begin anew in another folder"

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Fill the tensors from a checkpoint. All processes call.

        Raises:
            BadInput: it is not whole, damaged, or of another model.
        """
        try:
            read_tensors(path, tensors, alone=self._group is None)
        except Damaged as error:
            raise BadInput(f"{error}; {self.way_around(path)}") from error
        if self._world.is_main:  # saves that were stopped; nothing goes on with them
            for partial in self.folder.glob(".step-*.partial"):
                shutil.rmtree(partial, ignore_errors=True)

    def _complete(self, pending: _Pending) -> None:
        self._pending = None
        with _failure_named(pending.step, pending.partial):
            pending.done.result()
        self._publish(pending.step, pending.partial, pending.record)

    def _publish(self, step: int, partial: Path, record: Mapping[str, Any]) -> None:
        if not self._world.is_main:
            return
        read_metadata(partial)
        content = json.dumps({"format": _FORMAT, "step": step, **record}, indent=1)
        write_synced(partial / RECORD, content.encode())
        final = self.folder / _name(step)
        shutil.rmtree(final, ignore_errors=True)
        sync(partial)
        os.rename(partial, final)
        sync(self.folder)
        write_synced(self.folder / f".{LATEST}", f"{final.name}\n".encode())
        os.replace(self.folder / f".{LATEST}", self.folder / LATEST)
        sync(self.folder)
        # Of those up to this one: a run that was resumed from an earlier step may have left later.
        until = [old for old in self.folder.glob("step-*") if step_of(old) <= step]
        for old in sorted(until, key=step_of)[: -self._settings.keep]:
            shutil.rmtree(old)


@contextlib.contextmanager
def _failure_named(step: int, partial: Path) -> Iterator[None]:
    """What goes wrong while a checkpoint is written, as one sentence of ours."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:
        raise TurboOptError(
            f"{partial}: the checkpoint of step {step} could not be written ({reason(error)}); the "
            "one before is whole"
        ) from error


def read_record(path: Path) -> dict[str, Any]:
    """training.json of a checkpoint.

    Raises:
        BadInput: it has none, so it was not made by a training of ours, or is of another format.
    """
    read_metadata(path)
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        known = isinstance(record, dict) and record.get("format") == _FORMAT
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path}: has no readable {RECORD}, so it is no checkpoint of this program ({error})"
        ) from None
    if not known or not isinstance(record.get("step"), int):
        raise BadInput(f"{path / RECORD}: not of format {_FORMAT}, which this program reads")
    return record


def _name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """After which step a checkpoint was saved, by its name."""
    return int(path.name.rpartition("-")[2])
