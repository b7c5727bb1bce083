"""The log of a training: a CSV file, and TensorBoard events if they are wanted."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbo_opt.errors import BadInput

CSV = "log.csv"


def check_tensorboard(wanted: bool) -> None:
    """Raise BadInput if TensorBoard is wanted and not installed."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise BadInput(
            "log.tensorboard: the package 'tensorboard' is not installed; "
            "pip install 'turbo-opt[train]', or leave it out"
        )


class Log:
    """Rows of named numbers, one for each logged step.

    A resumed training goes on in the same file: rows of later steps than the checkpoint's are
    taken out first, and all of one that begins again.

    Args:
        folder: where log.csv and `tensorboard/` are; made if it is not there.
        first_step: the step that this run begins with.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool) -> None:
        self._path = folder / CSV
        self._writer = _summary_writer(folder, first_step) if tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        rows = _read(self._path) if first_step else []
        self._rows = [row for row in rows if int(row["step"]) <= first_step]
        self._columns = list(dict.fromkeys(key for row in self._rows for key in row))
        self._rewrite()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row; a new column is added to the file."""
        row = {"step": step, **values}
        self._rows.append({key: str(value) for key, value in row.items()})
        new = [key for key in row if key not in self._columns]
        self._columns += new
        if new:
            self._rewrite()
        else:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Write what TensorBoard still holds."""
        if self._writer is not None:
            self._writer.close()

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(self._rows)
        temporary = self._path.with_suffix(".partial")
        temporary.write_text(text.getvalue() if self._columns else "", encoding="utf-8")
        temporary.replace(self._path)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    # A kill may have cut the last line.
    return [row for row in rows if row.get("step", "").isdigit()]


def _summary_writer(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    first_event = first_step + 1 if first_step else 0
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_event)
