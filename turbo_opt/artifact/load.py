"""An artifact as a module that stands in for `pipe.transformer`, samples and generates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from turbo_opt.artifact.graph_file import latent_sides, read_graph
from turbo_opt.artifact.manifest import (
    MANIFEST,
    DenoiserRecord,
    Manifest,
    check_sizes,
    inside,
    read_manifest,
)
from turbo_opt.artifact.shards import sha256_of
from turbo_opt.artifact.weights_reader import StoredWeights
from turbo_opt.errors import BadInput
from turbo_opt.ir.edit import user_inputs
from turbo_opt.ir.schedule import Schedule
from turbo_opt.ir.weights import dtype_name
from turbo_opt.runtime.limits import LatentLimits, latent_limits, limits_of_sides
from turbo_opt.runtime.module import CompiledTransformer

if TYPE_CHECKING:
    import numpy as np


class LoadedArtifact(nn.Module):
    """A compiled model, ready to run.

    It is its own first denoiser: `pipe.transformer = turbo_opt.load(path)` works, and so does
    `pipe.transformer = turbo_opt.load(path).transformer`. Of a pair of experts, the second is
    `artifact.transformers["transformer_2"]`.

    Attributes:
        path: the directory it was read from.
        manifest: the checked manifest.
        transformers: every denoiser by name.
        schedule: the sampling loop as data.
        limits: how large the latents of one call may be.
        components: diffusers folder given to `load` instead of the recorded one, or None.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        transformers: dict[str, CompiledTransformer],
        limits: LatentLimits,
        components: str | None,
    ) -> None:
        super().__init__()
        self.path = path
        self.manifest = manifest
        self._networks = nn.ModuleDict(transformers)
        self.limits = limits
        self.components = components
        self.schedule: Schedule = manifest.schedule.build()
        self._pipeline: Any = None

    @property
    def transformers(self) -> dict[str, CompiledTransformer]:
        """Every denoiser by name."""
        return dict(self._networks.items())  # type: ignore[arg-type]

    @property
    def transformer(self) -> CompiledTransformer:
        """The first denoiser, or the only one."""
        return self.transformers[min(self.transformers)]

    @property
    def scheduler(self) -> Any:
        """A new diffusers scheduler that takes this artifact's steps: `pipe.scheduler = …`."""
        from turbo_opt.runtime.scheduler import scheduler_for

        return scheduler_for(self.schedule)

    @property
    def config(self) -> Any:
        """The diffusers config of the first denoiser."""
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of latents and text embeddings."""
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the first denoiser; see `CompiledTransformer.forward`."""
        return self.transformer(*args, **kwargs)

    @contextlib.contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Diffusers' hook for step caches; see `CompiledTransformer.cache_context`."""
        with self.transformer.cache_context(name, **kwargs):
            yield

    def generate(self, prompt: str, **options: Any) -> np.ndarray:
        """Frames (F, H, W, 3) uint8 for a prompt; see `turbo_opt.runtime.generate.generate`."""
        from turbo_opt.runtime.generate import generate

        return generate(self, prompt, **options)

    def as_pipeline(self) -> Any:
        """The original diffusers pipeline around this model; see `runtime.components`."""
        from turbo_opt.runtime.components import as_pipeline

        return as_pipeline(self)


def load(
    path: Path | str,
    device: torch.device | str = "cpu",
    components: Path | str | None = None,
    check: bool = False,
    cuda_graph: bool = True,
) -> LoadedArtifact:
    """Read an artifact onto a device, a few weights at a time.

    Args:
        path: an artifact directory; it may come from anyone, nothing in it is executed.
        device: where graphs and weights go.
        components: diffusers folder or hub id with text encoder and VAE, if not the recorded one.
        check: also compare every file's SHA-256 (sizes always are).
        cuda_graph: on a GPU, replay the steps of an artifact with stages as CUDA graphs, and whole
            clips where `sample` is asked for it; the environment variable TURBO_OPT_CUDA_GRAPH=0
            turns it off too.
            `transformer.cuda_graph_status` and `transformer.loop_graph_status` say what is done.

    Raises:
        BadInput: it is no artifact, is damaged, or was written by a newer turbo_opt; or the device
            is none, or not here.
    """
    _check_device(device)
    root = Path(path).expanduser()
    manifest = read_manifest(root)
    check_sizes(root, manifest)
    if check:
        check_digests(root, manifest)
    transformers, limits = {}, []
    for name, record in manifest.denoisers.items():
        transformers[name], limit = load_denoiser(root, name, record, device, cuda_graph)
        limits.append(limit)
    smallest = LatentLimits.smallest(limits)
    given = str(components) if components is not None else None
    return LoadedArtifact(root, manifest, transformers, smallest, given)


def read_limits(root: Path, manifest: Manifest) -> LatentLimits:
    """How large the latents of one call may be, without loading the artifact.

    Raises:
        BadInput: a graph is missing or damaged.
    """
    return LatentLimits.smallest([
        limits_of_sides(*latent_sides(inside(root, record.graph)), record.config)
        for record in manifest.denoisers.values()
    ])  # fmt: skip


def _check_device(device: torch.device | str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise BadInput(f"device {str(device)!r}: no such device; use 'cpu' or 'cuda'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device {str(device)!r}: torch sees no CUDA GPU here; use 'cpu'")


def load_denoiser(
    root: Path,
    name: str,
    record: DenoiserRecord,
    device: torch.device | str,
    cuda_graph: bool = True,
) -> tuple[CompiledTransformer, LatentLimits]:
    """One network of an artifact, and how large its latents may be.

    Raises:
        BadInput: graph and weights do not belong together, or one of them is damaged.
    """
    path = inside(root, record.graph)
    with StoredWeights(root, record, device).arriving() as weights:
        exported = read_graph(path)
        _check_weights(path, name, record, exported)
        _check_stages(path, record, exported)
        _check_channels(root, name, record, exported)
        transformer = CompiledTransformer.build(
            exported, weights(), record.config, device, record.stages, cuda_graph
        )
    if dtype_name(transformer.dtype) != record.dtype:
        raise BadInput(f"{path}: the graph is {transformer.dtype}, the manifest {record.dtype}")
    return transformer, latent_limits(exported, record.config)


def _check_weights(
    path: Path, name: str, record: DenoiserRecord, exported: ExportedProgram
) -> None:
    expected = {
        key: (tuple(meta.shape), dtype_name(meta.dtype))
        for key, meta in exported.state_dict.items()
    }
    stored = {key: (entry.shape, entry.dtype) for key, entry in record.tensors.items()}
    for key in sorted(expected.keys() | stored.keys()):
        if expected.get(key) != stored.get(key):
            raise BadInput(
                f"{path}: the graph of {name!r} and the manifest differ in weight {key!r}: "
                f"{expected.get(key)} and {stored.get(key)}"
            )


def _check_stages(path: Path, record: DenoiserRecord, exported: ExportedProgram) -> None:
    inputs = {str(node.target) for node in user_inputs(exported)}
    for stage, names in record.stages.items():
        for name in names:
            if name not in inputs:
                raise BadInput(f"{path}: stage {stage!r} names {name!r}, which is no input")


def _check_channels(
    root: Path, name: str, record: DenoiserRecord, exported: ExportedProgram
) -> None:
    given = record.config["in_channels"]
    for node in user_inputs(exported):
        taken = node.meta["val"].shape[1] if node.target == "hidden_states" else given
        if taken != given:
            raise BadInput(
                f"{root / MANIFEST}: denoisers.{name}.config.in_channels = {given}, "
                f"the graph takes {taken}"
            )


def check_digests(root: Path, manifest: Manifest) -> None:
    """Every file's content is what was saved.

    Raises:
        BadInput: one is not; the message names it.
    """
    for path, record in manifest.files.items():
        found = sha256_of(inside(root, path))
        if found != record.sha256:
            raise BadInput(
                f"{root / path}: damaged, its SHA-256 is {found[:12]}…, "
                f"the manifest says {record.sha256[:12]}…"
            )
