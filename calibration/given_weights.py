"""Weights that a job names for a network of its teacher's architecture.

student.start, companions[].source   a diffusers pipeline: config and weights are its own
                                     any layout of `turbo_opt.checkpoints`: the weights alone,
                                     with the teacher's config
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from turbo_opt.calibration.networks import (
    DenoiserFolder,
    check_same_architecture,
    open_denoiser,
    without_weights,
)
from turbo_opt.checkpoints.names import is_kept_aside
from turbo_opt.checkpoints.places import FILE_SUFFIXES, locate
from turbo_opt.checkpoints.reader import fitted, listed, read_network
from turbo_opt.embedded import embedded
from turbo_opt.errors import BadInput
from turbo_opt.json_files import read_json

_INDEX, _CONFIG = "model_index.json", "config.json"


def open_alike(key: str, source: str, teacher: DenoiserFolder, base: Path) -> DenoiserFolder:
    """The network of the teacher's name and architecture with the weights in `source`. Reads names
    and shapes, no weights.

    Args:
        key: what the job calls `source`.
        source: a name of what lies in the package, a path, or a hub id.
        base: what a relative path starts from.

    Raises:
        BadInput: nothing is there, it is of another architecture, or weights are missing, unknown
            or of other shapes.
    """
    inside = embedded(source)
    place = inside or base / Path(source).expanduser()
    if place.exists():
        source = str(place)
    elif not _may_be_on_hub(source):
        raise BadInput(
            f"{key}: {place}: no such folder or file; it is a diffusers folder, a file of weights "
            f"({', '.join(FILE_SUFFIXES)}), a hub id, or a name such as tiny-wan-rcm"
        )
    if (place / _INDEX).is_file() or not (place.exists() or source.endswith(FILE_SUFFIXES)):
        found = open_denoiser(source, teacher.name)
        check_same_architecture(teacher, found)
        return found
    found = replace(
        teacher, weights=locate({teacher.name: source}, [teacher.name], {})[teacher.name]
    )
    _check_config(found, teacher)
    _check_weights(key, found)
    return found


def _may_be_on_hub(source: str) -> bool:
    """Whether `source` reads like a repository, or a file in one."""
    parts = source.split("/")
    if source.startswith((".", "/", "~")) or not all(parts):
        return False
    return len(parts) > 2 if source.endswith(FILE_SUFFIXES) else len(parts) == 2


def _check_config(found: DenoiserFolder, teacher: DenoiserFolder) -> None:
    """Raise BadInput if a config.json lies beside the weights and is not like the teacher's."""
    file = found.path / _CONFIG
    if file.is_file():
        config = read_json(file)
        class_name = str(config.get("_class_name", teacher.class_name))
        check_same_architecture(teacher, replace(found, class_name=class_name, config=config))


def _check_weights(key: str, found: DenoiserFolder) -> None:
    network, _ = without_weights(found)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    stored = read_network(found.path).tensors
    missing = [name for name in shapes if name not in stored]
    unknown = [name for name in stored if name not in shapes and not is_kept_aside(name)]
    wrong = [
        f"{name} {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in stored and fitted(name, stored[name], shape) is None
    ]
    faults = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (
            ("weights are missing", missing),
            ("are not the model's", unknown),
            ("are of other shapes", wrong),
        )
        if names
    ]
    if faults:
        raise BadInput(
            f"{key}: {found.path} does not hold the weights of the teacher's {found.name}: "
            + "; ".join(faults)
        )
