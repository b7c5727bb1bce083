"""The fastest configuration is measured once, and kept on disk for later processes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from typing import NamedTuple

import pytest
import torch

from turbo_opt.kernels._cuda import compiler
from turbo_opt.kernels._triton import tuning, tuning_file


class Config(NamedTuple):
    warps: int


CONFIGS = [Config(2), Config(4), Config(8)]
PROBLEM = ("a kernel", torch.device("cuda", 0), torch.bfloat16, torch.Size([1, 70]), 5, True)


class Gpu:
    """A device that measures `milliseconds` (warps → ms), and a cache folder of its own."""

    def __init__(self, monkeypatch, folder):
        self.milliseconds = {2: 3.0, 4: 1.0, 8: 2.0}
        self.name = "NVIDIA H200"
        self.capturing = False
        self.measured: list[int] = []
        self.folder = folder
        monkeypatch.setenv(compiler.CACHE_VARIABLE, str(folder))
        monkeypatch.delenv(tuning_file.CACHE_VARIABLE, raising=False)
        monkeypatch.delenv(tuning.AUTOTUNE_VARIABLE, raising=False)
        monkeypatch.setattr(tuning, "interpreting", lambda: False)
        monkeypatch.setattr(tuning, "_milliseconds", self._time)
        monkeypatch.setattr(tuning, "_fastest", {})
        monkeypatch.setattr(tuning_file, "_read_before", {})
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: self.name)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def _time(self, launch):
        launch()
        return self.milliseconds[self.measured[-1]]

    def fastest(self, problem=PROBLEM, configs=CONFIGS):
        return tuning.fastest(problem, configs, lambda config: self.measured.append(config.warps))

    def forget(self):
        """What a new process knows, and a count from 0."""
        tuning._fastest.clear()
        tuning_file._read_before.clear()
        self.measured.clear()

    def files(self):
        return sorted(self.folder.glob("tuning-*.json"))

    def content(self):
        (file,) = self.files()
        return json.loads(file.read_text())


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return Gpu(monkeypatch, tmp_path / "cache")


def test_a_problem_is_measured_once_in_a_process_and_never_in_later_ones(gpu):
    assert gpu.fastest() == gpu.fastest() == Config(4)
    assert gpu.measured == [2, 4, 8]
    gpu.forget()
    assert gpu.fastest() == Config(4) and gpu.measured == []
    assert tuning.measured_configurations() == {PROBLEM: Config(4)}


def test_problems_are_kept_apart_but_not_devices_of_one_name(gpu):
    gpu.fastest()
    gpu.forget()
    other_device = (PROBLEM[0], torch.device("cuda", 1), *PROBLEM[2:])
    assert gpu.fastest(other_device) == Config(4) and gpu.measured == []
    for place, value in ((0, "a colonel"), (2, torch.float16), (3, torch.Size([70, 1])), (4, 6)):
        gpu.measured.clear()
        gpu.fastest((*PROBLEM[:place], value, *PROBLEM[place + 1 :]))
        assert gpu.measured == [2, 4, 8], value
    assert len(gpu.content()["choices"]) == 5


@pytest.mark.parametrize("changed", ["device", "kernels", "torch", "triton"])
def test_another_gpu_source_torch_or_triton_measures_anew(changed, gpu, monkeypatch):
    gpu.fastest()
    gpu.forget()
    if changed == "device":
        gpu.name = "NVIDIA L40S"
    else:
        versions = {**tuning_file.current_versions(), changed: "another"}
        monkeypatch.setattr(tuning_file, "_versions", lambda: versions)
    gpu.milliseconds[8] = 0.5
    assert gpu.fastest() == Config(8) and gpu.measured == [2, 4, 8]
    assert len(gpu.files()) == 2


def with_content(**changes):
    return lambda content: json.dumps({**content, **changes})


SPOILED = {
    "empty": lambda content: "",
    "cut off": lambda content: json.dumps(content)[:-9],
    "no table": lambda content: "[1, 2]",
    "nested too deep": lambda content: "[" * 100_000,
    "no text": lambda content: b"\xff\xfe\x00",
    "another format": with_content(format=2),
    "of another environment": with_content(environment={"device": "NVIDIA L40S"}),
    "choices that are no table": with_content(choices=["Config(warps=8)"]),
    "a choice that is no text": lambda content: json.dumps(
        {**content, "choices": dict.fromkeys(content["choices"], 8)}
    ),
    "a configuration that is not offered": lambda content: json.dumps(
        {**content, "choices": dict.fromkeys(content["choices"], "Config(warps=32)")}
    ),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(spoil, gpu):
    gpu.fastest()
    before, (file,) = gpu.content(), gpu.files()
    spoiled = spoil(before)
    file.write_bytes(spoiled if isinstance(spoiled, bytes) else spoiled.encode())
    gpu.forget()
    assert gpu.fastest() == Config(4) and gpu.measured == [2, 4, 8]
    assert gpu.content() == before


def test_a_folder_that_cannot_be_written_is_done_without(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    assert gpu.fastest() == gpu.fastest() == Config(4)
    assert gpu.measured == [2, 4, 8]


def test_while_a_graph_is_captured_nothing_is_measured_but_what_is_kept_is_used(gpu):
    gpu.capturing = True
    assert gpu.fastest() == Config(2) and gpu.measured == [] == gpu.files()
    gpu.capturing = False
    assert gpu.fastest() == Config(4)
    gpu.forget()
    gpu.capturing = True
    assert gpu.fastest() == Config(4) and gpu.measured == []


def test_the_cache_can_be_turned_off(gpu, monkeypatch):
    monkeypatch.setenv(tuning_file.CACHE_VARIABLE, "0")
    assert gpu.fastest() == Config(4) and gpu.files() == []
    monkeypatch.delenv(tuning_file.CACHE_VARIABLE)
    gpu.forget()
    gpu.fastest()
    monkeypatch.setenv(tuning_file.CACHE_VARIABLE, "0")
    gpu.forget()
    gpu.milliseconds[8] = 0.5
    assert gpu.fastest() == Config(8) and len(gpu.files()) == 1


def test_without_tuning_the_first_configuration_serves_whatever_is_kept(gpu, monkeypatch):
    gpu.fastest()
    gpu.forget()
    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "0")
    assert gpu.fastest() == Config(2) and gpu.measured == []


def test_a_single_configuration_is_not_measured(gpu):
    assert gpu.fastest(configs=CONFIGS[2:]) == Config(8)
    assert gpu.measured == [] == gpu.files()


def test_configurations_that_do_not_fit_are_passed_over_and_none_is_kept_if_none_fits(gpu):
    gpu.milliseconds = {2: math.inf, 4: math.inf, 8: 7.0}
    assert gpu.fastest() == Config(8) and len(gpu.files()) == 1
    gpu.forget()
    gpu.milliseconds[8] = math.inf
    gpu.fastest(("another kernel", *PROBLEM[1:]))
    assert len(gpu.content()["choices"]) == 1


def test_the_oldest_choices_and_files_go_first(gpu, monkeypatch):
    monkeypatch.setattr(tuning_file, "MOST_CHOICES", 3)
    for number in (0, 1, 2, 3):
        gpu.fastest((number,))
    assert list(gpu.content()["choices"]) == ["(1)", "(2)", "(3)"]
    monkeypatch.setattr(tuning_file, "MOST_FILES", 2)
    for age, gpu.name in ((30, "A"), (20, "B"), (10, "C")):
        before = set(gpu.files())
        tuning._fastest.clear()
        gpu.fastest()
        (new,) = set(gpu.files()) - before
        os.utime(new, (time.time() - age,) * 2)
    assert len(gpu.files()) == 2 and new in gpu.files()


def write_many(first, start):
    """In a forked process: keep 20 choices."""
    start.wait()
    for number in range(first, first + 20):
        tuning_file.keep_choice(f"({number})", f"Config(warps={number})")


def test_processes_that_write_at_once_leave_a_whole_file_of_true_choices(gpu):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    writers = [context.Process(target=write_many, args=(first, start)) for first in (0, 100, 200)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    choices = gpu.content()["choices"]
    assert len(choices) >= 20  # the last to write knew all of its own
    assert all(choices[name] == f"Config(warps={name[1:-1]})" for name in choices)
    assert not [file for file in gpu.folder.iterdir() if file.suffix != ".json"]


@pytest.mark.gpu
def test_a_kernel_is_tuned_once_for_all_processes(monkeypatch, tmp_path):
    from turbo_opt.kernels import block_linear, force_provider, quantize_activation, quantize_weight

    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(tuning_file.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(tuning_file, "_read_before", {})
    x, weight = torch.randn(2, 256, 256, device="cuda", dtype=torch.bfloat16)
    operands = *quantize_activation(x, "int8-block"), *quantize_weight(weight, "int8-block")
    with force_provider({"block_linear": "triton"}):
        y = block_linear(*operands, None, "int8-block")
        first = tuning.measured_configurations()
        assert len(first) == 1 and len(list(tmp_path.glob("tuning-*.json"))) == 1
        tuning._fastest.clear()
        tuning_file._read_before.clear()
        monkeypatch.setattr(tuning, "_milliseconds", lambda launch: pytest.fail("measured again"))
        assert torch.equal(block_linear(*operands, None, "int8-block"), y)
    assert tuning.measured_configurations() == first


def test_what_does_not_compile_is_left_out_aloud_and_other_errors_are_not_hidden(caplog):
    def fails(message):
        raise RuntimeError(message)

    assert tuning._milliseconds(lambda: fails("PassManager::run failed")) == math.inf
    assert "does not compile a configuration, which is left out" in caplog.text
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        tuning._milliseconds(lambda: fails("an illegal memory access was encountered"))
