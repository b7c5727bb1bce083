"""What torch.compile is told where gradients are wanted."""

from __future__ import annotations

import pytest
import torch
import torch._inductor

from turbo_opt.calibration.training.compiling import compiled

LOSES_GRADIENTS = "triton.mix_order_reduction"


@pytest.mark.parametrize(
    ("known", "options"),
    [(["max_autotune", LOSES_GRADIENTS], {LOSES_GRADIENTS: False}), (["max_autotune"], {})],
)
def test_the_reduction_that_loses_gradients_is_off_where_torch_has_it(
    monkeypatch, known, options
) -> None:
    told = {}
    monkeypatch.setattr(torch._inductor, "list_options", lambda: known)
    monkeypatch.setattr(torch, "compile", lambda function, **how: told.update(how) or function)
    assert compiled(abs) is abs
    assert told == {"dynamic": False, "options": options}
