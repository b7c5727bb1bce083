"""What a pass is given besides the program: the target, and a way to prove each rewrite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from turbo_opt.compiler.verification import LocalVerifier
from turbo_opt.ir.program import Denoiser
from turbo_opt.targets import Target

Observe = Callable[[Any], Tensor]
"""Maps an operator's result to the tensor that is compared (dequantizes a quantized pair)."""


@dataclass
class PassContext:
    """Services for one pass run.

    Attributes:
        verifier: compares each match with its replacement; None when planning without weights.
        tick: called once for each match, for progress.
        target: the machine to compile for; None when none was named.
        checkpoints: the recipe's `weights`: name → path or hub id.
    """

    verifier: LocalVerifier | None = None
    tick: Callable[[], None] = field(default=lambda: None)
    target: Target | None = None
    checkpoints: Mapping[str, str] = field(default_factory=dict)

    def verify(
        self,
        denoiser: Denoiser,
        before: Node,
        after: Node,
        inputs: Sequence[Node],
        observe: Observe | None = None,
        at: Node | None = None,
    ) -> None:
        """Run both forms on the same seeded inputs with the real weights and compare them.

        Both nodes are in the graph, and both depend on nothing but `inputs` and weights. Reports
        name the node `at`, by default `before`.

        Raises:
            BudgetExceeded: the replacement is further off than the tier's budget, with the node.
        """
        if self.verifier is not None:
            self.verifier.check(denoiser, before, after, inputs, observe, at)
