"""Measure one network: statistics on some clips, errors and effects on others.

Three rounds of evaluations, each with hooks that add to sums and keep no activation:

1. *statistics* of every linear layer's input;
2. on held-out clips, the *error* δ of every linear layer's output when it alone is quantized, with
   its channels as they are and divided, and of every self-attention at each topk. Each layer is
   given what the exact network gives it;
3. the *effects* on the prediction. Of linear layers, on the same clips, to first order and of all
   at once: for a Gaussian probe u as large as the prediction, E (uᵀJδ)² = ‖Jδ‖², and one backward
   pass gives uᵀJ at every layer. Blocks are computed again on the way back, so memory holds the
   activations of one. A mean of n probes is off by √(2/n) of itself. Of self-attention, whose
   errors are too large for that, by making one layer after the other sparse; and as such errors do
   not simply add up, the choice that `sparse-attention` would make of them is tried as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.flow import NoiseLevels
from turbo_opt.calibration.networks import DenoiserFolder
from turbo_opt.calibration.scales.attention import AttentionErrors
from turbo_opt.calibration.scales.balance import Group, balanced_groups, exponents, gain
from turbo_opt.calibration.scales.evaluations import Evaluations, LinearHook, Measuring, Told
from turbo_opt.calibration.scales.quantized import LayerErrors, forms_of
from turbo_opt.calibration.scales.statistics import EffectSums, ErrorSums, InputSums, rounded
from turbo_opt.compiler.scales import (
    BalancedLayers,
    DenoiserScales,
    LinearScales,
    architecture_of,
)


@torch.no_grad()
def measure_denoiser(
    folder: DenoiserFolder,
    samples: SampleSet,
    levels: NoiseLevels,
    measuring: Measuring,
    device: torch.device,
    progress: Told = lambda what, done, total: None,
    whole: bool | None = None,
) -> DenoiserScales:
    """What the file says of one network.

    Args:
        samples: as many that are not broken as are measured on, or more.
        whole: see `blockwise_network`.

    Raises:
        BadInput: no clip can be read, or a weight is missing.
        TurboOptError: a prediction is not finite.
    """
    evaluations = Evaluations(folder, samples, levels, measuring, device, progress, whole)
    inputs = _observe(evaluations)
    divisions = _divisions(evaluations, inputs)
    linear, attention = _LinearErrors(evaluations, divisions), AttentionErrors(evaluations)
    for step in evaluations.on_held_out("errors"):
        with evaluations.watched(linear.comparing(step.level), attention.comparing(step.level)):
            step.run()
    if measuring.probes:
        linear.probe()
        attention.predict()
    return DenoiserScales(
        architecture=architecture_of(folder.class_name, folder.config),
        noise_levels=tuple(map(rounded, evaluations.times.tolist())),
        topk=measuring.topk,
        block_q=measuring.block_q,
        block_k=measuring.block_k,
        linear={
            name: LinearScales(
                shape=(layer.out_features, layer.in_features),
                input=inputs[name].statistics(),
                sqnr=linear.sqnr(name, divided=False),
                prediction_sqnr=linear.prediction_sqnr(name, divided=False),
            )
            for name, layer in evaluations.linear.items()
        },
        attention={name: attention.of(name) for name in evaluations.attentions},
        together=attention.together(),
        balance=tuple(linear.balanced(group) for group in divisions),
    )


def _observe(evaluations: Evaluations) -> dict[str, InputSums]:
    """Statistics of every linear layer's input."""
    levels, device = len(evaluations.times), evaluations.device
    sums = {
        name: InputSums(levels, layer.in_features, device)
        for name, layer in evaluations.linear.items()
    }

    def adding(level: int) -> LinearHook:
        return lambda name, layer, x, y: sums[name].add(level, x)

    for step in evaluations.on_clips("statistics"):
        with evaluations.watched(adding(step.level)):
            step.run()
    return sums


def _divisions(evaluations: Evaluations, inputs: Mapping[str, InputSums]) -> dict[Group, Tensor]:
    """Group → (K,) exponents of what its channels may be divided by."""
    found = {}
    for group in balanced_groups(evaluations.network):
        weights = [
            evaluations.checkpoint.weights[f"{name}.weight"].load().abs().amax(0).float()
            for name in group
        ]
        found[group] = exponents(
            inputs[group[0]].channel_amax.cpu(),
            torch.stack(weights).amax(0),
            evaluations.measuring.alpha,
        )
    return found


class _LinearErrors:
    """The sums of the linear layers, and what the file says of them."""

    def __init__(self, evaluations: Evaluations, divisions: Mapping[Group, Tensor]) -> None:
        self._evaluations, self._divisions = evaluations, divisions
        self._divisors = {
            name: torch.exp2(exponent.float()).to(evaluations.device)
            for group, exponent in divisions.items()
            for name in group
        }
        self._forms = {
            name: forms_of(name, layer, self._divisors)
            for name, layer in evaluations.linear.items()
        }
        forms = [form for found in self._forms.values() for form in found]
        levels, device = len(evaluations.times), evaluations.device
        self._errors = {form: ErrorSums(levels, device) for form in forms}
        self._effects = {form: EffectSums(device) for form in forms}
        self._signal = EffectSums(device)

    def comparing(self, level: int) -> LinearHook:
        """A hook that adds how far each form's output is off, at a noise level."""

        def look(name: str, layer: nn.Linear, x: Tensor, y: Tensor) -> None:
            errors = LayerErrors(layer.weight, layer.bias, self._divisors.get(name))
            for _, expected, added in errors.of(x, self._forms[name]):
                for form, error in added.items():
                    self._errors[form].add(level, expected, error)

        return look

    def probe(self) -> None:
        """Sum up the effects of the linear layers' errors on the prediction."""
        with self._evaluations.watched(self._probe_linear):
            for step in self._evaluations.on_held_out("effects of linear layers"):
                for number in range(self._evaluations.measuring.probes):
                    self._signal.add(step.probe(number).norm())

    def sqnr(self, name: str, divided: bool) -> dict[str, tuple[float, ...]]:
        """Scheme → dB of a linear layer's output at each noise level."""
        return {
            form.scheme: self._errors[form].sqnr()
            for form in self._forms[name]
            if form.divided == divided
        }

    def prediction_sqnr(self, name: str, divided: bool) -> dict[str, float]:
        """Scheme → dB of the prediction; empty before `probe`."""
        return {
            form.scheme: self._effects[form].sqnr(self._signal)
            for form in self._forms[name]
            if form.divided == divided and self._effects[form].count
        }

    def balanced(self, group: Group) -> BalancedLayers:
        """What the file says of a group whose channels may be divided."""
        plain = {name: self.sqnr(name, divided=False) for name in group}
        divided = {name: self.sqnr(name, divided=True) for name in group}
        gains = {
            scheme: gain(
                {name: plain[name][scheme] for name in group},
                {name: divided[name][scheme] for name in group},
            )
            for scheme in divided[group[0]]
        }
        useful = any(value > 0 for value in gains.values())
        return BalancedLayers(
            layers=group,
            sqnr=divided,
            prediction_sqnr={name: self.prediction_sqnr(name, divided=True) for name in group},
            gain=gains,
            exponents=tuple(self._divisions[group].tolist()) if useful else (),
        )

    def _probe_linear(self, name: str, layer: nn.Linear, x: Tensor, y: Tensor) -> None:
        if not y.requires_grad:
            return
        # The layer's weight may be given up before the gradient comes.
        errors = LayerErrors(layer.weight, layer.bias, self._divisors.get(name))
        x = x.detach()

        def look(gradient: Tensor) -> None:
            forms = self._forms[name]
            inner = dict.fromkeys(forms, torch.zeros((), device=x.device))
            rows_of = gradient.flatten(0, -2)
            for rows, _, added in errors.of(x, forms):
                for form, error in added.items():
                    inner[form] = inner[form] + (rows_of[rows].float() * error).sum()
            for form, value in inner.items():
                self._effects[form].add(value)

        y.register_hook(look)
