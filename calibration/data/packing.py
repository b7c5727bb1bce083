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
        """Whether a sample has been drawn."""
        shard = self._shard_of(number)
        return (shard is not None and shard.is_file()) or self.own(number).is_file()

    def records(self) -> tuple[SampleRecord, ...]:
        """The lines of the index."""
        return tuple(
            SampleRecord(file=self._name(number), caption=caption)
            for number, caption in enumerate(self.captions)
        )

    def pack(self) -> None:
        """Pack the next shards, in order, as far as their samples are there. One process calls."""
        size = self.shard_size
        while size is not None and self._packed < len(self.captions):
            numbers = range(self._packed, min(self._packed + size, len(self.captions)))
            shard = self._shard(self._packed // size)
            if not shard.is_file():
                if not all(self.own(number).is_file() for number in numbers):
                    return
                write_tar(shard, self._members(numbers))
            for number in numbers:  # also those that a killed run packed and did not remove
                self.own(number).unlink(missing_ok=True)
            self._packed = numbers.stop

    def _members(self, numbers: range) -> Iterator[tuple[str, bytes]]:
        for number in numbers:
            path = self.own(number)
            yield path.name, path.read_bytes()
            record = {"caption": self.captions[number], "text_length": self.text_length}
            yield path.with_suffix(".json").name, json.dumps(record, ensure_ascii=False).encode()

    def _shard_of(self, number: int) -> Path | None:
        return self._shard(number // self.shard_size) if self.shard_size else None

    def _shard(self, index: int) -> Path:
        return self.folder / f"shard-{index:06d}.tar"

    def _name(self, number: int) -> str:
        shard, own = self._shard_of(number), self.own(number).name
        return own if shard is None else f"{shard.name}/{own}"
