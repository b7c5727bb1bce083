"""`turbo-opt generate`: a prompt into a clip."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click

from turbo_opt.cli.devices import device_option, resolve_device
from turbo_opt.cli.progress import Board, Task
from turbo_opt.cli.session import Session, common_options, pass_session
from turbo_opt.errors import BadInput

_SUFFIXES = (".mp4", ".gif", ".png")
_STAGES = {"text": "encode the prompt", "denoise": "denoise", "decode": "decode"}


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What the clip shows.")
@click.option("--negative-prompt", help="What guidance steers away from.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The clip: .mp4, .gif, or .png for a contact sheet.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the first noise; the same on every device.",
)
@click.option("--height", type=int, help="In pixels.  [default: the recipe's]")
@click.option("--width", type=int, help="In pixels.  [default: the recipe's]")
@click.option("--num-frames", type=int, help="4n+1.  [default: the recipe's]")
@click.option(
    "--fps",
    type=click.FloatRange(0, 1000, min_open=True),
    help="Frames per second of the file.  [default: the recipe's]",
)
@device_option
@click.option("--components", metavar="DIR", help="Diffusers folder with text encoder and VAE.")
@common_options
@pass_session
def generate(
    session: Session,
    artifact: Path,
    prompt: str,
    out: Path,
    seed: int,
    device: str,
    components: str | None,
    **given: Any,
) -> None:
    """Generate a clip with a compiled model."""
    if given["fps"] is not None and math.isnan(given["fps"]):
        raise BadInput("--fps nan: must be above 0 and at most 1000")
    out = out.expanduser()
    _check_file(out)
    from turbo_opt.artifact.load import load, read_limits
    from turbo_opt.artifact.manifest import read_manifest
    from turbo_opt.runtime.generate import check_clip, clip_options
    from turbo_opt.runtime.video import write_video

    device = resolve_device(device)
    artifact = artifact.expanduser()
    manifest = read_manifest(artifact)
    options = clip_options(manifest, **given)
    check_clip(artifact, manifest, read_limits(artifact, manifest), options, components)
    del given["fps"]
    session.when_stopped = f"; {out} was not written"
    with Board(session) as board:
        with board.step(f"load {artifact}"):
            loaded = load(artifact, device=device, components=components)
        stages = Stages(board)
        started = time.perf_counter()
        frames = loaded.generate(prompt, seed=seed, progress=stages, **given)
        seconds = time.perf_counter() - started
        write_video(frames, out, options.fps)
    count, height, width, _ = frames.shape
    record = {
        "clip": str(out),
        "frames": count,
        "height": height,
        "width": width,
        "fps": options.fps,
        "seconds": seconds,
        "seconds_by_stage": stages.seconds,
        "evaluations": loaded.schedule.evaluations,
        "seed": seed,
        "prompt": prompt,
        "device": device,
    }
    session.summary(
        record,
        f"{out}: {count} frames of {width}×{height} in {seconds:.2f} s "
        f"({loaded.schedule.evaluations} network evaluations on {device})",
    )


class Stages:
    """Shows the stages of one generation, and times them.

    Attributes:
        seconds: stage → seconds.
    """

    def __init__(self, board: Board, label: str = "") -> None:
        self.seconds: dict[str, float] = {}
        self._board = board
        self._label = label
        self._task: Task | None = None
        self._started = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """See `runtime.generate.Progress`."""
        if self._task is None:
            self._task = self._board.task(self._label + _STAGES.get(stage, stage))
            self._started = time.perf_counter()
        self._task.update(done, total, f"{done}/{total}" if total > 1 else "")
        if done == total:
            self.seconds[stage] = time.perf_counter() - self._started
            self._task.finish(f"{total} steps" if total > 1 else "")
            self._task = None


def _check_file(out: Path) -> None:
    """`out` is a file that can be written, of a kind that we write."""
    from turbo_opt.cli.places import check_writable

    if out.suffix.lower() not in _SUFFIXES:
        raise BadInput(f"{out}: cannot write {out.suffix or 'no suffix'!r}; use .mp4, .gif or .png")
    if out.is_dir():
        raise BadInput(f"{out}: is a folder")
    if not out.parent.is_dir():
        raise BadInput(f"{out}: the folder {out.parent} does not exist")
    check_writable(out)
