"""Where the samples of a set that is being made lie: each a file of its own, or many in a tar.

A shard is packed when all of its samples have been drawn; their own files go when it is on disk. So
a run that is killed leaves whole shards and whole files, and nothing is drawn twice. Shards follow
WebDataset's convention, so that they can be read without the index, there and elsewhere (`shards`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_opt.calibration.data.samples import SampleRecord
from turbo_opt.calibration.data.tars import write_tar

_BROKEN = ".broken"
"""Suffix of a note that a sample cannot be made; it says why."""


@dataclass
class SampleFiles:
    """The samples of a set, by number.

    Attributes:
        folder: of the set.
        captions: one for each sample.
        text_length: positions that embeddings are padded to.
        shard_size: samples of a shard; None if none are packed.
    """

    folder: Path
    captions: Sequence[str]
    text_length: int
    shard_size: int | None
    _packed: int = 0

    def own(self, number: int) -> Path:
        """The file that a sample is drawn into."""
        return self.folder / f"{number:06d}.safetensors"

    def holds(self, number: int) -> bool:
        """Whether a sample has been made, or left out."""
        return self._is_packed(number) or self._is_known(number)

    def leave_out(self, number: int, reason: str) -> None:
        """Note that a sample cannot be made."""
        partial = self._mark(number).with_suffix(".partial")
        partial.write_text(reason, encoding="utf-8")
        partial.replace(self._mark(number))

    def broken(self) -> dict[int, str]:
        """Why samples were left out, by number, in order."""
        marks = sorted(self.folder.glob(f"*{_BROKEN}"))
        return {int(mark.stem): mark.read_text(encoding="utf-8") for mark in marks}

    def try_broken_again(self) -> None:
        """Forget what an earlier run left out, but for shards that are packed without it."""
        for number in self.broken():
            if not self._is_packed(number):
                self._mark(number).unlink()

    def forget_broken(self) -> None:
        """Remove the notes, when the index is there."""
        for number in self.broken():
            self._mark(number).unlink()

    def records(self) -> tuple[SampleRecord, ...]:
        """The lines of the index."""
        broken = self.broken()
        return tuple(
            SampleRecord(file=self._name(number), caption=caption)
            for number, caption in enumerate(self.captions)
            if number not in broken
        )

    def pack(self) -> None:
        """Pack the next shards, in order, as far as their samples are there. One process calls."""
        size = self.shard_size
        while size is not None and self._packed < len(self.captions):
            numbers = range(self._packed, min(self._packed + size, len(self.captions)))
            shard = self._shard(self._packed // size)
            if not shard.is_file():
                if not all(map(self._is_known, numbers)):
                    return
                write_tar(shard, self._members(numbers))
            for number in numbers:  # also those that a killed run packed and did not remove
                self.own(number).unlink(missing_ok=True)
            self._packed = numbers.stop

    def _members(self, numbers: range) -> Iterator[tuple[str, bytes]]:
        for number in numbers:
            path = self.own(number)
            if self._mark(number).is_file():
                continue
            yield path.name, path.read_bytes()
            record = {"caption": self.captions[number], "text_length": self.text_length}
            yield path.with_suffix(".json").name, json.dumps(record, ensure_ascii=False).encode()

    def _mark(self, number: int) -> Path:
        return self.own(number).with_suffix(_BROKEN)

    def _is_known(self, number: int) -> bool:
        return self.own(number).is_file() or self._mark(number).is_file()

    def _is_packed(self, number: int) -> bool:
        shard = self._shard_of(number)
        return shard is not None and shard.is_file()

    def _shard_of(self, number: int) -> Path | None:
        return self._shard(number // self.shard_size) if self.shard_size else None

    def _shard(self, index: int) -> Path:
        return self.folder / f"shard-{index:06d}.tar"

    def _name(self, number: int) -> str:
        shard, own = self._shard_of(number), self.own(number).name
        return own if shard is None else f"{shard.name}/{own}"
