"""What sparsity costs self-attention: its own output, the prediction, one layer or all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from turbo_opt.calibration.scales.evaluations import Evaluations, look_away
from turbo_opt.calibration.scales.statistics import ErrorSums
from turbo_opt.calibration.sla.closed_form import attend_densely
from turbo_opt.calibration.sla.student import Attend
from turbo_opt.compiler.scales import AttentionScales, SharesTogether
from turbo_opt.passes._layer_choices import best_shares, share_costs


class AttentionErrors:
    """The sums of one network's self-attention layers, and what the file says of them."""

    def __init__(self, evaluations: Evaluations) -> None:
        self._evaluations = evaluations
        self._topk = evaluations.measuring.topk
        self._names = list(evaluations.attentions)
        levels, device = len(evaluations.times), evaluations.device
        self._outputs = {
            (name, share): ErrorSums(levels, device) for name in self._names for share in self._topk
        }
        self._predictions: dict[tuple[str, float], ErrorSums] = {}
        self._chosen: dict[float, dict[str, float]] = {}
        self._together: dict[tuple[float, bool], ErrorSums] = {}

    def comparing(self, level: int) -> Attend:
        """Dense attention that adds how far each share is off, at a noise level."""

        def attend(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o = attend_densely(attn, q, k, v)
            name = self._evaluations.name_of(attn)
            for share in self._topk:
                error = self._evaluations.sparse(attn, q, k, v, share).float() - o.float()
                self._outputs[name, share].add(level, o, error)
            return o

        return attend

    def predict(self) -> None:
        """Evaluate with one layer sparse, then with all: as their single errors suggest, and
        alike."""
        self._predictions = self._off(
            "effects of attention", {key: dict([key]) for key in self._outputs}
        )
        costs = share_costs({name: self.of(name) for name in self._names}, self._names)
        self._chosen = {mean: best_shares(mean, self._topk, costs) for mean in self._topk}
        alike = {mean: dict.fromkeys(self._names, mean) for mean in self._topk}
        variants = {(mean, False): shares for mean, shares in self._chosen.items()}
        variants |= {(mean, True): shares for mean, shares in alike.items()}
        self._together = self._off("all attention sparse", variants)

    def of(self, name: str) -> AttentionScales:
        """What the file says of one layer; of the prediction only after `predict`."""
        keys = [(name, share) for share in self._topk]
        return AttentionScales(
            errors=tuple(self._outputs[key].relative() for key in keys),
            prediction_errors=tuple(
                self._predictions[key].relative()[0] for key in keys if key in self._predictions
            ),
        )

    def together(self) -> tuple[SharesTogether, ...]:
        """What it says of all layers at once; nothing before `predict`."""
        return tuple(
            SharesTogether(
                mean=mean,
                shares=shares,
                error=self._together[mean, False].relative()[0],
                uniform_error=self._together[mean, True].relative()[0],
            )
            for mean, shares in self._chosen.items()
        )

    def _off(self, what: str, variants: Mapping[Any, Mapping[str, float]]) -> dict[Any, ErrorSums]:
        """How far the prediction is off with each variant: layer → share, the others dense."""
        sums = {key: ErrorSums(1, self._evaluations.device) for key in variants}
        steps = self._evaluations.variants_on_held_out(what, [None, *variants])
        expected = torch.empty(0)
        for step, key in steps:
            if key is None:
                expected = step.run()
                continue
            with self._evaluations.watched(look_away, self._sparse(variants[key])):
                sums[key].add(0, expected, step.run() - expected)
        return sums

    def _sparse(self, shares: Mapping[str, float]) -> Attend:
        """Attention with these shares; what is not named stays dense."""

        def attend(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            share = shares.get(self._evaluations.name_of(attn))
            if share is None:
                return attend_densely(attn, q, k, v)
            return self._evaluations.sparse(attn, q, k, v, share)

        return attend
