"""How calls reach blocks.cu: what is one sequence of rows, macros, programs."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.kernels.kernel_checks import modulation
from turbo_opt.kernels._cuda import blocks, compiler
from turbo_opt.kernels._cuda.rows import Branch

LARGEST_PROGRAM = 227 * 1024  # bytes of shared memory of a program on sm90


class Launches(list):
    """Stands in for compiled kernels: notes (grid, threads, arguments) and the macros of each."""

    def __init__(self, resident=100):
        super().__init__()
        self.resident = resident

    def load(self, source, name, x, defines, shared_bytes=0):
        self.file, self.defines, self.shared_bytes = source.split("+")[-1], defines, shared_bytes
        return self

    def launch(self, grid, threads, *arguments):
        self.append((grid, threads, arguments))

    def resident_clusters(self, threads, programs):
        return self.resident

    __hash__ = object.__hash__


@pytest.fixture
def launches(monkeypatch):
    made = Launches()
    monkeypatch.setattr(blocks, "load", made.load)
    return made


def normalize(x, scale, shift, branch=None):
    return blocks.quantize_norm(x, scale, shift, 1e-6, "int8-block", gain_offset=1, branch=branch)


@pytest.mark.parametrize(
    ("batch", "kind", "batched", "per_token"),
    [
        (1, "shared", 0, 0),
        (1, "per token", 0, 1),
        (2, "shared", 0, 0),
        (2, "per batch", 1, 1),
        (2, "per token", 0, 1),
    ],
)
def test_rows_are_one_sequence_unless_something_belongs_to_a_batch_entry(
    launches, batch, kind, batched, per_token
):
    x = torch.zeros(batch, 9, 256, dtype=torch.bfloat16)
    normalize(x, modulation(kind, x), modulation(kind, x))
    assert launches.defines["BATCHED"] == batched
    branch = Branch(x, None, torch.empty_like(x))
    normalize(x, modulation(kind, x), modulation(kind, x), branch)
    assert (launches.defines["BATCHED"], launches.defines["PER_TOKEN"]) == (batched, per_token)


def test_parameters_that_rows_share_are_passed_without_strides(launches):
    x, gain = torch.zeros(1, 9, 256, dtype=torch.bfloat16), torch.ones(1, 1, 256)
    normalize(x, gain, None)
    ((_, _, (_, _, _, passed, none, *_, gain_row, _, _)),) = launches
    assert passed.data_ptr() == gain.data_ptr() and none is None
    assert gain_row == 0 and launches.defines["PER_TOKEN"] == 0


def test_tokens_before_batch_entries_in_memory_are_batched(launches):
    x = torch.zeros(9, 2, 256, dtype=torch.bfloat16).transpose(0, 1)
    normalize(x, None, None)
    assert launches.defines["BATCHED"] == 1
    assert launches[0][2][-12:-8] == (2, 9, 256, 512)  # B, L, strides of x
    normalize(x, None, None, Branch(x, None, torch.empty_like(x)))
    assert launches.defines["BATCHED"] == 1
    assert launches[1][2][-12:-8] == (2, 9, 256, 512)


def test_a_view_as_one_sequence_has_the_same_rows():
    x = torch.randn(2, 20, 512)[:, ::2, 256:]
    shared = torch.randn(1, 1, 256).expand(x.shape)
    one, (none, same) = blocks._as_one_batch(x, (None, shared))
    assert none is None and same.shape == one.shape == (1, 20, 256)
    assert torch.equal(one[0], x.reshape(20, 256)) and torch.equal(same[0, 7], shared[0, 0])


@pytest.mark.parametrize(("rows", "resident", "clusters"), [(1, 9, 1), (1025, 9, 9), (1153, 4, 4)])
def test_as_many_clusters_start_as_run_at_once_and_have_a_block(launches, rows, resident, clusters):
    launches.resident = resident
    q, scale = normalize(torch.zeros(1, rows, 1536, dtype=torch.bfloat16), None, None)
    ((grid, threads, _),) = launches
    assert grid == (8 * clusters,) and threads == 1536 // 8
    assert q.shape == (1, rows, 1536) and scale.shape == (-(-rows // 128), 12)


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("channels", range(256, 6145, 256))
def test_programs_of_every_width_fit_on_a_multiprocessor(channels, branch):
    """Shared memory, and the 80 registers that the kernel lives on."""
    programs = blocks._shape(channels, branch).programs
    shared, threads = blocks._shared_bytes(channels), blocks._threads(channels)
    assert programs >= 1 and shared <= LARGEST_PROGRAM and threads <= 1024
    assert programs * (shared + 1024) <= 228 * 1024
    assert programs == 1 or programs * threads * 80 <= 64 * 1024


def test_shapes_are_those_measured_on_an_h200():
    assert blocks._shape(1536, True) == (4, 16, 0, 10, 9600)
    assert blocks._shape(5120, True) == (1, 16, 0, 16, 22500)
    assert blocks._shape(1536, False) == (4, 16, 4, 16, 4800)
    assert blocks._shape(5120, False) == (1, 8, 4, 16, 4800)


@pytest.mark.parametrize(("channels", "ahead"), [(256, 16), (1536, 10), (2048, 10), (6144, 10)])
def test_no_more_of_a_branch_is_on_its_way_than_registers_hold(channels, ahead):
    assert blocks._shape(channels, True).ahead == ahead


def test_what_there_is_of_branch_gate_gain_and_bias_is_a_macro(launches):
    x = torch.zeros(1, 9, 256, dtype=torch.bfloat16)
    gate, gain = torch.ones(1, 1, 256), torch.ones(1, 1, 256)
    normalize(x, gain, None, Branch(x, gate, torch.empty_like(x)))
    there = {name: launches.defines[name] for name in ("BRANCH", "GATE", "GAIN", "BIAS")}
    assert there == {"BRANCH": 1, "GATE": 1, "GAIN": 1, "BIAS": 0}
    normalize(x, None, torch.ones(1, 9, 256))
    there = {name: launches.defines[name] for name in there}
    assert there == {"BRANCH": 0, "GATE": 0, "GAIN": 0, "BIAS": 1}
    normalize(x, None, None)
    assert (launches.defines["GAIN"], launches.defines["BIAS"]) == (0, 0)


def test_no_rows_launch_nothing(launches):
    x = torch.zeros(2, 0, 256, dtype=torch.bfloat16)
    assert normalize(x, None, None)[1].shape == (0, 2)
    assert blocks.quantize(x, "int8-block", gelu=True)[1].shape == (0, 2)
    assert not launches


def test_a_program_takes_a_tile_without_a_norm(launches):
    x = torch.zeros(2, 65, 384, dtype=torch.bfloat16)
    _, scale = blocks.quantize(x, "int8-block", gelu=True)
    ((grid, _, (*_, rows, groups)),) = launches
    assert grid == (2 * 3,) and (rows, groups) == (130, 3) and scale.shape == (2, 3)


def test_the_driver_is_told_of_a_launch_in_its_own_layout():
    """CUlaunchConfig: seven 32-bit numbers, two pointers on 8 bytes, one number."""
    fields = compiler._LaunchConfig
    assert (fields.stream.offset, fields.attributes.offset) == (32, 40)
    assert (fields.attribute_count.offset, ctypes.sizeof(fields)) == (48, 56)
