"""Where the weights that a pass names are: an entry of the recipe, the package, a path, or the hub.

A source stands for one network, or, as a diffusers pipeline folder, for one of each name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from turbo_opt.checkpoints.folder import Shard, holds_weights, shards
from turbo_opt.embedded import embedded
from turbo_opt.errors import BadInput, nearest, unknown
from turbo_opt.ir.torch_files import SUFFIXES

FILE_SUFFIXES = (".safetensors", *SUFFIXES)
WeightsRef = str | dict[str, str]
"""A source for all denoisers, or denoiser → source."""
ADAPTER_CONFIG = "adapter_config.json"
"""What PEFT says of an adapter, beside it."""
_NETWORKS = ("transformer", "transformer_2")
STUDENT_NOTE = "distillation.json"
"""What the weights in a folder say of themselves, beside them."""
_DCP_METADATA, _DCP_DATA = ".metadata", "*.distcp"
_HUB_FOLDERS = ["transformer/*", "transformer_2/*", "*.json"]


class WeightsNotGiven(BadInput):
    """A pass names weights that the recipe does not have."""


def locate(
    ref: WeightsRef,
    denoisers: Sequence[str],
    checkpoints: Mapping[str, str],
    every_network: bool = True,
) -> dict[str, Path]:
    """Denoiser → folder or file with the weights of that network. Reads nothing.

    Args:
        ref: what the pass was given: names in `checkpoints`, paths or hub ids.
        denoisers: the networks of the program.
        checkpoints: the recipe's `weights`: name → path or hub id.
        every_network: a source stands for one network, and none may be left out; else one file may
            be that of all networks, and `ref` may name some of them.

    Raises:
        BadInput: nothing is there, or it is not said which weights are which network's.
    """
    if isinstance(ref, str):
        place = _find(ref, checkpoints)
        if not every_network and not any((place / name).is_dir() for name in _NETWORKS):
            return dict.fromkeys(denoisers, place)
        return {name: _of_network(place, name, denoisers, ref) for name in denoisers}
    for name in ref:
        if name not in denoisers:
            raise BadInput(unknown("denoiser", name, denoisers))
    missing = [name for name in denoisers if name not in ref]
    if missing and every_network:
        raise BadInput(f"no weights are named for {', '.join(missing)}, which the model has too")
    found = {name: _find(source, checkpoints) for name, source in ref.items()}
    return {
        name: place / name if (place / name).is_dir() else place for name, place in found.items()
    }


def places_of(ref: WeightsRef, checkpoints: Mapping[str, str]) -> list[Path]:
    """Every network's folder or file in what a pass was given, whatever the program has.

    Raises:
        BadInput: nothing is there.
    """
    found = []
    for source in [ref] if isinstance(ref, str) else ref.values():
        place = _find(source, checkpoints)
        found += [place / name for name in _NETWORKS if (place / name).is_dir()] or [place]
    return found


def files_in(place: Path) -> list[Shard]:
    """The weight files of one network: a file itself, diffusers' in a folder, or its only one.

    Raises:
        BadInput: there are none, or several that no index ties together, or they are in a DCP
            folder, which is for `turbo_opt.calibration` to read, finished or not.
    """
    if place.is_file():
        if not place.name.endswith(FILE_SUFFIXES):
            raise BadInput(
                f"{place}: not a file of weights; those end in {', '.join(FILE_SUFFIXES)}"
            )
        return [(place, None)]
    if holds_weights(place):
        return list(shards(place))
    found = sorted(path for path in place.iterdir() if path.name.endswith(FILE_SUFFIXES))
    if not found and (place / _DCP_METADATA).is_file():
        raise BadInput(
            f"{place}: is a DCP checkpoint, as trainings write them; `turbo-opt calibrate convert "
            f"{place} OUT.safetensors` makes of it the file to name here"
        )
    if not found and any(place.glob(_DCP_DATA)):
        raise BadInput(
            f"{place}: is an unfinished DCP checkpoint: it has data but no {_DCP_METADATA}, so its "
            "writing was cut off; take an earlier one (of a training job, the file `latest` in "
            "`checkpoints` names the newest whole one)"
        )
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5])
        raise BadInput(
            f"{place}: holds {f'several files of weights ({names})' if found else 'no weights'}; "
            "name one file, or a folder as diffusers writes it"
        )
    return [(found[0], None)]


def student_notes(place: Path) -> list[Path]:
    """JSON files that may say of the weights in `place` that they are distilled."""
    beside = [place / STUDENT_NOTE] if place.is_dir() else [place.with_suffix(".json")]
    if place.name in _NETWORKS:
        beside.append(place.parent / STUDENT_NOTE)
    return [path for path in beside if path.is_file()]


def adapter_config(place: Path) -> Path | None:
    """PEFT's description of the LoRA in `place`, where it is one of PEFT's files."""
    (file, _), *_ = files_in(place)
    config = file.parent / ADAPTER_CONFIG
    return config if file.stem == "adapter_model" and config.is_file() else None


def _of_network(place: Path, name: str, denoisers: Sequence[str], ref: str) -> Path:
    if (place / name).is_dir():
        for other in _NETWORKS:
            if other not in denoisers and (place / other).is_dir():
                raise BadInput(f"{ref}: has a second expert, {other}, which the model has not")
        return place / name
    if len(denoisers) > 1:
        example = " ".join(f"{item}=…" for item in denoisers)
        raise BadInput(
            f"{ref}: holds one network, the model has {len(denoisers)}; say which is which, like "
            f"{{{example}}}"
        )
    return place


def _find(source: str, checkpoints: Mapping[str, str]) -> Path:
    place = checkpoints.get(source, source)
    inside = embedded(place)
    if inside is not None:
        return inside
    # Not resolved: files of the hub's cache are links, and only the link's name tells the format.
    path = Path(place).expanduser().absolute()
    if path.exists():
        return path
    parts = place.split("/")
    plain = not place.startswith((".", "/", "~")) and all(parts)
    if plain and len(parts) == 2 and not place.endswith(FILE_SUFFIXES):
        return _from_hub(place, lambda local: _folder(place, local))
    if plain and len(parts) > 2 and place.endswith(FILE_SUFFIXES):
        return _from_hub(place, lambda local: _file(parts, local))
    if source in checkpoints:
        raise BadInput(f"no weights {source!r} ({place}): no such file or folder, nor a hub id")
    named = f"({', '.join(sorted(checkpoints)) or 'it has none'})"
    guess = nearest(source, checkpoints)
    message = (
        f"no weights {source!r}: neither a name in the recipe's `weights` {named}, nor a file or "
        f"folder, nor a hub id{guess}"
    )
    if guess or not source.isidentifier():
        raise BadInput(message)
    raise WeightsNotGiven(f"{message}; `--set weights.{source}=…` gives them")


def _from_hub(source: str, fetch: Callable[[bool], str]) -> Path:
    """What `fetch(local_only)` gives: from the cache, else downloaded where that is allowed."""
    try:
        return Path(fetch(True))
    except Exception as error:
        if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
            raise BadInput(
                f"{source}: no such file or folder, nor in the local hub cache, and HF_HUB_OFFLINE "
                "is set"
            ) from error
    try:
        return Path(fetch(False))
    except Exception as error:
        raise BadInput(
            f"{source}: no such file or folder, and the hub could not give it "
            f"({type(error).__name__})"
        ) from error


def _folder(repo: str, local_only: bool) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repo, allow_patterns=_HUB_FOLDERS, local_files_only=local_only)


def _file(parts: Sequence[str], local_only: bool) -> str:
    from huggingface_hub import hf_hub_download

    repo, name = "/".join(parts[:2]), "/".join(parts[2:])
    return hf_hub_download(repo, name, local_files_only=local_only)
