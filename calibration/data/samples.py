"""A set of samples: latents and text embeddings, in files or in tar shards, read one at a time.

    index.json            what every sample has, and the list of samples
    000000.safetensors    latents (C, F, H, W), prompt_embeds (T, text_dim)
    empty.safetensors     prompt_embeds of the empty prompt, for guidance

Sample files may lie in uncompressed tar files instead; the index then names `shard.tar` and the
member. A folder of tars without an index is read as shards of WebDataset (`shards.py`). Nothing is
extracted, and nothing of a file is trusted: a sample of another shape, with a value that is not
finite or cut off is broken. Broken samples are skipped, up to a share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from turbo_opt.artifact.staging import sync, write_synced
from turbo_opt.calibration.data.formats import (
    LATENTS,
    PROMPT_EMBEDS,
    checked,
    parse_safetensors,
)
from turbo_opt.calibration.data.listed import ListedFiles
from turbo_opt.calibration.data.shards import Shards
from turbo_opt.errors import BadInput

INDEX = "index.json"
EMPTY_PROMPT = "empty.safetensors"
MAKING = "making.json"
"""How a set is made, beside the samples from the first one on; the index is written last."""
_NAMED = 3
"""How many broken samples a message names."""
_TRIED = 100
"""How many samples are looked at for one that says what all are like."""
Side = Annotated[int, Field(ge=1)]


class SampleRecord(BaseModel):
    """One line of the index."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    file: str = Field(min_length=1, description="file in the folder, or `shard.tar/member`")
    caption: str = ""


class SampleIndex(BaseModel):
    """index.json: what holds for every sample, and the list of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: Literal[1]
    latents: tuple[Side, Side, Side, Side] = Field(strict=False, description="C, F, H, W")
    text_length: int = Field(ge=1, description="positions that embeddings are padded to")
    text_dim: int = Field(ge=1)
    source: dict[str, Any] = Field(default_factory=dict, description="where they came from")
    samples: tuple[SampleRecord, ...] = Field(strict=False)


@dataclass(frozen=True)
class Sample:
    """One clip.

    Attributes:
        name: its file.
        latents: (C, F, H, W) float32, normalized as the denoiser sees them.
        prompt_embeds: (text_length, text_dim) float32, zero beyond the prompt.
    """

    name: str
    latents: Tensor
    prompt_embeds: Tensor


class _Source(Protocol):
    """Where the contents of samples are; both raise BadInput or OSError for a broken one."""

    def check(self, number: int) -> None:
        """Look at what can be seen without reading it."""

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Read it."""


@dataclass
class SampleSet:
    """A folder of samples.

    Attributes:
        path: the folder.
        index: its index.json, or the like of it for shards without one.
        broken: why a sample cannot be used, by its number in the index.
        broken_share: the share of broken samples that is put up with.
        option: what the user calls that share.
    """

    path: Path
    index: SampleIndex
    broken_share: float
    _source: _Source
    broken: dict[int, str] = field(default_factory=dict)
    option: str = "data.broken_share"

    @classmethod
    def open(
        cls, path: Path, broken_share: float = 0.0, option: str = "data.broken_share"
    ) -> SampleSet:
        """Read the index and look at every sample's size; contents are read when they are used.

        Raises:
            BadInput: there is neither an index nor a shard, one is damaged, or too many samples are
                missing.
        """
        index, source = _open(path)
        samples = cls(path, index, broken_share, source, option=option)
        for number in range(len(samples)):
            try:
                source.check(number)
            except (OSError, BadInput) as error:
                samples._skip(number, str(error))
        samples.check_share()
        return samples

    def __len__(self) -> int:
        return len(self.index.samples)

    @property
    def intact(self) -> list[int]:
        """Numbers of the samples that are not known to be broken."""
        return [number for number in range(len(self)) if number not in self.broken]

    def name(self, number: int) -> str:
        """The file of a sample."""
        return self.index.samples[number].file

    def read(self, number: int) -> Sample | None:
        """A sample; None, and a note in `broken`, if it cannot be used.

        Raises:
            BadInput: this makes too many.
        """
        if number in self.broken:
            return None
        try:
            tensors = self._source.tensors(number)
            latents = checked(tensors, LATENTS, self.index.latents)
            embeds = checked(tensors, PROMPT_EMBEDS, (None, self.index.text_dim))
            return Sample(self.name(number), latents, self._padded(embeds))
        except (OSError, BadInput) as error:
            self._skip(number, str(error))
            self.check_share()
            return None

    def empty_prompt(self) -> Tensor:
        """Embeddings of the empty prompt, (text_length, text_dim) float32.

        Raises:
            BadInput: the file is missing or broken.
        """
        try:
            tensors = parse_safetensors((self.path / EMPTY_PROMPT).read_bytes())
            embeds = checked(tensors, PROMPT_EMBEDS, (None, self.index.text_dim))
            return self._padded(embeds)
        except (OSError, BadInput) as error:
            raise BadInput(
                f"{self.path / EMPTY_PROMPT}: {error}; it holds the empty prompt's embeddings: "
                "make the set with turbo-opt calibrate data, or set data.unconditional_share to 0"
            ) from None

    def check_share(self) -> None:
        """Raise BadInput if more samples are broken than is put up with."""
        if len(self.broken) <= self.broken_share * len(self):
            return
        first = self.some_broken(sorted(self.broken))
        raise BadInput(
            f"{self.path}: at least {len(self.broken)} of {len(self)} samples are broken, "
            f"{self.option} allows {self.broken_share:.0%} ({first})"
        )

    def skip_others(self, numbers: Iterable[int]) -> None:
        """Leave out samples that other processes could not use.

        Raises:
            BadInput: this makes too many.
        """
        for number in numbers:
            self.broken.setdefault(number, "another process could not use it")
        self.check_share()

    def some_broken(self, numbers: Iterable[int]) -> str:
        """The first of these samples that are broken, and why."""
        found = [number for number in numbers if number in self.broken][:_NAMED]
        return "; ".join(f"{self.name(number)}: {self.broken[number]}" for number in found)

    def _skip(self, number: int, reason: str) -> None:
        self.broken[number] = reason

    def _padded(self, embeds_TC: Tensor) -> Tensor:
        if len(embeds_TC) > self.index.text_length:
            raise BadInput(
                f"{PROMPT_EMBEDS} has {len(embeds_TC)} positions, the set's text_length is "
                f"{self.index.text_length}"
            )
        return padded_positions(embeds_TC, self.index.text_length)


def write_sample(path: Path, latents_CFHW: Tensor | None, prompt_embeds_TC: Tensor) -> None:
    """Write one sample, or with no latents an empty prompt; trailing zero positions are left out.

    Latents are stored in float16: they are normalized, and noise is added to them.
    """
    tensors = {PROMPT_EMBEDS: used_positions(prompt_embeds_TC).to(torch.bfloat16).contiguous()}
    if latents_CFHW is not None:
        tensors[LATENTS] = latents_CFHW.half().contiguous()
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary)
    sync(temporary)  # one that a crash emptied would be taken for a sample
    temporary.replace(path)


def used_positions(prompt_embeds_TC: Tensor) -> Tensor:
    """The embeddings up to the last position that is not zero, at least one."""
    rows = prompt_embeds_TC.ne(0).any(1).nonzero()
    return prompt_embeds_TC[: int(rows.max()) + 1 if len(rows) else 1]


def padded_positions(prompt_embeds_TC: Tensor, text_length: int) -> Tensor:
    """The embeddings with zero positions up to `text_length`."""
    return torch.nn.functional.pad(prompt_embeds_TC, (0, 0, 0, text_length - len(prompt_embeds_TC)))


def write_index(path: Path, index: SampleIndex) -> None:
    """Write index.json, last of all: a folder without one is not a set."""
    sync(path)
    temporary = path / f"{INDEX}.partial"
    write_synced(temporary, (index.model_dump_json(indent=1) + "\n").encode())
    temporary.replace(path / INDEX)
    sync(path)


def _open(path: Path) -> tuple[SampleIndex, _Source]:
    """What a folder holds, by its index or by the headers of its shards, and where."""
    if not path.is_dir():
        raise BadInput(f"{path}: no such folder of samples; turbo-opt calibrate data makes one")
    if (path / INDEX).is_file():
        index = _read_index(path / INDEX)
        return index, ListedFiles(path, [record.file for record in index.samples])
    if (path / MAKING).is_file():
        raise BadInput(
            f"{path}: has no {INDEX} yet: turbo-opt calibrate data was stopped; the same command "
            "goes on"
        )
    try:
        shards = Shards.open(path)
    except OSError as error:
        raise BadInput(f"{path}: its shards cannot be read ({error})") from None
    return _index_of(shards), shards


def _index_of(shards: Shards) -> SampleIndex:
    """The index of a folder that has none: all samples must be like the first that can be used."""
    faults: list[str] = []
    for number in range(min(len(shards), _TRIED)):
        try:
            tensors = shards.tensors(number)
            latents = checked(tensors, LATENTS, (None,) * 4)
            embeds = checked(tensors, PROMPT_EMBEDS, (None, None))
            if not latents.numel() or not embeds.numel():
                raise BadInput(f"its {LATENTS} or {PROMPT_EMBEDS} are empty")
        except (OSError, BadInput) as error:
            faults.append(f"{shards.name(number)}: {error}")
            continue
        channels, frames, height, width = latents.shape
        return SampleIndex(
            format=1,
            latents=(channels, frames, height, width),
            text_length=shards.samples[number][1].text_length or len(embeds),
            text_dim=embeds.shape[1],
            samples=tuple(
                SampleRecord(file=shards.name(i), caption=sample.caption)
                for i, (_, sample) in enumerate(shards.samples)
            ),
        )
    tried = f"{'first ' if len(faults) < len(shards) else ''}{len(faults)} samples"
    raise BadInput(f"{shards.folder}: none of its {tried} can be used ({faults[0]})")


def _read_index(file: Path) -> SampleIndex:
    try:
        index = SampleIndex.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise BadInput(f"{file}: not an index of samples ({reason})") from None
    if not index.samples:
        raise BadInput(f"{file}: lists no samples")
    return index
