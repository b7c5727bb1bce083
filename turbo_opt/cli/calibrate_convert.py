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
    metavar="NAME",
    help="Which network of a DCP folder: of a job's checkpoint `student` or another, by default "
    "`student`; of another program's, what stands before the names of its weights, like net_ema, "
    "by default the only one.",
)
@click.option(
    "--no-average", is_flag=True, help="Its weights themselves, not their moving average."
)
@click.option(
    "--int8",
    is_flag=True,
    help="The blocks' linear layers in int8, as TurboDiffusion's -quant.pth; OUT is a .pth.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Precision of the weights but those of sparse attention, which become float32; by "
    "default as they are stored.",
)
@common_options
@pass_session
def convert(
    session: Session,
    source: Path,
    out: Path,
    network: str | None,
    no_average: bool,
    int8: bool,
    dtype: str | None,
) -> None:
    """Write the weights in SOURCE as OUT: .safetensors, .pth or .dcp.

    SOURCE is a DCP folder (such as OUT/checkpoints/step-000200 of a job), a safetensors or .pth
    file, or a diffusers folder. A .pth has the names of the original Wan, as TurboDiffusion reads
    them, all others those of diffusers. That they are a distilled student is kept: for a .pth in
    a JSON file beside it, which belongs to it.
    """
    import torch

    from turbo_opt.calibration.convert import check_destination, convert
    from turbo_opt.cli.places import check_writable, plain_place

    source, out = source.expanduser(), plain_place(out)
    check_destination(out, int8)
    check_writable(out)
    count = convert(
        source,
        out,
        network,
        average=not no_average,
        int8=int8,
        dtype=getattr(torch, dtype) if dtype else None,
        say=lambda text: session.note(f"note: {text}"),
    )
    session.summary({"weights": str(out), "tensors": count}, f"{out}: {count} weights")
