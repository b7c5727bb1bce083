"""Progress on stderr: live bars on a terminal, one line for each finished step elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from turbo_opt.cli.session import Session, printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import ProgressColumn


class Task:
    """One step of the work."""

    def __init__(self, board: Board, label: str, *, bytes_unit: bool = False) -> None:
        self._board = board
        self._label = printable(label)
        self._started = time.perf_counter()
        live = board.live
        self._id = (
            live.add_task(self._label, total=None, note="", bytes=bytes_unit) if live else None
        )

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """So much is done, of so much in all if that is known."""
        if self._board.live and self._id is not None:
            self._board.live.update(self._id, completed=done, total=total, note=note)

    def finish(self, note: str = "") -> None:
        """The step is done; `note` says with what result."""
        seconds = time.perf_counter() - self._started
        if self._board.live and self._id is not None:
            self._board.live.update(self._id, total=1, completed=1, note=note)
            self._board.live.stop_task(self._id)
        else:
            self._board.session.note(f"{self._label}: {note + ', ' if note else ''}{seconds:.1f} s")


class Board:
    """The steps of one command."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.live: RichProgress | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Board:
        console = self.session.console(stderr=True)
        if console.is_terminal and not self.session.quiet:
            from rich.progress import Progress

            progress = Progress(*_columns(), console=console)
            self.live = self._stack.enter_context(progress)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        self.live = None

    def task(self, label: str, *, bytes_unit: bool = False) -> Task:
        """Begin a step; `bytes_unit` shows sizes and a rate instead of a count."""
        return Task(self, label, bytes_unit=bytes_unit)

    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[Task]:
        """A step that is done when the block ends."""
        task = self.task(label)
        yield task
        task.finish()


def _columns() -> list[ProgressColumn]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Amount(ProgressColumn):
        """Bytes and their rate where the step counts bytes, else its note."""

        def __init__(self) -> None:
            super().__init__()
            self._size, self._rate = DownloadColumn(binary_units=True), TransferSpeedColumn()

        def render(self, task: Any) -> Text:
            if task.fields["note"] or not task.fields["bytes"] or task.finished:
                return Text(str(task.fields["note"]))
            return Text.assemble(self._size.render(task), " ", self._rate.render(task))

    return [
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        Amount(),
    ]
