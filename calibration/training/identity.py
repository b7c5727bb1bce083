"""What a checkpoint is of: the job, and the weights of the models that it imitates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from turbo_opt.artifact.shards import tensor_bytes
from turbo_opt.calibration.jobs.schema import Job
from turbo_opt.checkpoints.places import files_in
from turbo_opt.errors import BadInput
from turbo_opt.ir.files import SafetensorsFile, dtype_code
from turbo_opt.ir.tensor_files import TensorFile, open_tensor_file

_SAME_SECTIONS = ("job", "teacher", "noise", "sla", "student", "rcm", "router", "companions")
_SAME_KEYS = {
    "training": ("batch", "seed", "draws", "average", "compute_dtype"),
    "data": ("held_out", "unconditional_share"),
}
WEIGHTS = "weights"


def identity_of(job: Job, samples: int, imitated: Mapping[str, Path]) -> dict[str, Any]:
    """What a checkpoint must have in common with the job that takes it over, as JSON data.

    Args:
        samples: how many the set has.
        imitated: folders or files of the networks that are learned from, such as the teacher's,
            by what the job calls them.
    """
    said = job.canonical()
    identity = {key: said[key] for key in _SAME_SECTIONS if key in said}
    for section, keys in _SAME_KEYS.items():
        identity[section] = {key: said[section][key] for key in keys}
    identity["data"]["samples"] = samples
    identity[WEIGHTS] = {name: weights_identity(place) for name, place in imitated.items()}
    return identity


def weights_identity(place: Path) -> str:
    """A digest that stands for the weights of one network, wherever and whenever they were written.

    Raises:
        BadInput: there are none.
    """
    files = [_content(open_tensor_file(str(path))) for path, _ in files_in(place)]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def _content(file: TensorFile) -> str:
    """A digest that stands for the tensors of a file: their names, shapes, dtypes and some values,
    of a PyTorch file the first row of each."""
    if isinstance(file, SafetensorsFile):
        return file.content
    hasher = hashlib.sha256()
    for key in sorted(file.keys()):
        shape, dtype = file.describe(key)
        hasher.update(json.dumps([key, list(shape), dtype_code(dtype)]).encode())
        nothing = torch.empty(0, dtype=torch.uint8)  # the file is mapped
        row = file.read_rows(key, 0, 1, nothing) if shape else file.read(key)
        hasher.update(tensor_bytes(row))
    return hasher.hexdigest()


def check_same_job(path: Path, theirs: Any, ours: Mapping[str, Any]) -> None:
    """Raise BadInput, naming what differs, unless a checkpoint is of this job.

    Args:
        path: the checkpoint.
        theirs: its identity.
        ours: that of the job.
    """
    if not isinstance(theirs, dict):
        raise BadInput(f"{path}: does not say what job it is of")
    different = [
        f"{f'{section}.{key}' if key else section}: {then.get(key)!r} then, {now.get(key)!r} now"
        for section in dict.fromkeys([*ours, *theirs])
        if section != WEIGHTS
        for then, now in [(_mapping(theirs.get(section)), _mapping(ours.get(section)))]
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if different:
        raise BadInput(
            f"{path}: is a checkpoint of another job ({'; '.join(different)}); give this job a "
            "folder of its own"
        )
    # Checkpoints did not always say whose weights they have learned from.
    then, now = (_mapping(each.get(WEIGHTS)) for each in (theirs, ours))
    changed = [name for name, digest in now.items() if then.get(name, digest) != digest]
    if changed:
        raise BadInput(
            f"{path}: has learned from other weights than are there now of {', '.join(changed)}; "
            "put those back, or give this job a folder of its own"
        )


def _mapping(value: Any) -> dict[str, Any]:
    """A section's keys; one that is absent or empty has none."""
    if isinstance(value, dict):
        return value
    return {"": value} if value else {}
