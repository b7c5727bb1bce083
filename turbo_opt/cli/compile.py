"""A recipe into an artifact on disk, with progress: what `run` and `demo` do."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbo_opt.cli.places import clear_dump, existing_parent, reproducer_of
from turbo_opt.cli.progress import Board, Task
from turbo_opt.cli.tables import agreement, decibels, size
from turbo_opt.compiler.instruments import BaseInstrument, Instrument, IRDump
from turbo_opt.compiler.records import pass_row
from turbo_opt.errors import BadInput, TurboOptError

if TYPE_CHECKING:
    from turbo_opt.compiler.build import Built
    from turbo_opt.compiler.validation import PlannedPass
    from turbo_opt.config.schema import Recipe
    from turbo_opt.ir.program import Program

_OTHER_BYTES = 64 * 2**20
"""Room for graphs, replay pairs and reports beside the weights."""


@dataclass(frozen=True)
class Compilation:
    """What to compile and where to.

    Attributes:
        pipeline: the recipe's passes, checked.
        cache: folder of the pass cache; None keeps none.
    """

    recipe: Recipe
    pipeline: list[PlannedPass]
    out: Path
    resume: bool = False
    overwrite: bool = False
    cache: Path | None = None
    dump_ir: Path | None = None


@dataclass(frozen=True)
class Compiled:
    """What came of it.

    Attributes:
        records: one for every pass run, as in the history; `cached` where it came from the cache.
        end_to_end: denoiser → SQNR in dB of one whole evaluation, where the recipe asks for it.
        seconds: of everything.
        stage_seconds: of `capture`, `plan`, `passes`, `end_to_end`, `weights` (their stream from
            disk to disk) and `save`, what else an artifact takes.
    """

    built: Built
    records: list[dict[str, Any]]
    out: Path
    seconds: float
    end_to_end: Mapping[str, float] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        from turbo_opt.artifact.manifest import jsonable

        rows = [pass_row(record) for record in self.records]
        totals = {
            "seconds": self.seconds,
            "pass_seconds": sum(row["seconds"] for row in rows),
            "stage_seconds": dict(self.stage_seconds),
            "weight_bytes_before": self.built.captured.weight_bytes,
            "weight_bytes_after": self.built.optimized.weight_bytes,
            "evaluations": self.built.optimized.schedule.evaluations,
            "end_to_end_sqnr_db": dict(self.end_to_end),
        }
        record = {"artifact": str(self.out), "passes": rows, "totals": totals}
        return jsonable(record)  # type: ignore[no-any-return]


def compile_recipe(work: Compilation, board: Board) -> Compiled:
    """Capture, run the passes, compare end to end if asked for, and save.

    Raises:
        BadInput: the recipe does not fit the model, or the disk is too small; nothing was written.
        PassFailed, BudgetExceeded: a pass failed; a reproducer lies beside `out`, no artifact.
    """
    from turbo_opt.artifact.save import save
    from turbo_opt.compiler.build import build

    clock = _Clock()
    watching = PassProgress(board, len(work.pipeline))
    instruments: list[Instrument] = [watching]
    if work.dump_ir is not None:
        instruments.append(IRDump(work.dump_ir))
    with _recipe_in_reproducer(work), _Capture(board) as capturing:
        built = build(
            work.recipe,
            instruments=instruments,
            cache_folder=work.cache,
            resume=work.resume,
            reproducer=reproducer_of(work.out),
            capturing=capturing,
            check=lambda program: _check_before_work(work, program, capturing, clock),
        )
    clock.lap("passes")
    end_to_end = _end_to_end(work.recipe, built, board)
    clock.lap("end_to_end")
    saving, began = board.task("save", bytes_unit=True), time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        clock.lap(stage if "save" in clock.seconds else "save")
        saving.update(done, total)

    save(
        built.optimized,
        work.out,
        recipe=work.recipe.canonical(),
        target=work.recipe.target,
        kernels=_providers(work.recipe, built.optimized),
        resume=work.resume,
        overwrite=work.overwrite,
        progress=progress,
        report={"metrics": {f"{k}, end to end": decibels(v) for k, v in end_to_end.items()}},
    )
    written = built.optimized.weight_bytes
    saving.finish(f"{size(written)}, {size(written / (time.perf_counter() - began))}/s")
    clock.lap("save")
    seconds = sum(clock.seconds.values())
    return Compiled(built, watching.records, work.out, seconds, end_to_end, clock.seconds)


class _Clock:
    """How long the stages took, each until the next began; one may come again.

    Attributes:
        seconds: by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What went on until now was `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def _providers(recipe: Recipe, program: Program) -> dict[str, dict[str, int]]:
    """What the manifest records of the kernels; nothing where the clip's latent size is unknown."""
    from turbo_opt.cli.clip_size import granularity, latent_shape
    from turbo_opt.compiler.providers import chosen_providers
    from turbo_opt.targets import get_target

    grain = granularity(program)
    if grain is None:
        return {}
    latent, text_tokens = latent_shape(recipe, grain), recipe.generate.max_sequence_length
    return chosen_providers(program, get_target(recipe.target), latent, text_tokens)


class PassProgress(BaseInstrument):
    """Shows every pass as a step, and keeps the records.

    Attributes:
        records: what `after_pass` was given, in order.
    """

    def __init__(self, board: Board, count: int) -> None:
        self.records: list[dict[str, Any]] = []
        self._board = board
        self._count = count
        self._task: Task | None = None
        self._matches = 0

    def before_pass(self, index: int, planned: PlannedPass, program: Program) -> None:
        """See Instrument."""
        self._task = self._board.task(f"{index + 1}/{self._count} {planned.spec.name}")
        self._matches = 0

    def match_found(self) -> None:
        """See Instrument."""
        self._matches += 1
        if self._task is not None:
            self._task.update(0, None, f"{self._matches} matches")

    def after_pass(self, index: int, record: dict[str, Any], program: Program) -> None:
        """See Instrument."""
        task = self._task or self._board.task(f"{index + 1}/{self._count} {record['name']}")
        self._task = None
        self.records.append(record)
        row = pass_row(record)
        found = "from the cache" if row["cached"] else agreement(row)
        task.finish(f"{row['matches']} matches, {found}")


class _Capture:
    """Shows the tracing of each denoiser as a step; call it with the next one's name."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._task: Task | None = None

    def __enter__(self) -> _Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self._task = None

    def __call__(self, name: str) -> None:
        self.done()
        self._task = self._board.task(f"capture {name}")

    def done(self) -> None:
        """The last one is traced."""
        if self._task is not None:
            self._task.finish()
        self._task = None


def _check_before_work(
    work: Compilation, program: Program, capture: _Capture, clock: _Clock
) -> None:
    """Plan on the captured graphs: what is wrong with options or sizes shows before a weight is
    read; then there must be room for the result. Passes that verify nothing read no weight, so
    planning is left to them, and the look at the disk to `save`."""
    from turbo_opt.artifact.staging import check_space
    from turbo_opt.cli.clip_size import check_clip_size
    from turbo_opt.compiler.manager import PassManager, Verification

    capture.done()
    clock.lap("capture")
    check_clip_size(work.recipe, program)
    planned = None
    if work.recipe.verify.mode != "off":
        try:
            planned = PassManager(work.pipeline, verification=Verification("off")).run(program)
        except BadInput:
            raise
        except TurboOptError:
            pass  # the run itself meets it again, and leaves a reproducer
    if planned is not None and not work.resume:
        check_space(existing_parent(work.out), planned.weight_bytes + _OTHER_BYTES)
    if work.dump_ir is not None:
        clear_dump(work.dump_ir)
    clock.lap("plan")


def _end_to_end(recipe: Recipe, built: Built, board: Board) -> dict[str, float]:
    if not recipe.verify.end_to_end or recipe.verify.mode == "off":
        return {}
    from turbo_opt.compiler.end_to_end import compare_end_to_end

    task = board.task("end to end")
    found = compare_end_to_end(built.captured, built.optimized, seed=recipe.verify.seed)
    task.finish(", ".join(f"{name} {decibels(value)}" for name, value in found.items()))
    return found


@contextlib.contextmanager
def _recipe_in_reproducer(work: Compilation) -> Iterator[None]:
    """Put the recipe into the reproducer of a failing pass: its budgets decide the failure."""
    place = reproducer_of(work.out)
    try:
        yield
    except TurboOptError as error:
        if error.exit_code != 2 and place.is_dir():
            record = work.recipe.canonical() | {"weights": work.recipe.checkpoints()}
            text = json.dumps(record, indent=1)
            (place / "recipe.json").write_text(text + "\n", encoding="utf-8")
        raise
