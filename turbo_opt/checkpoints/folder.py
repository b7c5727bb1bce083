"""The weight files in a folder of one network, as diffusers lays them out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from turbo_opt.errors import BadInput
from turbo_opt.json_files import read_json

_SINGLE = "diffusion_pytorch_model.safetensors"
_INDEX = "diffusion_pytorch_model.safetensors.index.json"

Shard = tuple[Path, list[str] | None]
"""A file and those of its tensors that count; None: all of them."""


def holds_weights(folder: Path) -> bool:
    """Whether there are weights in `folder` under diffusers' file names."""
    return (folder / _SINGLE).is_file() or (folder / _INDEX).is_file()


def shards(folder: Path) -> Iterable[Shard]:
    """The weight files of a network.

    Raises:
        BadInput: there are none, the index is malformed, or a file that it names is missing.
    """
    if (folder / _SINGLE).is_file():
        yield folder / _SINGLE, None
        return
    if not (folder / _INDEX).is_file():
        raise BadInput(
            f"{folder}: holds neither {_SINGLE} nor {_INDEX} (weights must be safetensors)"
        )
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise BadInput(f"{folder / _INDEX}: has no weight_map")
    by_shard: dict[str, list[str]] = {}
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise BadInput(f"{folder / _INDEX}: shard {shard!r} points outside the folder")
        by_shard.setdefault(shard, []).append(key)
    for shard, keys in by_shard.items():
        if not (folder / shard).is_file():
            raise BadInput(f"{folder}: shard {shard} is missing ({len(keys)} weights are in it)")
        yield folder / shard, keys
