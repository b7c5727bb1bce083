"""Stage 1 of SLA2: routers and ratios are pulled to dense attention on a frozen model's q, k and v.

The loss is the mean over layers of ‖routed − dense‖² / ‖dense‖², the layers independent of each
other: dense attention's result is what the next layer sees. Blocks are chosen in a way that has a
derivative in training, and as the operator chooses them on held-out samples.
Source: SLA2, arXiv 2602.12675, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from turbo_opt.calibration.data.batches import Batch, generator_of
from turbo_opt.calibration.flow import Denoiser, NoiseLevels, noisy
from turbo_opt.calibration.sla.attention import Sparsity
from turbo_opt.calibration.sla.closed_form import attend_densely
from turbo_opt.calibration.sla.student import set_attention
from turbo_opt.calibration.sla2.compare import Choose, Seen, compare, keep_highest
from turbo_opt.calibration.sla2.router import Routers
from turbo_opt.calibration.training.objective import Loss
from turbo_opt.kernels.sparse_rules import block_count

ROUTERS = "routers"
QUERY_BLOCKS_AT_ONCE = 4
"""Of held-out samples, where all are looked at."""


class Heads(NamedTuple):
    """What a self-attention is given, (B, H, L, D) each."""

    q: Tensor
    k: Tensor
    v: Tensor

    def of(self, sample: int) -> Heads:
        """Those of one sample, (1, H, L, D)."""
        return Heads(*(x[sample : sample + 1] for x in self))


class RouterObjective:
    """See `turbo_opt.calibration.training.objective.Objective`.

    Args:
        routers: trained; called as a module, with several processes sharded.
        teacher: frozen; its attention processors are exchanged for ones that note q, k and v.
        levels: which noise levels are looked at.
        sparsity: how many blocks are kept, and of what size.
        choose: how blocks are chosen in training.
        query_blocks: how many of a sample a step looks at in every layer; None: all.
        unconditional_share: share of prompts replaced by the empty one.
    """

    name = "router"
    shipped = ROUTERS

    def __init__(
        self,
        routers: Routers,
        teacher: Denoiser,
        levels: NoiseLevels,
        sparsity: Sparsity,
        choose: Choose,
        query_blocks: int | None,
        unconditional_share: float,
    ) -> None:
        self.trained: Mapping[str, nn.Module] = {ROUTERS: routers}
        self.denoisers: Mapping[str, Denoiser] = {}
        self.teacher = teacher
        self._routers, self._levels, self._sparsity = routers, levels, sparsity
        self._choose, self._query_blocks = choose, query_blocks
        self._share = unconditional_share
        self._noted: list[Heads] = []
        set_attention(teacher.network, self._note)

    def turn(self, step: int) -> str:
        """All routers are trained together."""
        return ROUTERS

    def loss(self, batch: Batch, turn: str) -> Loss:
        """Mean over layers and samples of the squared relative error."""

        def error(layer: Any, heads: Heads) -> Tensor:
            # One sample's scores of a layer at a time: its products are made again in backward.
            parts = (Seen(*heads.of(i), self._some(batch, i, heads)) for i in range(len(heads.q)))
            found = [
                checkpoint(compare, layer, seen, self._sparsity, self._choose, use_reentrant=False)
                for seen in parts
            ]
            errors = [_squares(each.routed - each.dense) / _squares(each.dense) for each in found]
            return torch.stack(errors).mean()

        return Loss(torch.stack(self._routers(error, self._look(batch, self._share))).mean())

    def evaluate(self, batch: Batch) -> Mapping[str, Tensor]:
        """Relative errors, root mean squares over layers, with the blocks that the operator keeps.

        `relative_error` is that of routed attention, `sparse_error` that of its sparse branch
        alone, the other blocks left out; `loss` is the square of the first.
        """

        def errors(layer: Any, heads: Heads) -> Tensor:
            sums = torch.zeros(3, device=batch.latents.device)
            blocks = torch.arange(self._query_blocks_of(heads), device=heads.q.device)
            for chosen in blocks.split(QUERY_BLOCKS_AT_ONCE):
                found = compare(layer, Seen(*heads, chosen), self._sparsity, keep_highest)
                differences = (found.routed - found.dense, found.sparse - found.dense, found.dense)
                sums += torch.stack([_squares(x) for x in differences])
            return sums[:2] / sums[2]

        layers = self._routers(errors, self._look(batch, 0.0))
        routed, sparse = torch.stack(layers).mean(0)
        return {"loss": routed, "relative_error": routed.sqrt(), "sparse_error": sparse.sqrt()}

    @torch.no_grad()
    def _look(self, batch: Batch, empty_share: float) -> list[Heads]:
        """q, k and v of every self-attention of the teacher on a noisy batch."""
        t = self._levels.at(batch.uniform("noise level"))
        x = noisy(batch.latents, batch.noise("noise"), t)
        self._noted = []
        self.teacher(x, t, batch.with_empty_prompts(empty_share))
        noted, self._noted = self._noted, []
        return noted

    def _note(self, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._noted.append(Heads(q, k, v))
        return attend_densely(attn, q, k, v)

    def _some(self, batch: Batch, index: int, heads: Heads) -> Tensor:
        """The query blocks of a sample that a step looks at: by chance, alike in every layer."""
        generator = generator_of(batch.seed, batch.positions[index], "query blocks")
        drawn = torch.randperm(self._query_blocks_of(heads), generator=generator)
        return drawn[: self._query_blocks].to(heads.q.device)

    def _query_blocks_of(self, heads: Heads) -> int:
        return block_count(heads.q.shape[2], self._sparsity.block_q)


def _squares(x: Tensor) -> Tensor:
    return x.square().sum()
