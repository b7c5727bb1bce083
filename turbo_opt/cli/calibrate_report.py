"""How far a training job is, and what it ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from turbo_opt.cli.session import Session

if TYPE_CHECKING:
    from turbo_opt.cli.progress import Board, Task


class Steps:
    """Shows how far a job is."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._tasks: dict[str, Task] = {}

    def say(self, text: str) -> None:
        """See `turbo_opt.calibration.places.Say`."""
        self._board.session.note(f"note: {text}")

    def __call__(self, what: str, done: int, total: int, note: str) -> None:
        """See `turbo_opt.calibration.places.Progress`."""
        if what not in self._tasks:
            self._tasks[what] = self._board.task(what)
        self._tasks[what].update(done, total, f"{done}/{total} {note}".strip())
        if done == total:
            self._tasks[what].finish(f"{total} steps {note}".strip())


def show_report(session: Session, report: Mapping[str, Any]) -> None:
    """Held-out values before and after, what the closed form found, notes, and the place."""
    from turbo_opt.cli.tables import seconds, table

    rows = [
        (name.removeprefix("held_out_").replace("_", " "), f"{before:.4g}", f"{after:.4g}")
        for name, before in report["before"].items()
        for after in [report["after"][name]]
    ]
    shown: list[Any] = [table(("held-out samples", ">before", ">after"), rows)] if rows else []
    layers = report.get("layers", {})
    if layers:
        errors = [
            (name, f"{each['error_before']:.4f}", f"{each['error_after']:.4f}")
            for name, each in layers.items()
        ]
        shown.append(table(("error of attention", ">sparse alone", ">with proj_l"), errors))
        before, after = (report[when].get("held_out_loss", 0.0) for when in ("before", "after"))
        if after > before:
            session.note(
                "note: the closed form made held-out predictions worse; look at more clips "
                "(closed_form.clips) or raise closed_form.ridge"
            )
    if report["broken_samples"]:
        shown.append(f"{report['broken_samples']} broken samples were skipped")
    for text in report["notes"]:
        session.note(f"note: {text}")
    session.summary(report, *shown, f"{report['model']} in {seconds(report['seconds'])}")
