"""A Program into an artifact directory: streamed, resumable, and there only when whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from turbo_opt.artifact.environment import environment, fingerprint
from turbo_opt.artifact.graph_file import graph_bytes
from turbo_opt.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    ComponentsRecord,
    DenoiserRecord,
    FileRecord,
    Manifest,
    ReplayRecord,
    ScheduleRecord,
    StepRecord,
    TensorRecord,
    jsonable,
)
from turbo_opt.artifact.replay import min_sqnr_db, replay_bytes, replay_inputs, run_replay
from turbo_opt.artifact.report import render_report, report_data
from turbo_opt.artifact.shard_writer import write_shard
from turbo_opt.artifact.shards import Shard, plan_shards
from turbo_opt.artifact.staging import (
    Staging,
    check_destination,
    check_space,
    disk_full_is_bad_input,
    sync,
    write_synced,
)
from turbo_opt.artifact.weights_reader import StoredWeights
from turbo_opt.errors import BadInput
from turbo_opt.ir.edit import user_inputs
from turbo_opt.ir.program import Components, Denoiser, Program
from turbo_opt.ir.weights import dtype_name
from turbo_opt.runtime.module import CompiledTransformer

Progress = Callable[[str, int, int], None]
"""Told (stage, bytes done, bytes in all)."""
_OTHER_BYTES = 64 * 2**20
"""Room kept for graphs, replay pairs and reports."""
_REPLAY_BYTES = 4 * 2**30


def save(
    program: Program,
    out: Path | str,
    *,
    recipe: Mapping[str, Any] | None = None,
    target: str | None = None,
    kernels: Mapping[str, Any] | None = None,
    base: Path | None = None,
    replay: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = 2 * 2**30,
    progress: Progress = lambda stage, done, total: None,
    report: Mapping[str, Any] | None = None,
    frames: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write `program` as an artifact directory.

    Weights are read, computed, hashed and written in bands of rows, all four at once; flushing a
    finished shard overlaps with the next. The directory gets its name by one rename at the end.

    Args:
        recipe: the resolved recipe, kept in the manifest.
        target: name of the machine it was compiled for.
        kernels: which provider each operator was measured to be fastest with.
        base: folder that a relative `program.components.source` is relative to.
        replay: run each denoiser once on the CPU and store input and output for `verify`; left
            out, with the reason noted, for weights of 4 GiB and more.
        resume: reuse the finished shards of a killed save of the same weights, and keep those of
            this one should it fail.
        overwrite: replace an artifact that is at `out`.
        max_shard_bytes: largest weight file.
        progress: called after every tensor.
        report: further entries of the report (`metrics`, `notes`).
        frames: label → (F, H, W, 3) uint8 clips to show side by side in the report.

    Raises:
        BadInput: `out` is taken, another process writes it, or the disk is too small.
        TurboOptError: a weight came out of another shape or dtype than declared.
    """
    out = Path(out).expanduser().resolve()
    check_destination(out, overwrite=overwrite)
    shards = {
        denoiser.name: plan_shards(denoiser.weights, f"denoisers/{denoiser.name}", max_shard_bytes)
        for denoiser in program
    }
    with Staging.open(out, resume=resume) as staging:
        total = sum(shard.nbytes for plan in shards.values() for shard in plan)
        with disk_full_is_bad_input(out.parent, total + _OTHER_BYTES):
            files = _write_weights(staging, [s for plan in shards.values() for s in plan], progress)
            records = {}
            for denoiser in program:
                _add(staging, files, _graph_path(denoiser), graph_bytes(denoiser.exported))
                record = _denoiser_record(denoiser, shards[denoiser.name])
                wanted = replay or "left out when it was saved"
                record = _with_replay(staging, files, denoiser, record, wanted)
                records[denoiser.name] = record
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                files=files,
                denoisers=records,
                schedule=_schedule_record(program),
                components=_components_record(program.components, base),
                facts=tuple(sorted(program.facts)),
                recipe=jsonable(recipe or {}),
                history=tuple(jsonable(entry) for entry in program.history),
                environment=environment(),
                target=target,
                kernels=jsonable(kernels or {}),
            )
            pages = render_report({**report_data(manifest), **jsonable(report or {})}, frames)
            for name, text in pages.items():
                _add(staging, files, name, text.encode())
            manifest = manifest.model_copy(update={"files": dict(sorted(files.items()))})
            write_synced(staging.path / MANIFEST, manifest.to_json().encode())
            staging.publish()
    return out


def _write_weights(
    staging: Staging, shards: list[Shard], progress: Progress
) -> dict[str, FileRecord]:
    digests = {shard.file: staging.reusable(shard) for shard in shards}
    staging.keep_only({file for file, digest in digests.items() if digest})
    missing = [shard for shard in shards if digests[shard.file] is None]
    check_space(staging.out.parent, sum(shard.nbytes for shard in missing) + _OTHER_BYTES)
    total = sum(shard.nbytes for shard in shards)
    done = total - sum(shard.nbytes for shard in missing)
    progress("weights", done, total)

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress("weights", done, total)

    def finish(shard: Shard, digest: str) -> None:
        sync(staging.path / shard.file)
        staging.record(shard, digest)
        digests[shard.file] = digest

    with ThreadPoolExecutor(1) as pool:
        previous: Future[None] | None = None
        for shard in missing:
            path = staging.path / shard.file
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = write_shard(shard, path, tick)
            if previous is not None:
                previous.result()
            previous = pool.submit(finish, shard, digest)
        if previous is not None:
            previous.result()
    return {
        shard.file: FileRecord(sha256=digests[shard.file] or "", bytes=shard.nbytes)
        for shard in shards
    }


def _add(staging: Staging, files: dict[str, FileRecord], name: str, content: bytes) -> None:
    write_synced(staging.path / name, content)
    files[name] = FileRecord(sha256=sha256(content).hexdigest(), bytes=len(content))


def _graph_path(denoiser: Denoiser) -> str:
    return f"denoisers/{denoiser.name}.pt2"


def _denoiser_record(denoiser: Denoiser, shards: list[Shard]) -> DenoiserRecord:
    tensors = {
        name: TensorRecord.model_validate(
            {"file": shard.file, "dtype": dtype_name(tensor.dtype), "shape": tensor.shape}
        )
        for shard in shards
        for name, tensor in shard.weights.items()
    }
    return DenoiserRecord.model_validate({
        "model_class": denoiser.model_class,
        "config": jsonable(denoiser.config),
        "dtype": dtype_name(user_inputs(denoiser.exported)[0].meta["val"].dtype),
        "graph": _graph_path(denoiser),
        "shards": tuple(shard.file for shard in shards),
        "tensors": tensors,
        "replay": ReplayRecord(file=None),
        "stages": dict(denoiser.stages),
    })  # fmt: skip


def _with_replay(
    staging: Staging,
    files: dict[str, FileRecord],
    denoiser: Denoiser,
    record: DenoiserRecord,
    wanted: bool | str,
) -> DenoiserRecord:
    size = denoiser.weights.nbytes
    if wanted is True and size >= _REPLAY_BYTES:
        wanted = f"the weights ({size / 2**30:.1f} GiB) are too large to run on the CPU"
    if wanted is not True:
        return record.model_copy(update={"replay": ReplayRecord(file=None, reason=str(wanted))})
    transformer = CompiledTransformer.build(
        denoiser.exported,
        StoredWeights(staging.path, record),
        denoiser.config,
        "cpu",
        denoiser.stages,
    )
    inputs = replay_inputs(denoiser.exported, tuple(denoiser.config["patch_size"]))
    output = run_replay(transformer, inputs)
    file = f"replay/{denoiser.name}.safetensors"
    _add(staging, files, file, replay_bytes(inputs, output))
    stored = ReplayRecord(
        file=file, min_sqnr_db=min_sqnr_db(denoiser.exported), fingerprint=fingerprint()
    )
    return record.model_copy(update={"replay": stored})


def _schedule_record(program: Program) -> ScheduleRecord:
    schedule = program.schedule
    return ScheduleRecord(
        steps=tuple(StepRecord(**vars(step)) for step in schedule.steps),
        scheduler=jsonable(schedule.scheduler),
        initial_noise_scale=schedule.initial_noise_scale,
        expand_timesteps=schedule.expand_timesteps,
    )


def _components_record(components: Components, base: Path | None) -> ComponentsRecord:
    from turbo_opt.capture.folder import find_source

    found_at = None
    candidates = [Path(components.source).expanduser(), (base or Path()) / components.source]
    if any(path.is_dir() for path in candidates):
        try:
            found_at = str(find_source(components.source, base))
        except BadInput:
            found_at = None
    return ComponentsRecord(
        source=components.source,
        found_at=found_at,
        pipeline_class=components.pipeline_class,
        folders={name: (kind[0], kind[1]) for name, kind in components.folders.items()},
        pipeline_config=jsonable(components.pipeline_config),
    )
