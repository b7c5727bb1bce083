"""A whole clip as one CUDA graph: the networks of every step, guidance, and what moves x.

The first clip of a kind is made step by step, the second is recorded, later ones are one launch.
What sizes, prompt and noise levels determine is computed before, and noise is drawn before, in the
order of the steps; both are copied into the recording's buffers. Every bit is that of the steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbo_opt.ir.schedule import Step
from turbo_opt.runtime.cuda_graph import Key, Recordings, Values, merged
from turbo_opt.runtime.module import CompiledTransformer
from turbo_opt.runtime.rules import advance, guided
from turbo_opt.runtime.staged import StagedGraph

MOST_EVALUATIONS = 8
"""Network evaluations of the longest clip that is recorded: a graph grows with each."""


@dataclass(frozen=True)
class StepCall:
    """One step, its network, and what that is given besides the latents.

    Attributes:
        inputs: with the prompt and, where the step is guided, with the negative prompt.
    """

    step: Step
    network: Any
    inputs: tuple[Mapping[str, Tensor], ...]


def why_not(calls: Sequence[StepCall], latents: Tensor, wanted: bool) -> str | None:
    """Why a clip cannot be one CUDA graph, as `off, …`; None if it can.

    Args:
        wanted: what the caller said.
    """
    if not wanted:
        return "off, loop_graph=False"
    if any(call.step.rule == "scheduler" for call in calls):
        return "off, a scheduler of diffusers makes the schedule's steps"
    evaluations = sum(len(call.inputs) for call in calls)
    if not 1 <= evaluations <= MOST_EVALUATIONS:
        return (
            f"off, a clip takes {evaluations} network evaluations, "
            f"1 to {MOST_EVALUATIONS} are recorded"
        )
    if latents.is_cuda and torch.cuda.is_current_stream_capturing():
        return "off, the caller records a CUDA graph"
    networks = list({id(call.network): call.network for call in calls}.values())
    for network in networks:
        reason = _why_not_network(network)
        if reason is not None:
            return f"off, {reason}"
    devices = {str(device) for device in (latents.device, *(item.device for item in networks))}
    if len(devices) > 1:
        return f"off, networks and latents are on {' and '.join(sorted(devices))}"
    return None


def _why_not_network(network: Any) -> str | None:
    if not isinstance(network, CompiledTransformer):
        return f"{type(network).__name__} is no compiled network"
    if network._forward_hooks or network._forward_pre_hooks:
        return "a network has forward hooks, which want each call"
    staged = network.staged()
    if staged is None or staged.graphs is None:
        return network.cuda_graph_status.removeprefix("off, ")
    failure = staged.graphs.failure
    return f"a step could not be recorded: {failure}" if failure is not None else None


class ClipLoop:
    """All that determines one clip but the noise of its steps; `why_not` must have given None.

    Raises:
        ValueError: a network cannot take the inputs.
    """

    def __init__(self, calls: Sequence[StepCall], latents: Tensor) -> None:
        self._steps = [call.step for call in calls]
        self._dtypes = [call.network.dtype for call in calls]
        self._networks = [_staged(call) for call in calls]
        self._latents = latents
        self._cast = {dtype: latents.to(dtype) for dtype in set(self._dtypes)}
        self._values: list[Values] = []
        self._unstaged: dict[Key, Values] = {}
        self._places = [[self._places_of(call, given) for given in call.inputs] for call in calls]
        recordings = self._networks[0].loops
        assert recordings is not None
        self._recordings: Recordings = recordings
        self._key: Key = (
            # By weak references: a recording reads the weights of all networks, and one that is
            # moved or deleted must never be replayed, nor be kept in memory by it.
            tuple(weakref.ref(network) for network in self._networks),
            tuple(self._steps),
            (latents.shape, latents.dtype, torch.get_default_dtype()),  # the last is the noise's
            tuple(values.signature for values in self._values),
            tuple(tuple(map(tuple, places)) for places in self._places),
        )

    @property
    def is_known(self) -> bool:
        """Whether a clip of this kind was made before, so that `replay` may be called."""
        return self._key in self._recordings

    @property
    def status(self) -> str:
        """As `CompiledTransformer.loop_graph_status`."""
        return self._recordings.status

    def made(self) -> None:
        """The clip was made step by step: the next of its kind can be recorded."""
        self._recordings.seen(self._key)

    def replay(self, noise: Sequence[Tensor | None]) -> Tensor | None:
        """The last x, float32; None if recording failed.

        Args:
            noise: what each step adds, drawn in their order.
        """
        drawn = {_noise(i): item for i, item in enumerate(noise) if item is not None}
        drawn = {name: item.to(self._latents.device) for name, item in drawn.items()}
        sources = [Values({"latents": self._latents, **drawn}), *self._values]
        recording = self._recordings.find(self._key, sources, self._clip)
        return recording.replay(sources) if recording is not None else None

    def _clip(self, values: Sequence[Mapping[str, Any]]) -> Tensor:
        (given, *kept) = values
        x = given["latents"]
        for index, (step, network) in enumerate(zip(self._steps, self._networks, strict=True)):
            latents = x.to(self._dtypes[index])
            predictions = [
                network.velocity(hidden_states=latents, **merged(kept[i] for i in places))
                for places in self._places[index]
            ]
            v = guided(predictions, step.guidance_scale)
            x = advance(step, v, x, given.get(_noise(index)))
        return x.float()

    def _places_of(self, call: StepCall, given: Mapping[str, Tensor]) -> list[int]:
        """Where in `_values` the values of one evaluation are; equal ones are there once."""
        latents = self._cast[call.network.dtype]  # of which only sizes and device are read here
        inputs = call.network.checked({"hidden_states": latents, **given})
        staged = _staged(call)
        own = (id(staged), *(id(given[name]) for name in staged.unstaged_inputs))
        if own not in self._unstaged:
            self._unstaged[own] = staged.unstaged(inputs)
        return [self._place_of(item) for item in (self._unstaged[own], *staged.kept(inputs))]

    def _place_of(self, values: Values) -> int:
        for place, known in enumerate(self._values):
            if known is values:
                return place
        self._values.append(values)
        return len(self._values) - 1


def _staged(call: StepCall) -> StagedGraph:
    staged = call.network.staged()
    assert staged is not None
    return staged


def _noise(index: int) -> str:
    return f"noise_{index}"
