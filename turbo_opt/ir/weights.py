"""Weights as data: names mapped to tensors that are computed only when asked for.

A weight is an expression: tensors in files, and the transforms that passes have recorded on them.
Shape, dtype and digest are known at once; bytes are read one tensor at a time, when the weight is
saved or checked, so a 28 GB model is rewritten in a few GB of memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from turbo_opt.ir.disk import new_pages, pages_for
from turbo_opt.ir.tensor_files import open_tensor_file

Attrs = Mapping[str, Any]
"""Arguments of a transform: JSON values only, so that an expression can be written down."""


@dataclass(frozen=True)
class Transform:
    """A named function on tensors that passes may record in weight expressions.

    `infer` gives the (shape, dtype) of every output from the inputs' shapes and dtypes; `compute`
    gives the tensors. Both take the transform's attributes as keywords.

    Attributes:
        rows: `compute` may be given any whole number of groups of so many leading rows of its
            inputs (the last group may be ragged), and gives those rows' part of every output. None:
            it needs all rows.
        by_rows: how many of the inputs, from the first, have those rows; the others are given
            whole. None: all of them.
        concatenates: the output is the inputs, one below the other.
    """

    name: str
    infer: Callable[..., Sequence[tuple[tuple[int, ...], torch.dtype]]]
    compute: Callable[..., Sequence[Tensor]]
    rows: int | None = None
    by_rows: int | None = None
    concatenates: bool = False


_TRANSFORMS: dict[str, Transform] = {}


def register_transform(transform: Transform) -> Transform:
    """Make `transform` usable in weight expressions under its name."""
    _TRANSFORMS[transform.name] = transform
    return transform


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """One output of a weight expression: shape and dtype now, data on `load`.

    Attributes:
        op: `file`, `constant`, or the name of a registered transform.
        attrs: the op's arguments, JSON values only.
        inputs: the expressions it is computed from.
        output: which of the op's outputs this is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    op: str
    attrs: Attrs = field(default_factory=dict)
    inputs: tuple[LazyTensor, ...] = ()
    output: int = 0
    value: Tensor | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes once computed."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the whole expression, file identities included."""
        hasher = hashlib.sha256()
        attrs = dict(self.attrs)
        if self.op == "file":
            attrs = {"file": open_tensor_file(attrs["path"]).identity, "key": attrs["key"]}
        hasher.update(json.dumps([self.op, attrs, self.output, str(self.dtype)]).encode())
        hasher.update(json.dumps(self.shape).encode())
        for parent in self.inputs:
            hasher.update(parent.digest.encode())
        if self.value is not None:
            hasher.update(_bytes_of(self.value))
        return hasher.hexdigest()

    @cached_property
    def producer(self) -> str:
        """Digest shared by all outputs of one transform application."""
        if self.output == 0:
            return self.digest
        attrs, inputs = dict(self.attrs), self.inputs
        first = LazyTensor(*_TRANSFORMS[self.op].infer(*inputs, **attrs)[0], self.op, attrs, inputs)
        return first.digest

    def load(self) -> Tensor:
        """Compute the tensor on the CPU. Reads what the expression needs, keeps nothing."""
        return self.load_all()[self.output]

    def load_all(self) -> Sequence[Tensor]:
        """All outputs of this tensor's op, computed together (`values, scales = ...`)."""
        return self.evaluate(_read_leaf)

    def evaluate(self, leaf: Callable[[LazyTensor], Tensor]) -> Sequence[Tensor]:
        """All outputs of this tensor's op, with `leaf` giving the values of files and constants.

        The transforms run on whatever device those values are on.
        """
        if self.op in ("file", "constant"):
            return (leaf(self),)
        inputs = (parent.evaluate(leaf)[parent.output] for parent in self.inputs)
        return _TRANSFORMS[self.op].compute(*inputs, **self.attrs)

    def bands(self, most_bytes: int) -> Sequence[Band]:
        """`load_all` in pieces: all outputs of one band of rows, then of the next.

        A band is about `most_bytes` of the file, so that a weight of any size passes through the
        processor's cache. Where a transform needs all rows, and for constants, there is one piece.
        """
        bands: list[Band] = []
        for part in self._parts():
            together = part._rows_together
            if together is None:
                bands.append(Band(part, None))
            else:
                bands.extend(part._bands(most_bytes, together))
        return bands

    def _parts(self) -> Sequence[LazyTensor]:
        """Expressions whose outputs, one below the other, are those of this one."""
        transform = _TRANSFORMS.get(self.op)
        if transform is None or (transform.rows is None and not transform.concatenates):
            return (self,)
        if not transform.concatenates and len(self.inputs) > 1:
            return (self,)
        parts = [part for parent in self.inputs for part in parent._parts()]
        if transform.concatenates:
            return parts
        if any(part.shape[0] % (transform.rows or 1) for part in parts[:-1]):
            return (self,)
        return [apply(self.op, part, **self.attrs)[self.output] for part in parts]

    @property
    def _rows_together(self) -> int | None:
        """Rows of its files that a band must hold a multiple of; None: there are no bands."""
        if self.op == "file":
            return 1 if self.shape else None
        transform = _TRANSFORMS.get(self.op)
        if transform is None or transform.rows is None:
            return None
        cut = self.inputs[: transform.by_rows]
        if any(item._rows_together != 1 or item.shape[0] != cut[0].shape[0] for item in cut):
            return None
        return transform.rows

    def _bands(self, most_bytes: int, together: int) -> Iterator[Band]:
        cut = list(self._leaves(in_bands=True))
        rows = cut[0].shape[0]
        largest = max(source.nbytes for source in cut)
        groups = most_bytes * rows // max(largest, 1) // together
        step = max(groups, 1) * together
        whole: dict[int, Tensor] = {}
        for start in range(0, rows, step):
            yield Band(self, (start, min(start + step, rows)), whole)

    def _leaves(self, in_bands: bool = False) -> Iterator[LazyTensor]:
        """Files and constants; `in_bands`: only those of which a band holds some rows."""
        if not self.inputs:
            yield self
            return
        count = _TRANSFORMS[self.op].by_rows if in_bands else None
        for parent in self.inputs[:count]:
            yield from parent._leaves(in_bands)

    def sources(self) -> Iterator[LazyTensor]:
        """The `file` leaves of this expression."""
        return (leaf for leaf in self._leaves() if leaf.op == "file")


@dataclass(frozen=True)
class Band:
    """Some rows of all outputs of one expression, computed when asked for.

    Attributes:
        rows: the first of its rows and the one after its last; None: all of them, because they
            cannot be had apart.
    """

    expression: LazyTensor
    rows: tuple[int, int] | None
    _whole: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """What every band of the expression needs all of, kept while there are bands."""

    def load(self, memory: MutableMapping[int, Tensor]) -> Sequence[Tensor]:
        """These rows of every output; they may lie in `memory`.

        Args:
            memory: what files are read into: it grows as needed, and is for one band at a time.
        """
        if self.rows is None:
            return self.expression.load_all()
        start, stop = self.rows
        slots = {
            id(source): slot for slot, source in enumerate(self.expression._leaves(in_bands=True))
        }

        def value(leaf: LazyTensor) -> Tensor:
            if id(leaf) not in slots:
                if id(leaf) not in self._whole:
                    self._whole[id(leaf)] = _read_leaf(leaf)
                return self._whole[id(leaf)]
            pages = _pages(memory, slots[id(leaf)], leaf.nbytes * (stop - start) // leaf.shape[0])
            file = open_tensor_file(leaf.attrs["path"])
            return file.read_rows(leaf.attrs["key"], start, stop, pages)

        return self.expression.evaluate(value)


def _pages(memory: MutableMapping[int, Tensor], slot: int, count: int) -> Tensor:
    """Pages for `count` bytes, those of this slot where they are enough."""
    kept = memory.get(slot)
    if kept is None or len(kept) < pages_for(count):
        # Not both at once.
        memory.pop(slot, None)
        del kept
        memory[slot] = new_pages(count)
    return memory[slot]


def from_file(path: str, key: str) -> LazyTensor:
    """The tensor `key` of the safetensors or PyTorch file at `path`; only the header is read.

    Raises:
        BadInput: the file is missing, truncated or does not hold `key`.
    """
    file = open_tensor_file(path)
    shape, dtype = file.describe(key)
    return LazyTensor(shape, dtype, "file", {"path": path, "key": key})


def constant(value: Tensor) -> LazyTensor:
    """A small tensor that is held in memory, such as a rotary table."""
    value = value.detach().contiguous().cpu()
    return LazyTensor(tuple(value.shape), value.dtype, "constant", value=value)


def apply(name: str, *inputs: LazyTensor, **attrs: Any) -> tuple[LazyTensor, ...]:
    """Record the transform `name` on `inputs`: one lazy tensor for each of its outputs."""
    outputs = _TRANSFORMS[name].infer(*inputs, **attrs)
    return tuple(
        LazyTensor(tuple(shape), dtype, name, attrs, inputs, index)
        for index, (shape, dtype) in enumerate(outputs)
    )


def cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """`tensor` in another dtype; itself where the dtype is the same already."""
    if tensor.dtype == dtype:
        return tensor
    return apply("cast", tensor, dtype=dtype_name(dtype))[0]


class WeightStore(MutableMapping[str, LazyTensor]):
    """Parameter and buffer names of one denoiser, each mapped to a lazy tensor."""

    def __init__(self, tensors: Mapping[str, LazyTensor] | None = None) -> None:
        self._tensors = dict(tensors or {})

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __setitem__(self, name: str, tensor: LazyTensor) -> None:
        self._tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights once computed."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def copy(self) -> WeightStore:
        """Another store over the same (immutable) expressions."""
        return WeightStore(self._tensors)

    def digest(self) -> str:
        """SHA-256 over names and expressions, independent of insertion order."""
        pairs = sorted((name, tensor.digest) for name, tensor in self._tensors.items())
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def names_by_producer(self) -> list[list[str]]:
        """The names in groups: those in one group are outputs of one expression."""
        groups: dict[str, list[str]] = {}
        for name, tensor in self._tensors.items():
            groups.setdefault(tensor.producer, []).append(name)
        return list(groups.values())

    def items_by_producer(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every (name, tensor), computing each expression once.

        Outputs of one transform come one after the other, so that quantizing a layer reads and
        rounds its weight once for values and scales. Memory: the tensors of one expression; the
        files of the next one are read ahead into the system's cache.
        """
        ordered = self.names_by_producer()
        for index, names in enumerate(ordered):
            if index + 1 < len(ordered):
                for source in self._tensors[ordered[index + 1][0]].sources():
                    open_tensor_file(source.attrs["path"]).prefetch(source.attrs["key"])
            outputs = self._tensors[names[0]].load_all()
            for name in names:
                yield name, outputs[self._tensors[name].output]


def to_json(tensor: LazyTensor) -> dict[str, Any]:
    """The expression as JSON, for the pass cache. Constants become hex bytes."""
    record: dict[str, Any] = {
        "shape": list(tensor.shape),
        "dtype": dtype_name(tensor.dtype),
        "op": tensor.op,
        "attrs": dict(tensor.attrs),
        "output": tensor.output,
        "inputs": [to_json(parent) for parent in tensor.inputs],
    }
    if tensor.value is not None:
        record["value"] = _bytes_of(tensor.value).hex()
    return record


def from_json(record: Mapping[str, Any]) -> LazyTensor:
    """The inverse of `to_json`."""
    shape, dtype = tuple(record["shape"]), dtype_from_name(record["dtype"])
    value = None
    if "value" in record:
        raw = bytearray(bytes.fromhex(record["value"]))
        value = torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.empty(shape)
    inputs = tuple(from_json(parent) for parent in record["inputs"])
    return LazyTensor(shape, dtype, record["op"], record["attrs"], inputs, record["output"], value)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """`"bfloat16"` → `torch.bfloat16`.

    Raises:
        ValueError: torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a torch dtype")
    return dtype


def _read_leaf(tensor: LazyTensor) -> Tensor:
    if tensor.op == "file":
        return open_tensor_file(tensor.attrs["path"]).read(tensor.attrs["key"])
    assert tensor.value is not None
    return tensor.value


def _bytes_of(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


register_transform(
    Transform(
        name="cast",
        infer=lambda x, dtype: [(x.shape, dtype_from_name(dtype))],
        compute=lambda x, dtype: [x.to(dtype_from_name(dtype))],
        rows=1,
    )
)
