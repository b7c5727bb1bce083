"""Denoisers of a diffusers folder as networks to train or to imitate, whole or sharded.

A network is built without weights, sharded over the processes if there are several (FSDP2: a
group for each block), and only then filled, one weight at a time: no process ever holds it whole.
Parameters are float32. Products run in the job's dtype by autocast, so that what diffusers keeps
in float32 (norms, modulation, time embedding) stays there, and gathering float32 costs little
beside the products of a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turbo_opt.calibration.training.world import World
from turbo_opt.capture.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from turbo_opt.capture.folder import PipelineFolder, open_pipeline
from turbo_opt.checkpoints.reader import fitted, read_network
from turbo_opt.errors import BadInput

Prepare = Callable[[nn.Module], None]
"""Changes a network that has no weights yet, such as giving it another attention."""


@dataclass(frozen=True)
class DenoiserFolder:
    """One denoiser of a pipeline's folder, or its architecture with weights from elsewhere.

    Attributes:
        pipeline: the folder.
        name: `transformer` or `transformer_2`.
        class_name: its diffusers class.
        config: its config.json.
        weights: a file or folder in any layout of `turbo_opt.checkpoints`; None: the pipeline's.
    """

    pipeline: PipelineFolder
    name: str
    class_name: str
    config: Mapping[str, Any]
    weights: Path | None = None

    @property
    def path(self) -> Path:
        """Where its weights lie, and its config if they are the pipeline's."""
        return self.weights or self.pipeline.path / self.name

    def checkpoint(self, expected: Mapping[str, Tensor]) -> Checkpoint:
        """The expected weights, name → meta tensor, and those that are kept for passes, unread.

        Raises:
            BadInput: one is missing or of another shape.
        """
        if self.weights is None:
            return open_checkpoint(self.path, expected, {})
        stored = dict(read_network(self.weights).tensors)
        for name, meta in expected.items():
            if name in stored:
                stored[name] = fitted(name, stored[name], tuple(meta.shape)) or stored[name]
        return checkpoint_of(self.weights, stored, expected, {})


def open_denoiser(source: str, name: str, base: Path | None = None) -> DenoiserFolder:
    """Find a text-to-video denoiser. Reads no weights.

    Raises:
        BadInput: there is no such model, or it needs images.
    """
    pipeline = open_pipeline(source, base)
    if name not in pipeline.denoisers:
        raise BadInput(f"{source}: has no {name}, only {', '.join(pipeline.denoisers)}")
    class_name, config = pipeline.denoisers[name]
    text_only = class_name == "WanTransformer3DModel" and config["in_channels"] == config.get(
        "out_channels", config["in_channels"]
    )
    if not text_only or config.get("image_dim") is not None:
        raise BadInput(
            f"{source}: its {name} ({class_name}, {config['in_channels']} input channels) needs "
            "more than text; samples hold latents and prompts only"
        )
    return DenoiserFolder(pipeline, name, class_name, config)


def check_same_architecture(teacher: DenoiserFolder, other: DenoiserFolder) -> None:
    """Raise BadInput, naming what differs, unless both have the same config."""
    keys = sorted(key for key in {*teacher.config, *other.config} if not str(key).startswith("_"))
    different = [
        f"{key} is {teacher.config.get(key)!r} and {other.config.get(key)!r}"
        for key in keys
        if teacher.config.get(key) != other.config.get(key)
    ]
    if teacher.class_name != other.class_name:
        different.insert(0, f"class is {teacher.class_name} and {other.class_name}")
    if different:
        raise BadInput(
            f"teacher {teacher.path} and {other.path} are different architectures: "
            + "; ".join(different)
        )


def build_network(
    folder: DenoiserFolder,
    world: World,
    prepare: Prepare = lambda network: None,
    fill: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The network with its weights in float32, on the world's device, in evaluation mode.

    Args:
        prepare: called on the network before it is sharded and filled.
        fill: values of parameters that `prepare` adds, by name; the checkpoint's `proj_l`, where
            it has one, comes before them.

    Raises:
        BadInput: the checkpoint lacks a weight, or has it in another shape.
    """
    network, tables = without_weights(folder)
    prepare(network)
    checkpoint = open_weights(folder, network, fill or {})
    if world.size > 1:
        _shard(network, world)
    network.to_empty(device=world.device)
    with torch.no_grad():
        for name, table in tables.items():
            network.get_buffer(name).copy_(table)
        for name, parameter in network.named_parameters():
            stored = checkpoint.weights.get(name) or checkpoint.unread.get(name)
            value = stored.load() if stored is not None else (fill or {})[name]
            if value.shape != parameter.shape:
                raise BadInput(
                    f"{folder.path}: weight {name!r} has shape {list(value.shape)}, the network "
                    f"needs {list(parameter.shape)}"
                )
            set_parameter(parameter, value)
    return network.eval()


def set_parameter(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this process's part of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        if isinstance(parameter, DTensor):
            # Every process has the whole: each takes its part, and nothing is sent.
            value = distribute_tensor(
                value.to(parameter.device, parameter.dtype),
                parameter.device_mesh,
                parameter.placements,
                src_data_rank=None,
            )
        parameter.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    """A parameter's values, gathered from all processes if it is sharded; all must call."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def without_weights(folder: DenoiserFolder) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network in float32 with its parameters on meta, and its buffers by name.

    Raises:
        BadInput: its config.json describes no such network.
    """
    import diffusers
    from accelerate import init_empty_weights

    model_class = getattr(diffusers, folder.class_name)
    try:
        with init_empty_weights(include_buffers=False):
            network = model_class.from_config(dict(folder.config))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{folder.path}: does not describe a {folder.class_name}: {error}") from None
    return network.float(), {name: value.clone() for name, value in network.named_buffers()}


def open_weights(
    folder: DenoiserFolder, network: nn.Module, fill: Mapping[str, Tensor]
) -> Checkpoint:
    """The checkpoint's weights for every parameter but those in `fill`, unread.

    Raises:
        BadInput: it lacks one.
    """
    expected = {
        name: parameter.to("meta")
        for name, parameter in network.named_parameters()
        if name not in fill
    }
    return folder.checkpoint(expected)


def _shard(network: nn.Module, world: World) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in network.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=world.mesh)
    # The outermost group too is split again after each forward: left whole by an evaluation, it
    # would take its values, those of the average, into the next step.
    fully_shard(network, mesh=world.mesh, reshard_after_forward=True)
