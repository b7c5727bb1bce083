"""`denoisers/<name>.pt2`: a weight-free graph as torch.export writes it, read without pickle.

`torch.export.load` unpickles example inputs, constants and any weight that says so. The files here
hold none of those: what is written has none, and what is read is checked (`graph_safety`) and then
rebuilt from the checked members alone (`graph_reader`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from turbo_opt.artifact.graph_reader import rebuild, sides_of_input
from turbo_opt.artifact.graph_safety import MEMBERS, check_members
from turbo_opt.collector import collector_paused
from turbo_opt.errors import BadInput
from turbo_opt.ir.edit import copy_exported

_log = logging.getLogger(__name__)
_DROPPED_META = ("stack_trace", "from_node", "torch_fn", "source_fn_stack", "custom")
_MAX_BYTES = 2**30
_SAVING = threading.Lock()
_ZIP_ERRORS = (
    zipfile.BadZipFile, OSError, RuntimeError, ValueError, EOFError, IndexError, OverflowError,
    struct.error,
)  # fmt: skip


def graph_bytes(exported: ExportedProgram) -> bytes:
    """The file of a graph: no weights, no example inputs, no paths of this machine.

    Raises:
        BadInput: the graph holds something that `read_graph` would refuse, such as a constant.
    """
    exported = copy_exported(exported)
    exported._example_inputs = None
    exported._guards_code = []
    for node in exported.graph.nodes:
        for key in _DROPPED_META:
            node.meta.pop(key, None)
    buffer = io.BytesIO()
    with _SAVING, collector_paused(), _one_form():
        torch.export.save(exported, buffer)
    check_members(Path("graph"), _members(Path("graph"), buffer))
    return buffer.getvalue()


@contextlib.contextmanager
def _one_form() -> Iterator[None]:
    """Leaves out half of what saving takes: torch also brings a copy of the graph into canonical
    form, to see that it has one, and writes the graph that it was given."""
    from torch._export.serde import serialize

    canonicalize = getattr(serialize, "canonicalize", None)
    if canonicalize is None:
        yield
        return
    serialize.canonicalize = lambda graph, *_, **__: graph
    try:
        yield
    finally:
        serialize.canonicalize = canonicalize


def read_graph(path: Path) -> ExportedProgram:
    """The graph in a file, which may come from anyone.

    Raises:
        BadInput: the file is damaged, holds more than a weight-free graph, names operators or
            expressions that are none of ours, or is of another torch.
    """
    import turbo_opt.kernels  # registers the turbo_opt:: operators  # noqa: F401

    members = _members(path, io.BytesIO(_content(path)))
    check_members(path, members)
    with collector_paused():
        try:
            return rebuild(members)
        except Exception as error:
            exported = _read_by_torch(path, members)
            # A bad graph is bad to both; torch's internals have changed.
            _log.warning("%s: read by torch.export.load, which is slow: %r", path, error)
            return exported


def latent_sides(path: Path) -> tuple[list[Any], dict[str, int]]:
    """Sides of the latents that a graph takes, and bounds of its sizes: see `limits_of_sides`.

    Nothing else of the graph is read, which takes a tenth of the time.

    Raises:
        BadInput: the file is damaged, or is of no graph that takes latents.
    """
    members = _members(path, io.BytesIO(_content(path)))
    try:
        return sides_of_input(members, "hidden_states")
    except Exception as error:
        raise BadInput(
            f"{path}: damaged, the size of its latents cannot be read "
            f"({type(error).__name__}: {error})"
        ) from error


def _read_by_torch(path: Path, members: Mapping[str, bytes]) -> ExportedProgram:
    clean = io.BytesIO()
    with zipfile.ZipFile(clean, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    clean.seek(0)
    try:
        return torch.export.load(clean)
    except Exception as error:
        raise BadInput(
            f"{path}: torch {torch.__version__} cannot read this graph "
            f"({type(error).__name__}: {error})"
        ) from error


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadInput(f"{path}: too large for a graph without weights")
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def _members(path: Path, content: io.BytesIO) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(content) as archive:
            for info in archive.infolist():
                _, _, name = info.filename.partition("/")
                known = name in MEMBERS or re.fullmatch(r"data/weights/weight_\d+", name)
                if not known or name in members:
                    raise BadInput(f"{path}: {info.filename!r} does not belong in a graph file")
                if info.file_size > _MAX_BYTES or info.compress_type != zipfile.ZIP_STORED:
                    raise BadInput(f"{path}: {info.filename!r} is compressed or too large")
                members[name] = archive.read(info)
    except _ZIP_ERRORS as error:
        raise BadInput(f"{path}: damaged, not a whole graph file ({error})") from None
    return members
