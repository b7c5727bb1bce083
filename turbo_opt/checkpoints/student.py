"""Do weights say that they are a distilled student, and how it is to be sampled?

A student declares itself by `distillation: rcm`, and `sigma_max` if it wants, in the metadata of
its safetensors file, or in a JSON object beside it: `student.json` for `student.safetensors` or
`student.pth`, `distillation.json` in a folder, the network's or the pipeline's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from turbo_opt.checkpoints.places import student_notes
from turbo_opt.checkpoints.reader import NetworkWeights
from turbo_opt.errors import BadInput
from turbo_opt.json_files import read_json

METHOD = "rcm"


class Student(BaseModel):
    """What distilled weights say of themselves.

    Attributes:
        distillation: the method.
        sigma_max: noise level of the first step that it was trained for.
    """

    distillation: str
    sigma_max: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def as_metadata(self) -> dict[str, str]:
        """The same as text by name, as the metadata of a file has it."""
        return {key: str(value) for key, value in self.model_dump(exclude_none=True).items()}


Record = tuple[Path, Mapping[str, Any]]
"""What is said of weights by name, and where it is said."""


def declared_student(weights: NetworkWeights) -> Student | None:
    """What the weights say of themselves; None where they do not say that they are distilled.

    Raises:
        BadInput: the declaration is malformed, or of a method that cannot be sampled.
    """
    found = first_declaration([(weights.place, weights.metadata), *notes_beside(weights.place)])
    if found is None:
        return None
    place, student = found
    if student.distillation != METHOD:
        raise BadInput(
            f"{place}: is distilled by {student.distillation!r}; only {METHOD!r} is known"
        )
    return student


def first_declaration(records: Iterable[Record]) -> tuple[Path, Student] | None:
    """The first of the records by which weights are distilled, by whatever method; None: none is.

    Raises:
        BadInput: it is malformed.
    """
    for place, record in records:
        if "distillation" not in record:
            continue
        try:
            return place, Student.model_validate(record)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            key = ".".join(map(str, problem["loc"]))
            raise BadInput(f"{place}: {key}: {problem['msg']}, got {problem['input']!r}") from None
    return None


def notes_beside(place: Path) -> list[Record]:
    """What JSON files beside the weights in `place` say.

    Raises:
        BadInput: one is no JSON object.
    """
    return [(path, read_json(path)) for path in student_notes(place)]
