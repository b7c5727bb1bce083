"""The weights of one network from any layout, lazily, under diffusers' names.

Layouts: diffusers' own; the original Wan's, as in its repository, in ComfyUI's single files, and in
TurboDiffusion's and rCM's `.pth`, where the patch embedding is a linear layer; training dumps. Of
the single files also those in 8 bits (`quantized`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from turbo_opt.checkpoints.names import diffusers_name, is_training_counter, without_prefix
from turbo_opt.checkpoints.places import adapter_config, files_in, student_notes
from turbo_opt.checkpoints.quantized import unquantized
from turbo_opt.errors import BadInput
from turbo_opt.ir.tensor_files import open_tensor_file
from turbo_opt.ir.transforms import reshaped
from turbo_opt.ir.weights import LazyTensor, from_file

_PATCH_EMBEDDINGS = ("patch_embedding.weight", "vace_patch_embedding.weight")
_SHOWN = 5


@dataclass(frozen=True)
class NetworkWeights:
    """What a source holds for one network.

    Attributes:
        place: the file or folder.
        tensors: a lazy tensor for every weight, under diffusers' names where it has one.
        metadata: what the files say of themselves, text by name.
    """

    place: Path
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str]


def read_network(place: Path) -> NetworkWeights:
    """The weights in a file or folder; names and shapes are read, no numbers.

    Counters of a training that lie among the weights are left out. Weights in 8 bits are given as
    the numbers that they stand for, float32.

    Raises:
        BadInput: the files are damaged, hold two names of one weight, or hold weights that are
            quantized in a form unknown here.
    """
    metadata: dict[str, str] = {}
    stored: dict[str, LazyTensor] = {}
    written_as: dict[str, str] = {}
    for key, tensor in stored_tensors(place, metadata):
        name = without_prefix(key)
        if not is_training_counter(name):
            _check_new(place, name, key, written_as)
            stored[name] = tensor
    tensors: dict[str, LazyTensor] = {}
    written_here: dict[str, str] = {}
    for name, tensor in unquantized(place, stored).items():
        ours = diffusers_name(name)
        _check_new(place, ours, written_as.get(name, name), written_here)
        tensors[ours] = tensor
    return NetworkWeights(place, tensors, metadata)


def _check_new(place: Path, name: str, key: str, written_as: dict[str, str]) -> None:
    """Note that weight `name` is written as `key`; BadInput where it is already."""
    if name in written_as:
        raise BadInput(f"{place}: {written_as[name]!r} and {key!r} are both the weight {name!r}")
    written_as[name] = key


def stored_tensors(place: Path, metadata: dict[str, str]) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor in a file or folder, lazily, by the name that it is stored under.

    Args:
        metadata: is given what the files say of themselves.
    """
    for path, keys in files_in(place):
        file = open_tensor_file(str(path))
        metadata.update(file.metadata)
        for key in keys if keys is not None else file.keys():
            yield key, from_file(str(path), key)


def identities(places: Iterable[Path]) -> list[str]:
    """Digests that stand for all weight files in `places`, and for what is said beside them."""
    found = []
    for place in places:
        found += [open_tensor_file(str(path)).identity for path, _ in files_in(place)]
        notes = (*student_notes(place), adapter_config(place))
        found += [hashlib.sha256(path.read_bytes()).hexdigest() for path in notes if path]
    return found


def fitted(name: str, tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor | None:
    """`tensor` in the shape that the graph reads weight `name` in; None where it cannot be.

    A patch embedding that is stored as a linear layer (dim, channels·patch) is that of the
    convolution (dim, channels, frames, rows, columns), flattened.
    """
    if tensor.shape == shape:
        return tensor
    if name in _PATCH_EMBEDDINGS and len(tensor.shape) == 2:
        try:
            return reshaped(tensor, shape)
        except ValueError:
            return None
    return None


def listed(names: Iterable[str]) -> str:
    """The first names of many, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
