"""A denoiser of any size on one device: the weights of one transformer block at a time.

Where the whole network fits into half of the device's free memory it stays there; else a block's
weights are read when the block runs and given up when it has run, so memory holds one block,
whatever the model. Weights come through the system's file cache: read again for each evaluation.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from turbo_opt.calibration.networks import DenoiserFolder, open_weights, without_weights
from turbo_opt.capture.checkpoint import Checkpoint


def blockwise_network(
    folder: DenoiserFolder, device: torch.device, whole: bool | None = None
) -> tuple[nn.Module, Checkpoint]:
    """The network in float32 and in evaluation mode, and its checkpoint.

    Args:
        whole: keep all weights on the device; None: if they fit.

    Raises:
        BadInput: the checkpoint lacks a weight, or has it in another shape.
    """
    network, tables = without_weights(folder)
    network.requires_grad_(False)
    checkpoint = open_weights(folder, network, {})
    for name, table in tables.items():
        owner, _, leaf = name.rpartition(".")
        network.get_submodule(owner)._buffers[leaf] = table.to(device)
    if whole is None:
        count = sum(parameter.numel() for parameter in network.parameters())
        whole = 4 * count < _free_bytes(device) / 2
    blocks: Any = network.blocks
    for index, block in enumerate(blocks):
        residence = _Residence(checkpoint, f"blocks.{index}", device)
        if whole:
            residence.enter(block)
        else:
            block.register_forward_pre_hook(residence.enter)
            block.register_forward_hook(residence.leave)
    _Residence(checkpoint, "", device).enter(network)
    return network.eval(), checkpoint


class _Residence:
    """Puts a module's weights on the device, and takes them off.

    Args:
        prefix: the module's name; empty for the whole network, whose blocks are left out.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str, device: torch.device) -> None:
        self._checkpoint, self._prefix, self._device = checkpoint, prefix, device

    def enter(self, module: nn.Module, *_: Any) -> None:
        """Read the weights."""
        for name in [name for name, _ in module.named_parameters()]:
            if not self._prefix and name.startswith("blocks."):
                continue
            full = f"{self._prefix}.{name}".lstrip(".")
            value = self._checkpoint.weights[full].load()
            self._put(module, name, value.to(self._device, torch.float32))

    def leave(self, module: nn.Module, *_: Any) -> None:
        """Give them up."""
        for name, parameter in list(module.named_parameters()):
            self._put(module, name, parameter.to("meta"))

    def _put(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
