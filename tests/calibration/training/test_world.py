"""How the processes of a training communicate."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from turbo_opt.calibration.training import world


class Options:
    """Stands in for NCCL's, which a build of torch for CPUs lacks."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(max_ctas=0)
        self._timeout = timedelta(0)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], dict]]:
    """The meshes that a process of two on a GPU asks for, without one."""
    made: list[tuple[tuple[int, ...], dict]] = []

    def mesh(device: str, sides: tuple[int, ...], **how: object) -> dict[str, SimpleNamespace]:
        made.append((sides, how))
        return {axis: SimpleNamespace(get_group=lambda axis=axis: axis) for axis in world._AXES}

    for name, value in {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    nccl = SimpleNamespace(Options=Options)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **how: made.append(((), how)))
    monkeypatch.setattr(dist, "init_device_mesh", mesh)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(world.torch.cuda, "set_device", lambda device: None)
    return made


def test_weights_are_gathered_by_few_multiprocessors_and_heads_exchanged_by_any(started) -> None:
    with world.start_world("cuda", context_size=2, patience=timedelta(hours=2)) as together:
        assert together.context_group == "context"
    (_, all_wait), (all_of_them, weights), (pairs, heads) = started
    assert (all_of_them, pairs) == ((4,), (2, 2))
    ((axis, (backend, options)),) = weights["backend_override"].items()
    assert (axis, backend, options.config.max_ctas) == (0, "nccl", 4)
    assert all_wait["timeout"] == options._timeout == timedelta(hours=2)
    assert "backend_override" not in heads


def test_processes_on_cpus_communicate_as_torch_has_it(started) -> None:
    with world.start_world("cpu") as together:
        assert together.context_group is None
    ((_, _), (_, how)) = started
    assert how["backend_override"] is None
