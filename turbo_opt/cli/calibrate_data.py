"""`turbo-opt calibrate data`: a set of samples from a teacher."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from turbo_opt.cli.devices import device_option, resolve_device
from turbo_opt.cli.session import Session, common_options, pass_session
from turbo_opt.errors import BadInput

if TYPE_CHECKING:
    from turbo_opt.calibration.data.make import Making
    from turbo_opt.config.schema import Recipe

_MOST_CAPTIONS = 10_000_000


@click.command()
@click.argument("recipe", default="tiny-wan/cpu")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the recipe, such as generate.height=64. May be repeated.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the samples."
)
@click.option(
    "--captions",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Text file, one caption a line.  [default: tiny-wan's own captions]",
)
@click.option(
    "--count",
    type=click.IntRange(1, _MOST_CAPTIONS),
    help="How many clips.  [default: as many as captions, or 64]",
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Clips drawn at once."
)
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    help="Keep samples in tar shards of this many, which WebDataset reads too.  [default: a file "
    "for each]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the first noise, and of tiny-wan's captions.",
)
@device_option
@common_options
@pass_session
def data(
    session: Session,
    recipe: str,
    overrides: tuple[str, ...],
    out: Path,
    captions: Path | None,
    count: int | None,
    batch: int,
    shard_size: int | None,
    seed: int,
    device: str,
) -> None:
    """Draw clips with RECIPE's model and keep their latents and text embeddings.

    The model runs as it is, without the recipe's passes, by its own sampler with the recipe's
    `generate` settings. Stopped, the same command goes on. With torchrun, processes share the work.
    """
    from turbo_opt.cli.places import check_writable, plain_place
    from turbo_opt.cli.progress import Board
    from turbo_opt.cli.selection import select_recipe

    out = plain_place(out)
    check_writable(out)
    chosen = select_recipe(recipe, overrides=overrides)

    from turbo_opt.calibration.data.make import make_samples
    from turbo_opt.calibration.training.world import start_world

    lines = _captions(chosen, captions, count, seed)
    session.when_stopped = "; the same command goes on from here"
    # Clips are drawn one after the other, so processes end as far apart as one batch takes.
    with start_world(resolve_device(device), patience=timedelta(days=7)) as world:
        session.quiet |= not world.is_main
        with Board(session) as board:
            task = board.task(f"draw {len(lines)} clips")
            index = make_samples(
                _making(chosen, seed),
                lines,
                out,
                world,
                batch=batch,
                shard_size=shard_size,
                progress=lambda done, total: task.update(done, total, f"{done}/{total}"),
            )
            task.finish(f"{len(lines)} clips")
        record = {"samples": str(out), "count": len(lines), "latents": list(index.latents)}
        if world.is_main:
            shape = "×".join(map(str, index.latents))
            session.summary(record, f"{out}: {len(lines)} samples, latents of {shape}")


def _captions(recipe: Recipe, path: Path | None, count: int | None, seed: int) -> list[str]:
    from turbo_opt.calibration.data.make import tiny_wan_captions
    from turbo_opt.config.schema import EMBEDDED_MODEL

    if path is None:
        if recipe.model.source != EMBEDDED_MODEL:
            raise BadInput(
                f"--captions: {recipe.model.source} has no captions of its own; give a text file "
                "with one a line"
            )
        return tiny_wan_captions(count or 64, seed)
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise BadInput(f"{path}: holds no captions")
    if count is not None and count > len(lines):
        raise BadInput(f"--count {count}: {path} holds {len(lines)} captions")
    return lines[:count]


def _making(recipe: Recipe, seed: int) -> Making:
    from turbo_opt.calibration.data.make import Making

    generate = recipe.generate
    folder = recipe.model_folder()
    return Making(
        source=str(folder) if folder is not None else recipe.model.source,
        height=generate.height,
        width=generate.width,
        num_frames=generate.num_frames,
        num_inference_steps=generate.num_inference_steps,
        guidance_scale=generate.guidance_scale,
        flow_shift=generate.flow_shift,
        negative_prompt=generate.negative_prompt,
        text_length=generate.max_sequence_length,
        seed=seed,
        compute_dtype="float32" if recipe.model.dtype == "float32" else "bfloat16",
    )
