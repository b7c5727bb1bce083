"""Evaluations of one network on clips at noise levels, and places to look on in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from turbo_opt.calibration.blockwise import blockwise_network
from turbo_opt.calibration.data.batches import Batch, Batches
from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.flow import Denoiser, NoiseLevels, autocast, noisy
from turbo_opt.calibration.networks import DenoiserFolder
from turbo_opt.calibration.sla.closed_form import attend_densely
from turbo_opt.calibration.sla.student import (
    PROJECTION,
    Attend,
    self_attentions,
    set_attention,
)
from turbo_opt.errors import TurboOptError
from turbo_opt.kernels import sla

Told = Callable[[str, int, int], None]
"""Told (what, done, in all)."""
Variant = TypeVar("Variant")
LinearHook = Callable[[str, nn.Linear, Tensor, Tensor], None]
"""Given a linear layer's name, the layer, its input and its output."""


@dataclass(frozen=True)
class Measuring:
    """What is measured.

    Attributes:
        clips: samples that statistics are taken of.
        held_out: further samples, the last of the set, that errors are measured on.
        noise_levels: at how many levels each is looked at.
        topk: shares of the key blocks, rising.
        block_q, block_k, feature_map: of the sparse attention.
        alpha: how much of the activations' range balancing moves into the weights, 0 to 1.
        probes: by which effects on the prediction are measured, for each clip and noise level; 0
            leaves them out.
        compute: dtype of the network's products.
        seed: of the noise.
    """

    clips: int
    held_out: int
    noise_levels: int
    topk: tuple[float, ...]
    block_q: int
    block_k: int
    feature_map: str = "softmax"
    alpha: float = 0.5
    probes: int = 4
    compute: torch.dtype = torch.bfloat16
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """One evaluation.

    Attributes:
        level: the number of its noise level.
    """

    level: int
    _batch: Batch
    _time: Tensor
    _run: Callable[[Tensor, Tensor, Tensor], Tensor]

    def run(self) -> Tensor:
        """The prediction.

        Raises:
            TurboOptError: it is not finite.
        """
        return self._run(self._input(), self._time, self._batch.prompt_embeds)

    def probe(self, number: int) -> Tensor:
        """The prediction, once a backward pass from a Gaussian probe has gone through it."""
        x, text = self._input().requires_grad_(), self._batch.prompt_embeds.clone().requires_grad_()
        with torch.enable_grad():
            prediction = self._run(x, self._time, text)
            prediction.backward(self._batch.noise(f"probe {self.level} {number}"))
        return prediction.detach()

    def _input(self) -> Tensor:
        noise = self._batch.noise(f"noise {self.level}")
        return noisy(self._batch.latents, noise, self._time)


class Evaluations:
    """The network, and how it is evaluated.

    Args:
        samples: as many that are not broken as are measured on, or more.
        whole: see `blockwise_network`.

    Attributes:
        network: diffusers' own.
        linear: name → linear layer in the transformer blocks.
        attentions: name → self-attention.
        times: (levels,) the noise levels.
    """

    def __init__(
        self,
        folder: DenoiserFolder,
        samples: SampleSet,
        levels: NoiseLevels,
        measuring: Measuring,
        device: torch.device,
        progress: Told,
        whole: bool | None,
    ) -> None:
        self.measuring, self.device = measuring, device
        self._name, self._samples, self._progress = folder.name, samples, progress
        intact = samples.intact  # one that is missing would be replaced by another of them
        self._clips = intact[: measuring.clips]
        self._held_out = intact[-measuring.held_out :]
        even = (torch.arange(measuring.noise_levels) + 0.5) / measuring.noise_levels
        self.times = levels.at(even).float()
        self.network, self.checkpoint = blockwise_network(folder, device, whole)
        self._denoiser = Denoiser(self.network, folder)
        network: Any = self.network
        network.enable_gradient_checkpointing(_again_on_the_way_back)
        self.attentions = dict(self_attentions(network))
        self._names = {id(module): name for name, module in self.attentions.items()}
        self.linear = {
            name: module
            for name, module in network.named_modules()
            if name.startswith("blocks.") and isinstance(module, nn.Linear)
        }

    def on_clips(self, what: str) -> Iterator[Step]:
        """Evaluations on the first clips."""
        return self._steps(what, self._clips)

    def on_held_out(self, what: str) -> Iterator[Step]:
        """Evaluations on the held-out clips."""
        return self._steps(what, self._held_out)

    def variants_on_held_out(
        self, what: str, variants: Sequence[Variant]
    ) -> Iterator[tuple[Step, Variant]]:
        """Each evaluation on the held-out clips once for every variant."""
        total, done = len(self._held_out) * len(self.times) * len(variants), 0
        for step in self._steps("", self._held_out):
            for variant in variants:
                yield step, variant
                done += 1
                self._progress(what, done, total)

    @contextlib.contextmanager
    def watched(self, linear: LinearHook, attend: Attend = attend_densely) -> Iterator[None]:
        """With `linear` told of every linear layer in the blocks, and `attend` in the place of
        self-attention."""

        def hook(name: str) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], None]:
            return lambda layer, args, output: linear(name, layer, args[0], output)

        set_attention(self.network, attend)
        handles = [layer.register_forward_hook(hook(name)) for name, layer in self.linear.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            set_attention(self.network, attend_densely)

    def name_of(self, attn: nn.Module) -> str:
        """The name of a self-attention."""
        return self._names[id(attn)]

    def sparse(self, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, topk: float) -> Tensor:
        """What `turbo_opt::sla` gives, with the checkpoint's projection where it has one."""
        unread, stem = self.checkpoint.unread, f"{self.name_of(attn)}.{PROJECTION}"
        weight, bias = (
            unread[name].load().to(q.device) if name in unread else None
            for name in (f"{stem}.weight", f"{stem}.bias")
        )
        settings = self.measuring
        blocks = (settings.block_q, settings.block_k, settings.feature_map)
        return sla(q, k, v, weight, bias, topk, *blocks)

    def _steps(self, what: str, numbers: Sequence[int]) -> Iterator[Step]:
        """All evaluations; without a name, no progress is told."""
        seed, total = self.measuring.seed, len(numbers) * len(self.times)
        batches = Batches(self._samples, numbers, seed, self.device, unconditional=False)
        for index in range(total):
            position, level = divmod(index, len(self.times))
            batch = batches.at([position], shuffled=False)
            time = self.times[level : level + 1].to(self.device)
            yield Step(level, batch, time, self._run)
            if what:
                self._progress(what, index + 1, total)

    def _run(self, x: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        with autocast(self.device, self.measuring.compute):
            prediction = self._denoiser(x, t, prompt_embeds)
        if not prediction.isfinite().all():
            raise TurboOptError(
                f"{self._name}: its prediction at noise level {float(t[0]):.3g} is not finite, so "
                "nothing can be measured; look for such values in its weights"
            )
        return prediction


def look_away(name: str, layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """A hook for rounds that look at no linear layer."""


def _again_on_the_way_back(block: nn.Module, *inputs: Any) -> Any:
    # Reentrant: hooks see a gradient only where the block runs again, just before its own backward
    # pass, so what they hold on to is that of one block.
    return checkpoint(block.__call__, *inputs, use_reentrant=True)
