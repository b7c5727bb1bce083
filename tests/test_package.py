"""The package as users get it: what it installs, how fast it imports, whether its docs are true."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

import turbo_opt
from benchmarks.results import ROOT
from benchmarks.tables import PAGES, TABLES, filled

IMPORT = """
import time, torch
started = time.perf_counter()
import turbo_opt
print(time.perf_counter() - started, torch.cuda.is_initialized())
"""
CUDA_SOURCES = sorted((ROOT / "kernels" / "_cuda").glob("*.cu*"))


def test_import_is_light_and_touches_no_gpu():
    times = []
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=ROOT
        )
        seconds, initialized = result.stdout.split()
        assert initialized == "False"
        times.append(float(seconds))
        if times[-1] < 0.3:
            return
    pytest.fail(f"importing the package takes {min(times)} s")


def test_every_name_at_the_top_is_what_it_says_also_the_second_time():
    for _ in range(2):
        for name in turbo_opt.__all__:
            assert callable(getattr(turbo_opt, name)) or name == "__version__"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = turbo_opt.nothing


def test_the_tables_of_the_pages_are_those_of_the_results():
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert all(f"<!-- table: {name} -->" in "".join(texts) for name in TABLES)
    assert [filled(text) for text in texts] == texts, "run: python -m benchmarks.tables"


@pytest.mark.slow
def test_the_wheel_holds_real_nested_files_and_nothing_at_the_top(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"turbo_opt"}
    assert CUDA_SOURCES
    for name in (
        "turbo_opt/passes/canonicalize.py",
        "turbo_opt/passes/_canonical/rotary.py",
        "turbo_opt/kernels/block_linear/triton.py",
        *(f"turbo_opt/kernels/_cuda/{source.name}" for source in CUDA_SOURCES),
        "turbo_opt/recipes/tiny-wan/cpu.yaml",
        "turbo_opt/calibration/tiny_wan/clips.py",
        "turbo_opt/artifact/templates/report.html",
        "turbo_opt/models/tiny_wan/transformer/diffusion_pytorch_model.safetensors",
        "turbo_opt/models/tiny_wan/tokenizer/tokenizer.json",
        "turbo_opt/py.typed",
    ):
        assert sizes.get(name, 0) > 0 or name.endswith("py.typed"), name
    assert max(sizes.values()) < 16 * 2**20
    assert sum(size for name, size in sizes.items() if "/models/" in name) < 30 * 2**20


def test_no_third_party_import_finds_our_kernels_folder():
    code = "import kernels; assert not {'adaln', '__version__'} & set(dir(kernels))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
