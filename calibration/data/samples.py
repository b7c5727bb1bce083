"""A set of samples: latents and text embeddings, in files or in tar shards, read one at a time.

    index.json            what every sample has, and the list of samples
    000000.safetensors    latents (C, F, H, W), prompt_embeds (T, text_dim)
    empty.safetensors     prompt_embeds of the empty prompt, for guidance

Sample files may lie in uncompressed tar files instead; the index then names `shard.tar` and the
member. Nothing is extracted, and nothing of a file is trusted: a sample of another shape, with a
value that is not finite or cut off is broken. Broken samples are skipped, up to a share.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from turbo_opt.errors import BadInput

INDEX = "index.json"
EMPTY_PROMPT = "empty.safetensors"
LATENTS, PROMPT_EMBEDS = "latents", "prompt_embeds"
LARGEST_SAMPLE = 2**31
_NAMED = 3
"""How many broken samples a message names."""
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


@dataclass
class SampleSet:
    """A folder of samples.

    Attributes:
        path: the folder.
        index: its index.json.
        broken: why a sample cannot be used, by its number in the index.
        broken_share: the share of broken samples that is put up with.
    """

    path: Path
    index: SampleIndex
    broken_share: float
    broken: dict[int, str] = field(default_factory=dict)
    _shards: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, broken_share: float = 0.0) -> SampleSet:
        """Read the index and look at every sample's size; contents are read when they are used.

        Raises:
            BadInput: there is no index, it is not one, or too many samples are missing.
        """
        samples = cls(path, _read_index(path), broken_share)
        for number in range(len(samples)):
            try:
                samples._place(samples.index.samples[number].file)
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
        record = self.index.samples[number]
        try:
            tensors = _parse(self._bytes(record.file))
            latents = _checked(tensors, LATENTS, self.index.latents)
            embeds = _checked(tensors, PROMPT_EMBEDS, (None, self.index.text_dim))
            return Sample(record.file, latents.float(), self._padded(embeds.float()))
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
            tensors = _parse((self.path / EMPTY_PROMPT).read_bytes())
            embeds = _checked(tensors, PROMPT_EMBEDS, (None, self.index.text_dim))
            return self._padded(embeds.float())
        except (OSError, BadInput) as error:
            raise BadInput(
                f"{self.path / EMPTY_PROMPT}: {error}; it holds the empty prompt's embeddings: "
                "make the set with turbo-opt calibrate data, or set data.unconditional_share to 0"
            ) from None

    def check_share(self) -> None:
        """Raise BadInput if more samples are broken than is put up with."""
        if len(self.broken) <= self.broken_share * len(self):
            return
        named = [f"{self.name(i)}: {why}" for i, why in list(self.broken.items())[:_NAMED]]
        raise BadInput(
            f"{self.path}: {len(self.broken)} of {len(self)} samples are broken, "
            f"data.broken_share allows {self.broken_share:.0%} ({'; '.join(named)})"
        )

    def _skip(self, number: int, reason: str) -> None:
        self.broken[number] = reason

    def _padded(self, embeds_TC: Tensor) -> Tensor:
        if len(embeds_TC) > self.index.text_length:
            raise BadInput(
                f"{PROMPT_EMBEDS} has {len(embeds_TC)} positions, the index allows "
                f"{self.index.text_length}"
            )
        return padded_positions(embeds_TC, self.index.text_length)

    def _bytes(self, file: str) -> bytes:
        path, start, size = self._place(file)
        with path.open("rb") as handle:
            handle.seek(start)
            content = handle.read(size)
        if len(content) != size:
            raise BadInput("is cut off")
        return content

    def _place(self, file: str) -> tuple[Path, int, int]:
        """(file on disk, first byte, number of bytes) of a sample."""
        parts = Path(file).parts
        if Path(file).is_absolute() or ".." in parts:
            raise BadInput("lies outside the folder")
        for depth, part in enumerate(parts[:-1], start=1):
            if part.endswith(".tar"):
                shard, member = "/".join(parts[:depth]), "/".join(parts[depth:])
                return self.path / shard, *self._member(shard, member)
        size = (self.path / file).stat().st_size
        if size > LARGEST_SAMPLE:
            raise BadInput(f"has {size} bytes, more than {LARGEST_SAMPLE}")
        return self.path / file, 0, size

    def _member(self, shard: str, member: str) -> tuple[int, int]:
        if shard not in self._shards:
            self._shards[shard] = _members(self.path / shard)
        if member not in self._shards[shard]:
            raise BadInput(f"{shard} has no member {member!r}")
        return self._shards[shard][member]


def write_sample(path: Path, latents_CFHW: Tensor | None, prompt_embeds_TC: Tensor) -> None:
    """Write one sample, or with no latents an empty prompt; trailing zero positions are left out.

    Latents are stored in float16: they are normalized, and noise is added to them.
    """
    tensors = {PROMPT_EMBEDS: used_positions(prompt_embeds_TC).to(torch.bfloat16).contiguous()}
    if latents_CFHW is not None:
        tensors[LATENTS] = latents_CFHW.half().contiguous()
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary)
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
    temporary = path / f"{INDEX}.partial"
    temporary.write_text(index.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(path / INDEX)


def _read_index(path: Path) -> SampleIndex:
    file = path / INDEX
    if not path.is_dir():
        raise BadInput(f"{path}: no such folder of samples; turbo-opt calibrate data makes one")
    if not file.is_file():
        raise BadInput(f"{path}: has no {INDEX}; turbo-opt calibrate data makes such a folder")
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


def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Name → (first byte, number of bytes) of the plain files in an uncompressed tar."""
    try:
        with tarfile.open(path, "r:") as archive:
            return {
                item.name: (item.offset_data, item.size)
                for item in archive
                if item.isreg() and not item.sparse and item.size <= LARGEST_SAMPLE
            }
    except tarfile.TarError as error:
        raise BadInput(f"{path.name} is not an uncompressed tar ({error})") from None


def _parse(content: bytes) -> dict[str, Tensor]:
    try:
        return load_safetensors(content)
    except (SafetensorError, ValueError) as error:
        raise BadInput(f"is no safetensors file ({error})") from None


def _checked(tensors: dict[str, Tensor], name: str, shape: Sequence[int | None]) -> Tensor:
    if name not in tensors:
        raise BadInput(f"has no {name!r}, only {', '.join(sorted(tensors)) or 'nothing'}")
    tensor = tensors[name]
    fits = tensor.ndim == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise BadInput(f"{name} has shape {_text(tensor.shape)}, the index says {_text(shape)}")
    if not tensor.is_floating_point():
        raise BadInput(f"{name} is {tensor.dtype}, must be floating point")
    if not tensor.isfinite().all():
        raise BadInput(f"{name} holds values that are not finite")
    return tensor


def _text(shape: Iterable[int | None]) -> str:
    return "×".join("any" if side is None else str(side) for side in shape)
