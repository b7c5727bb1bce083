"""`turbo-opt calibrate convert`: weights from one layout into another."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_opt.cli.session import Session, common_options, pass_session


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--network",
    default="student",
    show_default=True,
    help="Which network of a training checkpoint.",
)
@click.option(
    "--no-average", is_flag=True, help="Its weights themselves, not their moving average."
)
@click.option(
    "--int8",
    is_flag=True,
    help="The blocks' linear layers in int8, as TurboDiffusion's -quant.pth; OUT is a .pth.",
)
@common_options
@pass_session
def convert(
    session: Session, source: Path, out: Path, network: str, no_average: bool, int8: bool
) -> None:
    """Write the weights in SOURCE as OUT: .safetensors, .pth or .dcp.

    SOURCE is a DCP folder (such as OUT/checkpoints/step-000200 of a job), a safetensors or .pth
    file, or a diffusers folder. A .pth has the names of the original Wan, as TurboDiffusion reads
    them, all others those of diffusers. That they are a distilled student is kept: for a .pth in
    a JSON file beside it, which belongs to it.
    """
    from turbo_opt.calibration.convert import check_destination, convert
    from turbo_opt.cli.places import check_writable, plain_place

    source, out = source.expanduser(), plain_place(out)
    check_destination(out, int8)
    check_writable(out)
    count = convert(source, out, network, average=not no_average, int8=int8)
    session.summary({"weights": str(out), "tensors": count}, f"{out}: {count} weights")
