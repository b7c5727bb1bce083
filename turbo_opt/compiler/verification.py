"""Numeric verification of single rewrites: before and after, same inputs, real weights."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from turbo_opt.compiler.base import Numerics
from turbo_opt.compiler.evaluate import PieceEvaluator
from turbo_opt.errors import BudgetExceeded
from turbo_opt.ir.edit import module_path
from turbo_opt.ir.program import Denoiser

DEFAULT_BUDGETS: Mapping[Numerics, Mapping[torch.dtype, float]] = {
    Numerics.EXACT: {},
    # A result rounded to a mantissa of b bits differs from another rounding of the same value
    # by half a step on average: about 6.02·b + 7 dB. The budgets leave one bit for the order
    # of a reduction.
    Numerics.REORDERS: {torch.float32: 110.0, torch.float16: 60.0, torch.bfloat16: 42.0},
    # 128-block int8 has 0.013 relative error on Gaussian data (37.7 dB), block fp8 0.037
    # (28.6 dB); trained weights with outliers cost a few dB.
    Numerics.QUANTIZES: dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 25.0),
}
"""Least SQNR in dB of a rewrite by numerics tier and result dtype; `exact` means bit for bit,
`retrained` has no local budget."""


def sqnr_db(reference: Tensor, result: Tensor) -> float:
    """Signal to quantization noise ratio, 10·log10(Σ ref² / Σ (ref − result)²), in dB.

    Infinite for equal tensors, minus infinity when the result holds NaN or infinity that the
    reference does not.
    """
    reference, result = reference.double(), result.double()
    noise = (reference - result).square().sum().item()
    if math.isnan(noise) or math.isinf(noise):
        return math.inf if torch.equal(reference, result) else -math.inf
    if noise == 0:
        return math.inf
    signal = reference.square().sum().item()
    return 10 * math.log10(signal / noise) if signal else -math.inf


@dataclass(frozen=True)
class Check:
    """The comparison of one match."""

    denoiser: str
    node: str
    module: str
    sqnr_db: float


class LocalVerifier:
    """Checks rewrites of one pass run against a budget and remembers the results.

    Args:
        numerics: the pass's tier, which sets the budget.
        minimum_db: overrides the tier's budget.
        seed: of the inputs.
        share: fraction of the matches to check (the first is always checked).
    """

    def __init__(
        self,
        numerics: Numerics,
        *,
        minimum_db: float | None = None,
        seed: int = 0,
        share: float = 1.0,
    ) -> None:
        self.checks: list[Check] = []
        self._numerics = numerics
        self._minimum_db = minimum_db
        self._seed = seed
        self._share = share
        self._random = random.Random(seed)
        self._evaluator: PieceEvaluator | None = None
        self._graph: Any = None

    def check(
        self,
        denoiser: Denoiser,
        before: Node,
        after: Node,
        inputs: Sequence[Node],
        observe: Callable[[Any], Tensor] | None = None,
        at: Node | None = None,
    ) -> None:
        """Compare `after` with `before`; see `PassContext.verify`.

        Raises:
            BudgetExceeded: the SQNR is below the budget.
        """
        if self.checks and self._random.random() >= self._share:
            return
        if self._graph is not denoiser.exported:
            self._evaluator, self._graph = PieceEvaluator(denoiser, self._seed), denoiser.exported
        assert self._evaluator is not None
        with torch.no_grad():
            expected, found = self._evaluator.run([before, after], inputs)
        if observe is not None:
            expected, found = observe(expected), observe(found)
        place = at or before
        check = Check(denoiser.name, place.name, module_path(place), sqnr_db(expected, found))
        self.checks.append(check)
        self._judge(check, expected, found)

    def worst(self) -> Check | None:
        """The check with the least SQNR, None before the first."""
        return min(self.checks, key=lambda check: check.sqnr_db, default=None)

    def _judge(self, check: Check, expected: Tensor, found: Tensor) -> None:
        where = f"{check.denoiser}, node {check.node} in {check.module or 'the top module'}"
        if expected.shape != found.shape or expected.dtype != found.dtype:
            raise BudgetExceeded(
                f"{where}: the replacement gives {found.dtype} {list(found.shape)} "
                f"instead of {expected.dtype} {list(expected.shape)}"
            )
        minimum = self._budget(expected.dtype)
        if minimum is not None and check.sqnr_db < minimum:
            raise BudgetExceeded(
                f"{where}: the replacement is at {check.sqnr_db:.1f} dB SQNR of the original, "
                f"the budget of {self._numerics.value!r} is {minimum:.1f} dB"
            )

    def _budget(self, dtype: torch.dtype) -> float | None:
        if self._minimum_db is not None:
            return self._minimum_db
        if self._numerics is Numerics.EXACT:
            return math.inf
        return DEFAULT_BUDGETS.get(self._numerics, {}).get(dtype)
