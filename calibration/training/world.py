"""The processes of a training: torchrun's, or this one alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from turbo_opt.errors import BadInput

_AXES = ("data", "context")
_MULTIPROCESSORS = 4  # of a GPU, for what is sent while it computes
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """Who takes part.

    Attributes:
        rank, size: of this process, and how many there are.
        device: where this process computes.
        context_size: processes that share the tokens of one clip; neighbours in rank.
        mesh: all processes, to shard weights over; None for one alone.
        context_group: those that share this process's clips, or None.
    """

    rank: int
    size: int
    device: torch.device
    context_size: int = 1
    mesh: Any = None
    context_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """How many different parts a batch is split into."""
        return self.size // self.context_size

    @property
    def data_rank(self) -> int:
        """Which part of a batch is this process's."""
        return self.rank // self.context_size

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes of a tensor on the device."""
        total = self.sum(value)
        return total / self.size if self.size > 1 else total

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the device."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def told(self, text: str | None) -> str | None:
        """What the main process says, in every process. All call."""
        said = [text]
        if self.size > 1:
            dist.broadcast_object_list(said, src=0)
        return said[0]

    @contextlib.contextmanager
    def led_by_main(self, enter: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """A context that the main process alone is in. All call.

        Raises:
            BadInput: it may not be entered; in every process, as the others would wait for one
                that is gone.
        """
        with contextlib.ExitStack() as stack:
            refusal = None
            if self.is_main:
                try:
                    stack.enter_context(enter())
                except BadInput as error:
                    refusal = str(error)
            refusal = self.told(refusal)
            if refusal is not None:
                raise BadInput(refusal)
            yield

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def start_world(
    device: str, context_size: int = 1, patience: timedelta = _PATIENCE
) -> Iterator[World]:
    """Join the processes that torchrun started, or work alone.

    Args:
        device: `cpu` or `cuda`; with several processes each takes the GPU of its local rank.
        context_size: processes that share a clip.
        patience: for how long one that is ahead waits for the others.

    Raises:
        BadInput: the number of processes is no multiple of `context_size`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % context_size:
        raise BadInput(
            f"training.context_parallel: {context_size} does not divide the {size} processes that "
            "torchrun started"
        )
    if size == 1:
        yield World(0, 1, torch.device(device))
        return
    rank = int(os.environ["RANK"])
    chosen = torch.device(device)
    if device == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    # gloo beside NCCL: checkpoints are written from the CPU while the GPUs go on.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=patience)
    try:
        mesh = dist.init_device_mesh(
            device, (size,), backend_override=_beside_computing(device, patience)
        )
        group = None
        if context_size > 1:
            sides = (size // context_size, context_size)
            group = dist.init_device_mesh(device, sides, mesh_dim_names=_AXES)[_AXES[1]].get_group()
        yield World(rank, size, chosen, context_size, mesh, group)
    finally:
        dist.destroy_process_group()


def _beside_computing(device: str, patience: timedelta) -> dict[int | str, Any] | None:
    """The communicator of a mesh over which weights are gathered while a block computes.

    NCCL takes as many multiprocessors as it can fill, from when the first process is ready until
    the last one is; products that count on all of them then take longer.
    """
    if device != "cuda":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = _MULTIPROCESSORS
    options._timeout = patience
    return {0: ("nccl", options)}
