"""Normal data N(m, s²), of which path, score and consistency function are known in closed form.

With σ² = s²·cos² τ + sin² τ, the path through x_τ is x₀ = m + s·(x_τ − m·cos τ) / σ.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from turbo_opt.calibration.rcm.trigflow import sides


@dataclass(frozen=True)
class Gaussian:
    mean: float = 0.0
    std: float = 0.5

    def velocity(self, y: Tensor, t: Tensor, prompt_embeds: Tensor | None = None) -> Tensor:
        """E[ε − x₀ | y] of rectified flow."""
        t = t.view(-1, *[1] * (y.ndim - 1))
        centered = y - (1 - t) * self.mean
        variance = (1 - t) ** 2 * self.std**2 + t**2
        return (t - (1 - t) * self.std**2) / variance * centered - self.mean

    def flow(self, x: Tensor, angle: Tensor) -> Tensor:
        """dx/dτ on the path."""
        cos, sin = sides(angle, x)
        variance = self.std**2 * cos**2 + sin**2
        slope = (1 - self.std**2) * sin * cos / variance
        return slope * (x - self.mean * cos) - self.mean * sin

    def clean(self, x: Tensor, angle: Tensor) -> Tensor:
        """Where the path through x ends."""
        cos, sin = sides(angle, x)
        deviation = (self.std**2 * cos**2 + sin**2).sqrt()
        return self.mean + self.std * (x - self.mean * cos) / deviation

    def consistent(self, x: Tensor, angle: Tensor) -> Tensor:
        """F of the exact consistency model."""
        cos, sin = sides(angle, x)
        return (cos * x - self.clean(x, angle)) / sin

    def denoised(self, x: Tensor, angle: Tensor) -> Tensor:
        """E[x₀ | x]."""
        cos, sin = sides(angle, x)
        return cos * x - sin * self.flow(x, angle)
