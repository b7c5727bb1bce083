"""What is saved is what is loaded."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

import turbo_opt
from tests.helpers.tiny_folder import (
    SHARD_BYTES,
    reference_pipeline,
    shared_folder,
    tiny_program,
)
from turbo_opt.artifact.manifest import read_manifest
from turbo_opt.artifact.save import save
from turbo_opt.artifact.shard_writer import write_shard
from turbo_opt.artifact.shards import plan_shards
from turbo_opt.artifact.weights_reader import StoredWeights
from turbo_opt.errors import TurboOptError
from turbo_opt.ir.files import SafetensorsFile
from turbo_opt.ir.weights import (
    LazyTensor,
    Transform,
    WeightStore,
    apply,
    constant,
    register_transform,
)

PROMPT = {"prompt": "a red circle moves", "negative_prompt": "blue"}
CLIP = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3}


def test_loaded_weights_are_those_of_the_program(stored: Path) -> None:
    program = tiny_program()
    loaded = StoredWeights(stored, read_manifest(stored).denoisers["transformer"])
    assert set(loaded) == set(program.denoisers["transformer"].weights)
    for name, tensor in program.denoisers["transformer"].weights.items():
        assert torch.equal(loaded[name], tensor.load())


def test_the_manifest_keeps_schedule_recipe_target_and_history(tmp_path: Path) -> None:
    program = tiny_program()
    program.history = ({"pass": "fuse-norms", "worst_sqnr_db": float("inf"), "matches": 3},)
    manifest = read_manifest(save(program, tmp_path / "a", recipe={"x": [1]}, target="cpu"))
    assert manifest.schedule.build() == program.schedule
    assert (manifest.recipe, manifest.target) == ({"x": [1]}, "cpu")
    assert manifest.history[0]["worst_sqnr_db"] == "Infinity"
    assert manifest.environment["torch"] == torch.__version__


def test_saving_the_same_program_twice_gives_the_same_files(stored: Path, tmp_path: Path) -> None:
    again = save(tiny_program(), tmp_path / "again", max_shard_bytes=SHARD_BYTES)
    first, second = read_manifest(stored).files, read_manifest(again).files
    compared = [name for name in first if not name.startswith("report")]
    assert {name: first[name] for name in compared} == {name: second[name] for name in compared}


def test_the_artifact_stands_in_for_the_transformer_of_a_diffusers_pipeline(stored: Path) -> None:
    pipeline = reference_pipeline(shared_folder())

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipeline(**PROMPT, **CLIP, generator=generator, output_type="latent").frames

    expected = run()
    artifact = turbo_opt.load(stored)
    pipeline.transformer = artifact
    assert torch.equal(run(), expected)
    pipeline.transformer = artifact.transformer
    pipeline.scheduler = artifact.scheduler
    assert torch.equal(run(), expected)


def test_two_experts_stand_in_for_both_transformers(stored_pair: Path) -> None:
    pipeline = reference_pipeline(shared_folder(experts=2))
    artifact = turbo_opt.load(stored_pair)

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipeline(**PROMPT, **CLIP, generator=generator, output_type="latent").frames

    expected = run()
    pipeline.transformer = artifact
    pipeline.transformer_2 = artifact.transformers["transformer_2"]
    assert torch.equal(run(), expected)


def test_as_pipeline_gives_the_diffusers_pipeline_with_the_compiled_networks(stored: Path) -> None:
    pipeline = turbo_opt.load(stored).as_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    reference = reference_pipeline(shared_folder())
    frames = [
        each(**PROMPT, **CLIP, generator=torch.Generator().manual_seed(2), output_type="np").frames
        for each in (pipeline, reference)
    ]
    assert (frames[0] == frames[1]).all()
    assert type(pipeline) is type(reference)


def test_a_bfloat16_artifact_keeps_float32_modules_when_moved(tmp_path: Path) -> None:
    artifact = turbo_opt.load(save(tiny_program(dtype="bfloat16"), tmp_path / "bf16"))
    kept = {name: value.dtype for name, value in artifact.transformer.graph.state_dict().items()}
    assert {torch.bfloat16, torch.float32} == set(kept.values())
    artifact.to("cpu", torch.bfloat16)
    moved = {name: value.dtype for name, value in artifact.transformer.graph.state_dict().items()}
    assert moved == kept


def test_converting_a_loaded_artifact_to_another_dtype_is_refused(stored: Path) -> None:
    with pytest.raises(ValueError, match=r"compiled for torch\.float32"):
        turbo_opt.load(stored).to(torch.float16)


def test_shards_stay_below_the_limit_and_the_safetensors_library_reads_them(stored: Path) -> None:
    record = read_manifest(stored).denoisers["transformer"]
    assert len(record.shards) > 2
    for shard in record.shards:
        assert (stored / shard).stat().st_size < 1.6 * SHARD_BYTES
        for name, tensor in safetensors.torch.load_file(stored / shard).items():
            assert tuple(tensor.shape) == record.tensors[name].shape


def test_every_weight_dtype_and_odd_size_is_read_back_by_the_library(tmp_path: Path) -> None:
    values = {
        "int8": torch.arange(-3, 4, dtype=torch.int8),
        "fp8": torch.randn(5, 3).to(torch.float8_e4m3fn),
        "bf16": torch.randn(3, 3, 1).to(torch.bfloat16),
        "f64": torch.randn(2, dtype=torch.float64),
        "scalar": torch.tensor(7.5),
        "none": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
    }
    store = WeightStore({name: constant(value) for name, value in values.items()})
    (shard,) = plan_shards(store, "w", 2**20)
    write_shard(shard, tmp_path / "w.safetensors", lambda count: None)
    library = safetensors.torch.load_file(tmp_path / "w.safetensors")
    ours = SafetensorsFile.open(str(tmp_path / "w.safetensors"))
    for name, value in values.items():
        for read in (library[name], ours.read(name)):
            assert read.dtype == value.dtype
            assert read.shape == value.shape
            raw = [each.flatten().view(torch.uint8) for each in (read, value)]
            assert torch.equal(*raw)


def test_values_and_scales_of_one_expression_share_a_shard_and_are_computed_once(
    tmp_path: Path,
) -> None:
    calls = []

    def compute(x: torch.Tensor) -> list[torch.Tensor]:
        calls.append(1)
        return [x.to(torch.int8), x.amax().reshape(1)]

    register_transform(
        Transform("test-split", lambda x: [(x.shape, torch.int8), ((1,), x.dtype)], compute)
    )
    tensors: dict[str, LazyTensor] = {}
    for index in range(4):
        pair = apply("test-split", constant(torch.full((64,), float(index))))
        tensors |= {f"{index}.values": pair[0], f"{index}.scales": pair[1]}
    shards = plan_shards(WeightStore(tensors), "w", 100)
    assert [sorted(shard.weights) for shard in shards] == [
        [f"{index}.scales", f"{index}.values"] for index in range(4)
    ]
    for shard in shards:
        write_shard(shard, tmp_path / shard.file, lambda count: None)
    assert len(calls) == 4


def test_writing_a_shard_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    size = 48 * 2**20  # from 32 MiB on, glibc gives freed memory back at once
    register_transform(
        Transform(
            "test-fill",
            lambda value: [((size,), torch.uint8)],
            lambda value: [torch.full((size,), value, dtype=torch.uint8)],
        )
    )
    store = WeightStore({f"w{i}": apply("test-fill", value=i)[0] for i in range(8)})
    (shard,) = plan_shards(store, "big", 2**30)
    resident = []
    write_shard(shard, tmp_path / "big", lambda count: resident.append(_resident_bytes()))
    assert max(resident) - resident[0] < 3 * size


def test_a_weight_of_another_shape_than_declared_fails_and_names_it(tmp_path: Path) -> None:
    register_transform(
        Transform("test-lie", lambda: [((4,), torch.float32)], lambda: [torch.zeros(5)])
    )
    (shard,) = plan_shards(WeightStore({"liar": apply("test-lie")[0]}), "w", 2**20)
    with pytest.raises(TurboOptError, match=r"'liar' came out as torch.float32 \[5\]"):
        write_shard(shard, tmp_path / "w", lambda count: None)


def test_graph_files_hold_no_weights_no_inputs_and_no_paths_of_the_machine(stored: Path) -> None:
    with zipfile.ZipFile(stored / "denoisers/transformer.pt2") as archive:
        for info in archive.infolist():
            if "weight_" in info.filename or "sample_inputs" in info.filename:
                assert info.file_size == 0
            assert b"site-packages" not in archive.read(info)


def test_progress_counts_up_to_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    save(tiny_program(), tmp_path / "a", progress=lambda *step: seen.append(step), replay=False)
    done = [count for _, count, _ in seen]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] >= tiny_program().weight_bytes


def test_a_left_out_replay_is_recorded_with_its_reason(tmp_path: Path) -> None:
    manifest = read_manifest(save(tiny_program(), tmp_path / "a", replay=False))
    replay = manifest.denoisers["transformer"].replay
    assert replay.file is None
    assert "left out" in replay.reason


def _resident_bytes() -> int:
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
