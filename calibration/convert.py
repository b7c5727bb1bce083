"""Weights from one layout into another: DCP folders, safetensors, and `.pth` of the original Wan.

read    a DCP folder (a checkpoint of a training of ours, or of another program), or anything
        that turbo_opt.checkpoints reads
write   FILE.safetensors  diffusers' names
        FILE.pth          the original Wan's names, the patch embedding as a linear layer, as
                          TurboDiffusion and rCM read them; in 16 or 32 bits, or the blocks' layers
                          in int8, as TurboDiffusion's `-quant.pth`
        FOLDER.dcp        DCP, diffusers' names

A safetensors file is written piece by piece where the source is files too; else memory holds the
weights as they are written.

What the weights say of themselves, such as that they are a distilled student and by which noise
level it is sampled, goes with them: into the metadata of a safetensors file; beside a `.pth`, which
has no place for it that is safe to read, into FILE.json; into distillation.json in a DCP folder. Of
a training's checkpoint the job tells it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from turbo_opt.artifact.shard_writer import write_shard
from turbo_opt.artifact.shards import plan_file
from turbo_opt.artifact.staging import sync, write_synced
from turbo_opt.calibration.data.samples import EMPTY_PROMPT, INDEX, LATENTS
from turbo_opt.calibration.dcp_weights import STUDENT, no_weights, read_weights_in, weights_in
from turbo_opt.calibration.places import Say, unheard
from turbo_opt.calibration.training.checkpoints import RECORD, read_record
from turbo_opt.calibration.training.dcp import METADATA
from turbo_opt.checkpoints.names import is_kept_aside, is_weight, original_name
from turbo_opt.checkpoints.places import STUDENT_NOTE
from turbo_opt.checkpoints.quantized import in_int8_blocks
from turbo_opt.checkpoints.reader import read_network
from turbo_opt.checkpoints.student import METHOD, Record, first_declaration, notes_beside
from turbo_opt.errors import BadInput
from turbo_opt.ir.transforms import reshaped
from turbo_opt.ir.weights import LazyTensor, WeightStore, cast, constant

_DISTILLS = "rcm"
"""The job whose student is sampled in few steps, and its section."""
_DENOISERS = ("transformer", "transformer_2")
_PATCH_EMBEDDING = "patch_embedding.weight"
_PATCH = (1, 2, 2)
"""Frames, rows and columns of a patch, in every Wan."""
WRITTEN = (".safetensors", ".pth", ".dcp")
_HOLD_WEIGHTS = (
    "weights are in the `model` folder and the checkpoints of a job, in a diffusers folder, or in "
    "a .safetensors or .pth file"
)


def convert(
    source: Path,
    out: Path,
    network: str | None = None,
    average: bool = True,
    int8: bool = False,
    dtype: torch.dtype | None = None,
    say: Say = unheard,
) -> int:
    """Write the weights of `source` as `out`, by its suffix; returns how many of them.

    Args:
        network: which of a DCP folder's networks; None: the student of a checkpoint of ours, the
            only one in another program's.
        average: of a training checkpoint, its moving average where it has one.
        int8: the linear layers of the blocks in 128×128 blocks of int8, in a `.pth`.
        dtype: of the weights but those of sparse attention, which become float32, as in the result
            of a job; None: as they are stored.
        say: told how much of a DCP folder is left out.

    Raises:
        BadInput: it cannot be read, has no weight of Wan, or names that the other layout has no
            word for, what it says of itself is malformed, `out` is there already, or `int8` is
            asked of another layout or of weights in int8 blocks.
    """
    check_destination(out, int8)
    if int8:
        _check_not_in_blocks(source)
    weights = _lazy_weights(source, network, average, dtype, say)
    said = _said(source, network)
    partial = out.with_name(f".{out.name}.partial")
    if out.suffix == ".dcp":
        shutil.rmtree(partial, ignore_errors=True)
        values = {name: lazy.load() for name, lazy in weights.items()}
        dcp.save(dict(values), storage_writer=FileSystemWriter(partial), no_dist=True)
        _write_note(partial / STUDENT_NOTE, said)
    elif out.suffix == ".pth":
        original = as_original({name: lazy.load() for name, lazy in weights.items()})
        torch.save(in_int8_blocks(original) if int8 else original, partial)
        # First: without it the file would be taken for what it is not.
        _write_note(_note_of(out), said)
    else:
        write_shard(plan_file(out.name, WeightStore(weights), said), partial, lambda count: None)
    if partial.is_file():  # the folder's files are on disk
        sync(partial)
    os.rename(partial, out)
    sync(out.parent)
    return len(weights)


def check_destination(out: Path, int8: bool = False) -> None:
    """Raise BadInput unless `out` is of a kind that is written, in int8 too if asked, and free."""
    if out.suffix not in WRITTEN:
        raise BadInput(f"{out}: cannot write {out.suffix or 'no suffix'!r}; use {_listed()}")
    if int8 and out.suffix != ".pth":
        raise BadInput(f"{out}: int8 blocks have a layout as .pth only; use {out.stem}.pth")
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists already")
    if out.suffix == ".pth" and os.path.lexists(_note_of(out)):
        raise BadInput(
            f"{_note_of(out)}: exists already, and would count as what {out.name} says of itself; "
            "move it, or choose another name"
        )


def read_weights(
    source: Path,
    network: str | None = None,
    average: bool = True,
    dtype: torch.dtype | None = None,
    say: Say = unheard,
) -> dict[str, Tensor]:
    """The weights of one network under diffusers' names, on the CPU; see `convert`.

    Raises:
        BadInput: it cannot be read, holds samples or no weight of Wan, or two of its tensors have
            one name.
    """
    weights = _lazy_weights(source, network, average, dtype, say)
    return {name: lazy.load() for name, lazy in weights.items()}


def _lazy_weights(
    source: Path, network: str | None, average: bool, dtype: torch.dtype | None, say: Say
) -> dict[str, LazyTensor]:
    """As `read_weights`; what files hold is not read yet."""
    if any((source / name).is_file() for name in (INDEX, EMPTY_PROMPT)):
        raise BadInput(f"{source}: is a set of samples to learn from; {_HOLD_WEIGHTS}")
    if (source / METADATA).is_file():
        keys = weights_in(source, network, average, say)
        found = {
            name: constant(value.to(_written_in(name, value.dtype, dtype)))
            for name, value in read_weights_in(source, keys)
        }
        return {name: _as_convolution(source, name, found[name]) for name in keys}
    if network is not None:
        raise BadInput(f"{source}: is no DCP folder, so it holds one network; leave --network out")
    tensors = read_network(_network_in(source)).tensors
    if LATENTS in tensors:
        raise BadInput(f"{source}: is a sample, with the latents of a clip; {_HOLD_WEIGHTS}")
    if not any(is_weight(name) for name in tensors):
        raise no_weights(source, list(tensors))
    return {
        name: _as_convolution(source, name, cast(lazy, _written_in(name, lazy.dtype, dtype)))
        for name, lazy in tensors.items()
    }


def _written_in(name: str, stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The dtype that a weight is written in."""
    if asked is None or not stored.is_floating_point:
        return stored
    # Operators read the weights that only passes know in float32.
    return torch.float32 if is_kept_aside(name) else asked


def as_original(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the original Wan's names, as TurboDiffusion's `.pth` files have them.

    Raises:
        BadInput: a weight has no name there.
    """
    found = {}
    for name, value in values.items():
        original = original_name(name)
        if original is None:
            raise BadInput(f"{name}: the original Wan has no such weight")
        if name == _PATCH_EMBEDDING:
            value = value.flatten(1)
        found[original] = value.contiguous()
    return found


def _said(source: Path, network: str | None) -> dict[str, str]:
    """What `source` says of the weights of one network, text by name.

    Raises:
        BadInput: it is malformed.
    """
    if (source / METADATA).is_file():
        place, metadata = source, {}
        records = _said_by_job(source, network)
    else:
        place = _network_in(source)
        metadata = dict(read_network(place).metadata)
        metadata.pop("format", None)
        records = [(place, metadata)]
    found = first_declaration([*records, *notes_beside(place)])
    return metadata | found[1].as_metadata() if found else metadata


def _said_by_job(checkpoint: Path, network: str | None) -> list[Record]:
    """What the job of a checkpoint says that `network` is; nothing where none of ours wrote it."""
    if network not in (None, STUDENT) or not (checkpoint / RECORD).is_file():
        return []
    identity = read_record(checkpoint).get("identity")
    if not isinstance(identity, dict) or identity.get("job") != _DISTILLS:
        return []
    settings = identity.get(_DISTILLS)
    sigma_max = settings.get("sigma_max") if isinstance(settings, dict) else None
    return [(checkpoint / RECORD, {"distillation": METHOD, "sigma_max": sigma_max})]


def _check_not_in_blocks(source: Path) -> None:
    """Raise BadInput if weights are in int8 blocks already: new ones would have other scales."""
    if (source / METADATA).is_file():
        return
    for name, lazy in read_network(_network_in(source)).tensors.items():
        if lazy.op == "block-dequantize":
            raise BadInput(
                f"{source}: {name!r} is in int8 blocks already and would be rounded a second time; "
                "take the file as it is, or the weights that it was made of"
            )


def _network_in(source: Path) -> Path:
    """The denoiser's folder where `source` is a pipeline's, else `source`.

    Raises:
        BadInput: the pipeline has two.
    """
    found = [source / name for name in _DENOISERS if (source / name).is_dir()]
    if len(found) > 1:
        raise BadInput(f"{source}: has two denoisers; convert {found[0]} or {found[1]}")
    return found[0] if found else source


def _note_of(file: Path) -> Path:
    """Where a file without metadata has what it says of itself."""
    return file.with_suffix(".json")


def _write_note(path: Path, said: Mapping[str, str]) -> None:
    if said:
        write_synced(path, json.dumps(said, indent=1).encode())


def _as_convolution(source: Path, name: str, weight: LazyTensor) -> LazyTensor:
    """A patch embedding stored as a linear layer in the shape that diffusers has it."""
    if name != _PATCH_EMBEDDING or len(weight.shape) != 2:
        return weight
    width, inputs = weight.shape
    patch = math.prod(_PATCH)
    if inputs % patch:
        raise BadInput(f"{source}: {name} has {inputs} inputs, which are no patches of {patch}")
    return reshaped(weight, (width, inputs // patch, *_PATCH))


def _listed() -> str:
    return f"{', '.join(WRITTEN[:-1])} or {WRITTEN[-1]}"
