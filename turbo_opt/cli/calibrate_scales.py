"""`turbo-opt calibrate scales`: what each layer loses to 8 bits and to sparsity."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turbo_opt.cli.devices import device_option, resolve_device
from turbo_opt.cli.session import Session, common_options, pass_session
from turbo_opt.cli.tables import NOTHING, table
from turbo_opt.errors import BadInput

if TYPE_CHECKING:
    from turbo_opt.compiler.scales import DenoiserScales, LinearScales, Scales

_TOPK = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_SHOWN = 5
_SHARE = click.FloatRange(0, 1, min_open=True)


@click.command()
@click.argument("recipe", default="tiny-wan/cpu")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the recipe, such as model.source=./my-wan. May be repeated.",
)
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of samples, as `turbo-opt calibrate data` makes it.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The file to write, .json."
)
@click.option("--overwrite", is_flag=True, help="Replace an older file.")
@click.option(
    "--clips", type=click.IntRange(1), default=4, show_default=True, help="Clips for statistics."
)
@click.option(
    "--held-out",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Further clips, the last of the set, on which errors are measured.",
)
@click.option(
    "--noise-levels",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Noise levels at which each clip is looked at.",
)
@click.option(
    "--topk",
    "topk",
    type=_SHARE,
    multiple=True,
    default=_TOPK,
    show_default=True,
    help="Share of the key blocks that attention is tried with. May be repeated.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="How much of the activations' range balancing moves into the weights.",
)
@click.option(
    "--probes",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Backward passes for each clip and noise level that measure what linear layers do to the "
    "prediction; 0: no effects on it are measured, those of attention neither.",
)
@click.option(
    "--broken-share",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the samples that may be missing or broken; they are skipped.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the noise.")
@device_option
@common_options
@pass_session
def scales(
    session: Session,
    recipe: str,
    overrides: tuple[str, ...],
    data: Path,
    out: Path,
    overwrite: bool,
    device: str,
    **amount: Any,
) -> None:
    """Measure what each layer of RECIPE's model loses to 8 bits and to sparse attention.

    The model runs as it is, without the recipe's passes. Writes one file, which `quantize-linear`,
    `sparse-attention` and `balance-channels` take as their option `scales`. A model that does not
    fit into memory is read block by block.
    """
    import torch

    from turbo_opt.calibration.scales.run import Amount, measure_recipe
    from turbo_opt.cli.places import check_writable, plain_place
    from turbo_opt.cli.progress import Board
    from turbo_opt.cli.selection import checked_pipeline, select_recipe
    from turbo_opt.compiler.scales import write_scales

    out = plain_place(out)
    if out.suffix != ".json":
        raise BadInput(f"--out {out}: the file is JSON; name it .json")
    if os.path.lexists(out) and not (overwrite and out.is_file()):
        remedy = "--overwrite replaces it" if out.is_file() else "choose another --out"
        raise BadInput(f"{out}: is there already; {remedy}")
    check_writable(out)
    chosen = select_recipe(recipe, overrides=overrides)
    where = torch.device(resolve_device(device))
    with Board(session) as board:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = board.task(what)
            tasks[what].update(done, total, f"{done}/{total}")
            if done == total:
                tasks[what].finish(f"{total} evaluations")

        found = measure_recipe(
            chosen,
            checked_pipeline(chosen),
            data.expanduser(),
            Amount(**amount),
            where,
            progress,
        )
    write_scales(found, out)
    _show(session, found, out)


def _show(session: Session, found: Scales, out: Path) -> None:
    shown: list[Any] = []
    for name, network in found.denoisers.items():
        title = name if len(found.denoisers) > 1 else ""
        shown += [
            table((f"{title} worst layers".strip(), ">prediction, dB", ">output, dB"), rows)
            for rows in _worst_layers(network)
        ]
        columns = [f">{share:g}" for share in network.topk]
        of_outputs = {
            layer: [max(levels) for levels in each.errors]
            for layer, each in network.attention.items()
        }
        of_predictions = {
            layer: each.prediction_errors
            for layer, each in network.attention.items()
            if each.prediction_errors
        }
        for what, errors in (("attention", of_outputs), ("the prediction", of_predictions)):
            rows = [(name, *(f"{error:.3f}" for error in row)) for name, row in errors.items()]
            if rows:
                shown.append(table((f"error of {what} by topk", *columns), rows))
        shown.append(table(("channels divided", ">int8-block", ">fp8-block"), _gains(network)))
    session.summary(_record(found, out), *shown, f"{out}: {out.stat().st_size:,} bytes")


def _worst_layers(network: DenoiserScales) -> list[list[tuple[str, str, str]]]:
    """A table's rows for each scheme."""
    tables = []
    for scheme in _schemes(network):
        found = {name: layer for name, layer in network.linear.items() if scheme in layer.sqnr}
        worst = sorted(found, key=lambda name: _order(found[name], scheme))[:_SHOWN]
        rows = []
        for name in worst:
            effect = found[name].prediction_sqnr.get(scheme)
            shown = NOTHING if effect is None else f"{effect:.1f}"
            rows.append((f"{name}, {scheme}", shown, f"{min(found[name].sqnr[scheme]):.1f}"))
        tables.append(rows)
    return tables


def _order(layer: LinearScales, scheme: str) -> float:
    """The effect on the prediction, or where that is unknown, on the layer's output."""
    return layer.prediction_sqnr.get(scheme, min(layer.sqnr[scheme]))


def _schemes(network: DenoiserScales) -> list[str]:
    return sorted({scheme for layer in network.linear.values() for scheme in layer.sqnr})


def _gains(network: DenoiserScales) -> list[tuple[str, ...]]:
    """Rows: for each group by how many dB its errors fall."""
    return [
        (
            ", ".join(group.layers),
            *(f"{group.gain.get(scheme, 0.0):+.2f} dB" for scheme in ("int8-block", "fp8-block")),
        )
        for group in network.balance
    ]


def _record(found: Scales, out: Path) -> dict[str, Any]:
    return {
        "scales": str(out),
        "bytes": out.stat().st_size,
        "denoisers": {
            name: {
                "linear_layers": len(network.linear),
                "self_attentions": len(network.attention),
                "least_sqnr": {
                    scheme: min(
                        min(layer.sqnr[scheme])
                        for layer in network.linear.values()
                        if scheme in layer.sqnr
                    )
                    for scheme in _schemes(network)
                },
                "groups_that_gain": sum(bool(group.exponents) for group in network.balance),
            }
            for name, network in found.denoisers.items()
        },
    }
