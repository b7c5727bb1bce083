"""`turbo-opt calibrate data`: a set of samples from a teacher, or from videos."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turbo_opt.cli.devices import device_option, resolve_device
from turbo_opt.cli.session import Session, common_options, pass_session
from turbo_opt.errors import BadInput

if TYPE_CHECKING:
    from turbo_opt.calibration.data.samples import SampleIndex
    from turbo_opt.calibration.training.world import World
    from turbo_opt.cli.progress import Task
    from turbo_opt.config.schema import Recipe

    _Make = Callable[[World, Task], SampleIndex]

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
    "--videos",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of videos to encode in place of drawing clips, each with its caption beside it: "
    "clip.mp4 and clip.txt.",
)
@click.option(
    "--broken-share",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the videos that may be too short or damaged; they are left out.",
)
@click.option(
    "--count",
    type=click.IntRange(1, _MOST_CAPTIONS),
    help="How many clips.  [default: as many as captions or videos, or 64]",
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
    videos: Path | None,
    broken_share: float,
    count: int | None,
    batch: int,
    shard_size: int | None,
    seed: int,
    device: str,
) -> None:
    """Draw clips with RECIPE's model and keep their latents and text embeddings.

    The model runs as it is, without the recipe's passes, by its own sampler with the recipe's
    `generate` settings. With --videos, its VAE encodes videos of your own: the first num_frames
    at the recipe's `generate.fps`, scaled to cover its size. Stopped, the same command goes on.
    With torchrun, processes share the work.
    """
    from turbo_opt.cli.places import check_writable, plain_place
    from turbo_opt.cli.progress import Board
    from turbo_opt.cli.selection import select_recipe

    if videos is not None and captions is not None:
        raise BadInput("--captions: videos have theirs beside them; leave out one of the two")
    out = plain_place(out)
    check_writable(out)
    chosen = select_recipe(recipe, overrides=overrides)

    from turbo_opt.calibration.training.world import start_world

    make, total = (
        _drawn(chosen, _captions(chosen, captions, count, seed), out, seed, batch, shard_size)
        if videos is None
        else _encoded(chosen, videos, count, out, broken_share, shard_size)
    )
    session.when_stopped = "; the same command goes on from here"
    # Clips are made one after the other, so processes end as far apart as one batch takes.
    with start_world(resolve_device(device), patience=timedelta(days=7)) as world:
        session.quiet |= not world.is_main
        with Board(session) as board:
            task = board.task(f"{'draw' if videos is None else 'encode'} {total} clips")
            index = make(world, task)
            task.finish(f"{len(index.samples)} clips")
        left_out = total - len(index.samples)
        record = {
            "samples": str(out),
            "count": len(index.samples),
            "left_out": left_out,
            "latents": list(index.latents),
        }
        if world.is_main:
            shape = "×".join(map(str, index.latents))
            broken = f", {left_out} broken videos left out" if left_out else ""
            session.summary(
                record, f"{out}: {len(index.samples)} samples, latents of {shape}{broken}"
            )


def _drawn(
    recipe: Recipe, captions: list[str], out: Path, seed: int, batch: int, shard_size: int | None
) -> tuple[_Make, int]:
    """What draws clips of captions, and how many."""
    from turbo_opt.calibration.data.drawing import Drawing
    from turbo_opt.calibration.data.make import draw_samples

    generate = recipe.generate
    drawing = Drawing(
        **_common(recipe),
        num_inference_steps=generate.num_inference_steps,
        guidance_scale=generate.guidance_scale,
        flow_shift=generate.flow_shift,
        negative_prompt=generate.negative_prompt,
        seed=seed,
        compute_dtype="float32" if recipe.model.dtype == "float32" else "bfloat16",
    )

    def make(world: World, task: Task) -> SampleIndex:
        return draw_samples(
            drawing, captions, out, world,
            batch=batch, shard_size=shard_size, progress=_shown(task),
        )  # fmt: skip

    return make, len(captions)


def _encoded(
    recipe: Recipe,
    folder: Path,
    count: int | None,
    out: Path,
    broken_share: float,
    shard_size: int | None,
) -> tuple[_Make, int]:
    """What encodes a folder's videos, and how many."""
    from turbo_opt.calibration.data.make import encode_samples
    from turbo_opt.calibration.data.videos import Encoding, captioned_videos

    found = captioned_videos(folder.expanduser())
    if count is not None and count > len(found):
        raise BadInput(f"--count {count}: {folder} holds {len(found)} videos")
    chosen = found[:count]
    encoding = Encoding(**_common(recipe), fps=recipe.generate.fps)

    def make(world: World, task: Task) -> SampleIndex:
        return encode_samples(
            encoding, chosen, out, world,
            broken_share=broken_share, shard_size=shard_size, progress=_shown(task),
        )  # fmt: skip

    return make, len(chosen)


def _shown(task: Task) -> Callable[[int, int], None]:
    return lambda done, total: task.update(done, total, f"{done}/{total}")


def _common(recipe: Recipe) -> dict[str, Any]:
    """Settings of every set."""
    generate, folder = recipe.generate, recipe.model_folder()
    return {
        "source": str(folder) if folder is not None else recipe.model.source,
        "height": generate.height,
        "width": generate.width,
        "num_frames": generate.num_frames,
        "text_length": generate.max_sequence_length,
    }


def _captions(recipe: Recipe, path: Path | None, count: int | None, seed: int) -> list[str]:
    from turbo_opt.calibration.data.make import tiny_wan_captions
    from turbo_opt.config.schema import EMBEDDED_MODEL

    if path is None:
        if recipe.model.source != EMBEDDED_MODEL:
            raise BadInput(
                f"--captions: {recipe.model.source} has no captions of its own; give a text file "
                "with one a line, or --videos"
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
