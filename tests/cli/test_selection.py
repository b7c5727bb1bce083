"""Which recipe of tiny-wan a machine gets."""

from __future__ import annotations

import pytest

from turbo_opt.cli.selection import demo_recipe_for, tiny_recipe_for
from turbo_opt.targets import get_target

_RECIPE_OF = {
    "h200": "tiny-wan/h200",
    "rtx4090": "tiny-wan/rtx4090",
    "rtx5090": "tiny-wan/rtx5090",
    "a100": "tiny-wan/cpu",  # a GPU without recipes of its own
    "sm86": "tiny-wan/cpu",
}


@pytest.mark.parametrize("detected", _RECIPE_OF)
def test_the_demo_shows_the_students_in_the_recipe_of_the_detected_gpu(
    detected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbo_opt.targets.detect_target", lambda: get_target(detected))
    assert tiny_recipe_for("cuda") == _RECIPE_OF[detected]
    assert demo_recipe_for("cuda") == f"{_RECIPE_OF[detected]}-turbo"
    assert demo_recipe_for("cpu") == "tiny-wan/cpu-turbo"


def test_without_a_recipe_of_the_students_the_demo_shows_the_dense_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from turbo_opt.config import lookup

    dense = [info for info in lookup.list_recipes() if not info.name.endswith("-turbo")]
    monkeypatch.setattr(lookup, "list_recipes", lambda: dense)
    assert demo_recipe_for("cpu") == "tiny-wan/cpu"
