"""Which samples a step sees, and the noise that goes with them: a function of seed and position.

A training's samples are numbered on from 0: step s of a batch of N sees positions N·s … N·s + N−1.
Each epoch goes through the samples once, in an order of its own. Noise, times and everything else
that is drawn for a position depends on the seed, the position and a name only. So nothing has to
be remembered to resume, and the number of processes changes nothing. Drawn for a whole batch at
once, which is faster, it depends on the batch's first position, the batch's size and the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turbo_opt.calibration.data.samples import Sample, SampleSet
from turbo_opt.errors import BadInput


def generator_of(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose draws depend on the key, and on the kind of device, only."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Batch:
    """Some samples of a step.

    Attributes:
        latents: (B, C, F, H, W) float32.
        prompt_embeds: (B, T, C_text) float32.
        empty_prompt: (T, C_text) float32, of the empty prompt; None if the set is used without.
        positions: of the samples in the training.
        names: of their files.
        seed: of the training.
        together: noise is drawn for all samples at once, on the device.
    """

    latents: Tensor
    prompt_embeds: Tensor
    empty_prompt: Tensor | None
    positions: tuple[int, ...]
    names: tuple[str, ...]
    seed: int
    together: bool = False

    def noise(self, name: str) -> Tensor:
        """Normal noise like the latents; another for another name."""
        return self._draw(torch.randn, name, self.latents.shape[1:])

    def uniform(self, name: str) -> Tensor:
        """(B,) float32 in [0, 1)."""
        return self._draw(torch.rand, name, ())

    def with_empty_prompts(self, share: float) -> Tensor:
        """Prompt embeddings, that share of them (by chance) replaced by the empty prompt's."""
        if share == 0:
            return self.prompt_embeds
        assert self.empty_prompt is not None
        empty = self.uniform("empty prompt") < share
        return torch.where(empty[:, None, None], self.empty_prompt, self.prompt_embeds)

    def _draw(self, function: Callable[..., Tensor], name: str, shape: Sequence[int]) -> Tensor:
        device = self.latents.device
        if self.together:
            generator = generator_of(self.seed, self.positions[0], name, device=device)
            size = (len(self.positions), *shape)
            return function(size, generator=generator, device=device)
        draws = [
            function(shape, generator=generator_of(self.seed, position, name))
            for position in self.positions
        ]
        return torch.stack(draws).to(device)


class Batches:
    """The samples of a training, by position.

    Args:
        samples: the set.
        numbers: those that are used; the others are held out.
        seed: of order and noise.
        device: where tensors are put.
        unconditional: whether the empty prompt is needed.
        resident: read all samples now, and keep them on the device.
        together: see `Batch`.
    """

    def __init__(
        self,
        samples: SampleSet,
        numbers: Sequence[int],
        seed: int,
        device: torch.device,
        unconditional: bool,
        resident: bool = False,
        together: bool = False,
    ) -> None:
        self._samples, self._numbers, self._seed = samples, list(numbers), seed
        self._device, self._together = device, together
        self._empty = samples.empty_prompt().to(device) if unconditional else None
        self._order: tuple[int, list[int]] = (-1, [])
        self._kept = self._read_all() if resident else None

    def at(self, positions: Sequence[int], *, shuffled: bool = True) -> Batch:
        """The samples at these positions. A broken one is replaced by the next that is not.

        Raises:
            BadInput: too many are broken.
        """
        found = [self._sample(position, shuffled) for position in positions]
        return Batch(
            torch.stack([sample.latents for sample in found]).to(self._device),
            torch.stack([sample.prompt_embeds for sample in found]).to(self._device),
            self._empty,
            tuple(positions),
            tuple(sample.name for sample in found),
            self._seed,
            self._together,
        )

    def _sample(self, position: int, shuffled: bool) -> Sample:
        count = len(self._numbers)
        epoch, place = divmod(position, count)
        order = self._order_of(epoch) if shuffled else self._numbers
        for offset in range(count):
            sample = self._read(order[(place + offset) % count])
            if sample is not None:
                return sample
        raise BadInput(
            f"{self._samples.path}: none of {count} samples can be read "
            f"({self._samples.some_broken(self._numbers)}); data.held_out takes the last of the "
            "set to measure with, the others are trained on"
        )

    def _read(self, number: int) -> Sample | None:
        return self._samples.read(number) if self._kept is None else self._kept.get(number)

    def _read_all(self) -> dict[int, Sample]:
        """Every sample that is not broken, on the device."""
        with ThreadPoolExecutor() as threads:
            found = zip(self._numbers, threads.map(self._samples.read, self._numbers))
            return {
                number: replace(
                    sample,
                    latents=sample.latents.to(self._device),
                    prompt_embeds=sample.prompt_embeds.to(self._device),
                )
                for number, sample in found
                if sample is not None
            }

    def _order_of(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = torch.randperm(len(self._numbers), generator=generator_of(self._seed, epoch))
            self._order = (epoch, [self._numbers[i] for i in order.tolist()])
        return self._order[1]


def split(samples: SampleSet, held_out: int) -> tuple[list[int], list[int]]:
    """(numbers to train on, numbers to evaluate on): the last `held_out` of the index.

    Raises:
        BadInput: nothing is left to train on.
    """
    if held_out >= len(samples):
        raise BadInput(
            f"{samples.path}: holds {len(samples)} samples, data.held_out takes {held_out}; none "
            "is left to train on"
        )
    cut = len(samples) - held_out
    return list(range(cut)), list(range(cut, len(samples)))
