"""`proj_l` without training: ridge regression of what the sparse branch misses.

For each self-attention layer, over the q, k and v of the dense model on a few noisy clips:

    min_W,b  Σ ‖W·o_linear + b − (o_dense − o_sparse)‖² + λ·‖W‖²

all tokens and heads together, as `proj_l` is shared by heads. The sums are 129×129 matrices in
float64, so any number of tokens fits; the dense model's own activations are passed on, so all
layers are solved after one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from turbo_opt.calibration.data.batches import Batches
from turbo_opt.calibration.flow import Denoiser, NoiseLevels, noisy
from turbo_opt.calibration.sla.attention import Sparsity, linear_branch, sparse_branch
from turbo_opt.calibration.sla.student import PROJECTION, Attend, self_attentions, set_attention
from turbo_opt.calibration.training.world import World


def attend_densely(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over all keys."""
    return scaled_dot_product_attention(q, k, v)


class Regression:
    """The sums of one layer's regression, and its solution.

    Args:
        width: channels of a head.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._width = width
        shape = (width + 1, width + 1)
        self._gram = torch.zeros(shape, dtype=torch.float64, device=device)
        self._cross = torch.zeros(width + 1, width, dtype=torch.float64, device=device)
        self._missed = torch.zeros((), dtype=torch.float64, device=device)
        self._target = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, linear: Tensor, missed: Tensor, target: Tensor) -> None:
        """Rows (…, L, D): the linear branch, what it should give, and dense attention itself."""
        for x, y, o in zip(
            *(tensor.flatten(0, -3) for tensor in (linear, missed, target)), strict=True
        ):
            x, y = x.double(), y.double()
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            self._gram += x.mT @ x
            self._cross += x.mT @ y
            self._missed += y.square().sum()
            self._target += o.double().square().sum()

    def gather(self, world: World) -> None:
        """Add what the other processes have seen."""
        self._gram, self._cross = world.sum(self._gram), world.sum(self._cross)
        self._missed, self._target = world.sum(self._missed), world.sum(self._target)

    def solve(self, ridge: float) -> Solution:
        """Weight and bias.

        Args:
            ridge: λ as a share of the mean eigenvalue of the linear branch's second moments; the
                bias is not regularized.
        """
        gram, cross = self._gram.cpu(), self._cross.cpu()
        penalty = torch.full((self._width + 1,), ridge * float(gram.diagonal()[:-1].mean()))
        penalty[-1] = 0
        # By singular values, as relu may leave channels of the branch empty.
        system = gram + torch.diag(penalty.double())
        found = torch.linalg.lstsq(system, cross, driver="gelsd").solution
        rest = self._missed.cpu() - (2 * cross - gram @ found).mul(found).sum()
        missed, target = float(self._missed), max(float(self._target), 1e-300)
        return Solution(
            found[:-1].mT.float().contiguous(),
            found[-1].float(),
            (missed / target) ** 0.5,
            (max(float(rest), 0.0) / target) ** 0.5,
        )


@dataclass(frozen=True)
class Solution:
    """One layer's projection.

    Attributes:
        weight, bias: of `proj_l`, (D, D) and (D,) float32.
        error_before, error_after: ‖sparse attention − dense‖ / ‖dense‖ without the linear branch,
            and with it.
    """

    weight: Tensor
    bias: Tensor
    error_before: float
    error_after: float


@torch.no_grad()
def solve_projections(
    teacher: Denoiser,
    sparsity: Sparsity,
    batches: Batches,
    positions: Sequence[int],
    levels: NoiseLevels,
    noise_levels: int,
    ridge: float,
    world: World,
    target: Attend = attend_densely,
    progress: Any = lambda done, total: None,
) -> dict[str, Solution]:
    """The projection of each self-attention layer, by the layer's name (`blocks.0.attn1`).

    Args:
        teacher: the dense model; its attention processors are exchanged meanwhile.
        positions: of the samples to look at; shared among the processes.
        noise_levels: at how many levels each is looked at.
        target: what sparse-linear attention shall come close to.
    """
    layers = dict(self_attentions(teacher.network))
    before = {name: layer.processor for name, layer in layers.items()}
    sums = {
        id(layer): Regression(layer.inner_dim // layer.heads, world.device)
        for layer in layers.values()
    }

    def record(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = target(attn, q, k, v)
        if number >= len(positions):
            return o
        linear = linear_branch(q, k, v, sparsity.feature_map)
        sums[id(attn)].add(linear, o.float() - sparse_branch(q, k, v, sparsity).float(), o)
        return o

    set_attention(teacher.network, record)
    rounds = -(-len(positions) // world.size)
    for index in range(rounds):
        # With FSDP all processes run alike; one too many sees a clip again, which does not count.
        number = index * world.size + world.rank
        batch = batches.at([positions[number % len(positions)]])
        for step in range(noise_levels):
            u = torch.full((1,), (step + 0.5) / noise_levels, device=world.device)
            t = levels.at(u)
            x = noisy(batch.latents, batch.noise(f"noise {step}"), t)
            teacher(x, t, batch.prompt_embeds)
            progress(index * noise_levels + step + 1, rounds * noise_levels)
    for each in sums.values():
        each.gather(world)
    for name, layer in layers.items():
        layer.set_processor(before[name])
    return {name: sums[id(layer)].solve(ridge) for name, layer in layers.items()}


def projection_values(solutions: dict[str, Solution]) -> dict[str, Tensor]:
    """The solutions as parameters, by name."""
    return {
        f"{layer}.{PROJECTION}.{kind}": getattr(solution, kind)
        for layer, solution in solutions.items()
        for kind in ("weight", "bias")
    }
