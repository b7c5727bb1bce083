"""Sums over what a measurement sees, one value a noise level: nothing of an activation is kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from turbo_opt.compiler.scales import InputStatistics

OUTLIER = 6.0
"""Values beyond so many times the root mean square are outliers."""
LARGEST_DB = 300.0
"""What bitwise equality is written as."""


def rounded(value: float) -> float:
    """Five significant digits, as the file has them."""
    return float(f"{value:.5g}")


class InputSums:
    """Of one layer's input.

    Attributes:
        channel_amax: (K,) float32, over all noise levels.
    """

    def __init__(self, levels: int, channels: int, device: torch.device) -> None:
        self.channel_amax = torch.zeros(channels, device=device)
        # values, Σx², Σx⁴, outliers
        self._sums = torch.zeros(levels, 4, dtype=torch.float64, device=device)
        self._amax = torch.zeros(levels, device=device)

    def add(self, level: int, x: Tensor) -> None:
        """One evaluation's input (…, K). Outliers are counted against its own rms."""
        squares = x.float().square()
        magnitude = squares.amax(tuple(range(x.ndim - 1))).sqrt()
        torch.maximum(self.channel_amax, magnitude, out=self.channel_amax)
        self._amax[level] = torch.maximum(self._amax[level], magnitude.max())
        total = squares.sum(dtype=torch.float64)
        beyond = squares > OUTLIER**2 * total / squares.numel()
        fourth = squares.square_().sum(dtype=torch.float64)
        count = torch.full_like(total, squares.numel())
        self._sums[level] += torch.stack([count, total, fourth, beyond.sum().double()])

    def statistics(self) -> InputStatistics:
        """The numbers of the file."""
        count, second, fourth, outliers = self._sums.cpu().unbind(1)
        mean = second / count
        kurtosis = fourth / count / mean.square().clamp_min(1e-300)
        columns = (self._amax.double().cpu(), mean.sqrt(), outliers / count, kurtosis)
        amax, rms, share, kurt = (tuple(map(rounded, column.tolist())) for column in columns)
        return InputStatistics(amax=amax, rms=rms, outliers=share, kurtosis=kurt)


class ErrorSums:
    """Of a result's errors and of the result."""

    def __init__(self, levels: int, device: torch.device) -> None:
        self._sums = torch.zeros(levels, 2, dtype=torch.float64, device=device)

    def add(self, level: int, expected: Tensor, error: Tensor) -> None:
        """A result, and how far it was off."""
        noise = error.float().square().sum(dtype=torch.float64)
        signal = expected.float().square().sum(dtype=torch.float64)
        self._sums[level] += torch.stack([signal, noise])

    def relative(self) -> tuple[float, ...]:
        """‖error‖ / ‖result‖ at each noise level."""
        signal, noise = self._sums.cpu().unbind(1)
        return tuple(map(rounded, (noise / signal.clamp_min(1e-300)).sqrt().tolist()))

    def sqnr(self) -> tuple[float, ...]:
        """The same in dB of signal to noise."""
        return tuple(decibels(noise, signal) for signal, noise in self._sums.cpu().tolist())


class EffectSums:
    """Of the squares of one scalar an evaluation.

    Attributes:
        count: how many were added.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self._sum = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, value: Tensor) -> None:
        """One evaluation's."""
        self.count += 1
        self._sum += value.double().square()

    def relative(self, signal: EffectSums) -> float:
        """The root of the sum, as a part of the signal's."""
        total = float(signal._sum)
        return rounded(math.sqrt(float(self._sum) / total)) if total else 0.0

    def sqnr(self, signal: EffectSums) -> float:
        """The same in dB of signal to noise."""
        return decibels(float(self._sum), float(signal._sum))


def decibels(noise: float, signal: float) -> float:
    """10·log10(signal / noise), limited to ±300."""
    if noise <= 0:
        return LARGEST_DB
    if signal <= 0:
        return -LARGEST_DB
    value = 10 * math.log10(signal / noise)
    return rounded(max(-LARGEST_DB, min(LARGEST_DB, value)))
