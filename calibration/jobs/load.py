"""Read a job: YAML with positions, overrides, then the schema of the job that is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from turbo_opt.calibration.jobs.schema import Job
from turbo_opt.config.document import Document
from turbo_opt.config.explain import explain
from turbo_opt.config.lookup import shown
from turbo_opt.config.overrides import apply_override
from turbo_opt.config.yaml_reader import read_yaml_file
from turbo_opt.errors import BadInput

SCHEMA_VERSION = 1
AnyJob = TypeVar("AnyJob", bound=Job)


def load_job(path: str | Path, kind: type[AnyJob], overrides: Iterable[str] = ()) -> AnyJob:
    """The job in a YAML file.

    Args:
        path: the file.
        kind: the schema it must follow, such as `SLAJob`.
        overrides: `KEY=VALUE` each, as `--set` takes them.

    Raises:
        BadInput: anything wrong with it, one line per fault: `file:line:column: key.path: …`.
    """
    path = Path(path).expanduser()
    document = read_yaml_file(path, shown(path))
    if not isinstance(document.data, dict):
        raise BadInput(document.complain((), "a job is a mapping of keys to values"))
    _check_version(document)
    for override in overrides:
        apply_override(document, override)
    try:
        job = kind.model_validate(document.data)
    except ValidationError as error:
        problems = explain(kind, error, document.data)
        lines = [document.complain(p.path, p.message, at_key=p.at_key) for p in problems]
        raise BadInput("\n".join(lines)) from None
    return job.located(path.absolute().parent)


def _check_version(document: Document) -> None:
    """Judge a file's format before its keys: those may have changed."""
    version = document.data.get("schema_version")
    if version is None:
        message = f"required key schema_version is missing: add 'schema_version: {SCHEMA_VERSION}'"
        raise BadInput(document.complain((), message))
    if version != SCHEMA_VERSION or isinstance(version, bool):
        message = f"{version!r} is not a format that this turbo_opt reads: {SCHEMA_VERSION}"
        raise BadInput(document.complain(("schema_version",), message))
