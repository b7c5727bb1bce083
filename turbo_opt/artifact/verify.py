"""Is this artifact whole, unchanged, and does it compute here what it computed there?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from turbo_opt.artifact.environment import environment, fingerprint
from turbo_opt.artifact.load import check_digests, load_denoiser
from turbo_opt.artifact.manifest import MANIFEST, check_sizes, jsonable, read_manifest
from turbo_opt.artifact.replay import ReplayResult, compare_replay, read_replay, run_replay
from turbo_opt.errors import BadInput


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        files: how many were compared with their digests.
        bytes: how much that was.
        replays: one for each denoiser that has a stored pair.
        skipped: denoiser → why it has none.
        changed: package → (version it was saved with, version here), where they differ.
    """

    path: str
    files: int
    bytes: int
    replays: tuple[ReplayResult, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    changed: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Files are intact (or `verify` would have raised) and every replay agrees."""
        return all(replay.passed for replay in self.replays)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        replays = [{**asdict(item), "passed": item.passed} for item in self.replays]
        record = {**asdict(self), "replays": replays, "passed": self.passed}
        return jsonable(record)  # type: ignore[no-any-return]


def verify(path: Path | str, device: torch.device | str = "cpu") -> VerifyReport:
    """Check every file of an artifact, then run its stored inputs on `device` and compare.

    One denoiser is in memory at a time. A replay that disagrees is in the report, not an error.

    Raises:
        BadInput: a file is missing, damaged, unknown or leads elsewhere, or the artifact was
            written by a newer turbo_opt; the message names the file and what is wrong with it.
    """
    root = Path(path).expanduser()
    manifest = read_manifest(root)
    check_sizes(root, manifest)
    _check_no_strangers(root, set(manifest.files) | {MANIFEST})
    check_digests(root, manifest)
    replays, skipped = [], {}
    on_cpu = torch.device(device).type == "cpu"
    for name, record in manifest.denoisers.items():
        transformer, _ = load_denoiser(root, name, record, device)
        stored = record.replay
        if stored.file is None:
            skipped[name] = stored.reason
            continue
        inputs, expected = read_replay(root, stored.file)
        if set(inputs) != set(transformer.inputs):
            raise BadInput(f"{root / stored.file}: inputs {sorted(inputs)} are not the network's")
        replays.append(
            compare_replay(
                name,
                expected,
                run_replay(transformer, inputs),
                same_environment=on_cpu and stored.fingerprint == fingerprint(),
                min_sqnr_db=stored.min_sqnr_db,
            )
        )
    here = environment()
    changed = {
        key: (str(was), here[key])
        for key, was in manifest.environment.items()
        if key in here and here[key] != was
    }
    total = sum(record.bytes for record in manifest.files.values())
    return VerifyReport(str(root), len(manifest.files), total, tuple(replays), skipped, changed)


def _check_no_strangers(root: Path, known: set[str]) -> None:
    for item in sorted(root.rglob("*")):
        name = item.relative_to(root).as_posix()
        if not item.is_dir() and name not in known:
            raise BadInput(f"{item}: the manifest does not know this file")
        if item.is_dir() and item.is_symlink():
            raise BadInput(f"{item}: a link to a directory does not belong in an artifact")
