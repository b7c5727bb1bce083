"""What each layer gets, by what `turbo-opt calibrate scales` measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from turbo_opt.compiler.base import LayerChoice
from turbo_opt.compiler.scales import AttentionScales, DenoiserScales
from turbo_opt.errors import BadInput
from turbo_opt.ir.program import Program

IN_16_BITS = "16 bits"
DIVIDED = "divided"
"""Choice of `balance-channels` for the layers of a group that it divides."""
_MEASURE_AGAIN = (
    "measure the layers of this model with `turbo-opt calibrate scales RECIPE --data SAMPLES "
    "--out FILE.json`"
)


@dataclass(frozen=True)
class Threshold:
    """When a linear layer is good enough.

    Attributes:
        judged_by: the prediction's SQNR with this layer alone quantized, or its own output's at the
            worst noise level.
        min_sqnr: in dB.
    """

    judged_by: Literal["prediction", "output"]
    min_sqnr: float


def choose_schemes(
    denoiser: str,
    layers: Mapping[Node, str],
    measured: DenoiserScales,
    divided: frozenset[str],
    schemes: Sequence[str],
    threshold: Threshold,
) -> dict[Node, LayerChoice]:
    """The first of `schemes` whose measured SQNR is high enough, else 16 bits, for every layer.

    Layers of one module that read one tensor are judged by the worst of them.

    Args:
        layers: linear layer → its name.
        divided: names of those whose channels `balance-channels` divided.

    Raises:
        BadInput: a layer, or the effects on the prediction, were not measured.
    """
    groups: dict[tuple[Node, str], list[Node]] = {}
    for node, module in layers.items():
        if module not in measured.linear:
            raise BadInput(
                f"the scales say nothing of {module}, which {denoiser} has; {_MEASURE_AGAIN}"
            )
        source = node.all_input_nodes[0]
        groups.setdefault((source, module.rpartition(".")[0]), []).append(node)
    sqnr = _measured_sqnr(measured, divided, threshold.judged_by)
    found = {}
    for nodes in groups.values():
        worst = {
            scheme: min((sqnr[layers[node]].get(scheme, -math.inf), layers[node]) for node in nodes)
            for scheme in schemes
        }
        fitting = (name for name in schemes if worst[name][0] >= threshold.min_sqnr)
        choice = next(fitting, IN_16_BITS)
        told = schemes[: schemes.index(choice) + 1] if choice in schemes else schemes
        for node in nodes:
            reason = "; ".join(_reason(scheme, *worst[scheme], layers[node]) for scheme in told)
            found[node] = LayerChoice(denoiser, layers[node], choice, reason)
    return found


def divided_layers(program: Program) -> dict[str, frozenset[str]]:
    """Network → the layers whose channels `balance-channels` has divided."""
    return {
        name: frozenset(
            str(choice["module"])
            for record in program.history
            for choice in record.get("choices", [])
            if choice["denoiser"] == name and choice["choice"] == DIVIDED
        )
        for name in program.denoisers
    }


def choose_shares(
    denoiser: str, layers: Sequence[str], measured: DenoiserScales, mean: float
) -> dict[str, tuple[float, LayerChoice]]:
    """A share of the key blocks for each self-attention, at most `mean` on average: those whose
    single errors are least, or `mean` for all where that was measured to be better.

    Raises:
        BadInput: a layer was not measured, or `mean` is below what was.
    """
    costs = share_costs(measured.attention, layers)
    shares, note = best_shares(mean, measured.topk, costs), ""
    for tried in measured.together:
        if math.isclose(tried.mean, mean) and tried.shares == shares:
            note = f"; all layers together {tried.error:.3g}, {tried.uniform_error:.3g} if alike"
            if tried.uniform_error <= tried.error:
                shares = dict.fromkeys(layers, mean)
    return {
        name: (
            share,
            LayerChoice(denoiser, name, f"topk {share:g}", _share_reason(measured, name) + note),
        )
        for name, share in shares.items()
    }


def share_costs(
    measured: Mapping[str, AttentionScales], layers: Sequence[str]
) -> dict[str, list[float]]:
    """What each share of `topk` costs each self-attention: the square of its effect on the
    prediction, or where that was not measured, of its own relative error, over noise levels.

    Raises:
        BadInput: a layer was not measured.
    """
    for name in layers:
        if name not in measured:
            raise BadInput(f"the scales say nothing of the self-attention {name}; {_MEASURE_AGAIN}")
    found = {name: measured[name] for name in layers}
    if all(each.prediction_errors for each in found.values()):
        return {
            name: [error**2 for error in each.prediction_errors] for name, each in found.items()
        }
    return {
        name: [sum(value**2 for value in levels) for levels in each.errors]
        for name, each in found.items()
    }


def best_shares(
    budget: float, topk: Sequence[float], costs: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """One of `topk` for each layer: the least sum of costs with a mean of at most `budget`.

    Exact, by dynamic programming over the sum of the shares so far.

    Args:
        topk: in rising order.
        costs: layer → what each of `topk` costs.

    Raises:
        BadInput: even the smallest share is above the budget.
    """
    units = [round(share * _UNITS) for share in topk]
    limit = math.floor(budget * _UNITS * len(costs) + 0.5)
    if costs and units[0] * len(costs) > limit:
        raise BadInput(
            f"topk {budget:g} is below {topk[0]:g}, the smallest share that the scales have; "
            f"measure it with turbo-opt calibrate scales --topk {budget:g}"
        )
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for left, layer in zip(reversed(range(len(costs))), costs.values(), strict=True):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (cost, picks) in best.items():
            for index, unit in enumerate(units):
                total = used + unit
                if total + left * units[0] > limit:
                    break
                candidate = (cost + layer[index], (*picks, index))
                if total not in reached or candidate < reached[total]:
                    reached[total] = candidate
        best = _undominated(reached)
    _, picks = min(best.values())
    return {name: topk[index] for name, index in zip(costs, picks, strict=True)}


_UNITS = 10_000


def _undominated(
    reached: Mapping[int, tuple[float, tuple[int, ...]]],
) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Those that no smaller sum of shares matches in cost."""
    kept: dict[int, tuple[float, tuple[int, ...]]] = {}
    least = math.inf
    for total in sorted(reached):
        if reached[total][0] < least:
            least = reached[total][0]
            kept[total] = reached[total]
    return kept


def _share_reason(measured: DenoiserScales, name: str) -> str:
    """The errors of a self-attention by share, as a report tells them."""
    each = measured.attention[name]
    errors = each.prediction_errors or tuple(max(levels) for levels in each.errors)
    what = "prediction off by" if each.prediction_errors else "output off by"
    told = (f"{error:.3g} at {share:g}" for share, error in zip(measured.topk, errors, strict=True))
    return f"{what} {', '.join(told)}"


def _measured_sqnr(
    measured: DenoiserScales, divided: frozenset[str], judged_by: str
) -> dict[str, Mapping[str, float]]:
    """Layer → scheme → dB, of the layer as it is in the program."""
    found: dict[str, Mapping[str, float]] = {}
    of_groups = {name: group for group in measured.balance for name in group.layers}
    for name in sorted(divided - of_groups.keys()):
        raise BadInput(
            f"the scales say nothing of {name} with its channels divided, as balance-channels has "
            "done; give both passes one file"
        )
    for name, layer in measured.linear.items():
        part = of_groups[name] if name in divided else None
        if judged_by == "output":
            levels = layer.sqnr if part is None else part.sqnr[name]
            found[name] = {scheme: min(values) for scheme, values in levels.items()}
        else:
            sqnr = layer.prediction_sqnr if part is None else part.prediction_sqnr.get(name, {})
            if not sqnr and layer.sqnr:
                raise BadInput(
                    "the scales hold no effects on the prediction, as they were measured with "
                    "--probes 0; set judged_by=output"
                )
            found[name] = dict(sqnr)
    return found


def _reason(scheme: str, decibels: float, worst: str, module: str) -> str:
    if decibels == -math.inf:
        return f"{scheme} does not fit {worst}"
    of = "" if worst == module else f" in {worst}, which reads the same"
    return f"{scheme} has {decibels:.1f} dB{of}"
