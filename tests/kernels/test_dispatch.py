"""Which backend runs, and that importing costs and says nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from elastic_kernels import backend, dispatch, packed_attention
from elastic_kernels.attention import attention_backend
from elastic_kernels.triton_ops.device import precision
from helpers.kernels.fullgraph_cases import CASES

KERNELS = Path(__file__).parent.parent.parent / "kernels"
QKV = torch.zeros(4, 3, 2, 16)

pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="about the process without an interpreter")


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ELASTIC_KERNELS")}
    environment |= {"PYTHONPATH": str(KERNELS), **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_cpu_tensors_take_the_reference() -> None:
    choice = attention_backend(QKV, [(1, 4)], 16)
    assert choice.backend == "reference"
    assert choice.reason in (
        "the tensors are on a CPU (without TRITON_INTERPRET=1)",
        "Triton is not installed",
    )


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
def test_forced_triton_never_falls_back() -> None:
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match="triton, which was forced, but the tensors are on"),
    ):
        packed_attention(QKV, [(1, 4)])
    assert packed_attention(QKV, [(1, 4)]).shape == (4, 32)


def test_an_interpreter_that_numpy_breaks_is_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setattr(dispatch, "RELEASES", {"triton": (3, 6), "numpy": (2, 4)})
    expected = r"Triton 3\.6 expected numpy<2\.4, got 2\.4"
    with backend("triton"), pytest.raises(RuntimeError, match=expected):
        packed_attention(QKV, [(1, 4)])


def test_contexts_nest_and_end() -> None:
    with backend("reference"):
        assert attention_backend(QKV, [(1, 4)], 16) == ("reference", "forced")
        with pytest.raises(ZeroDivisionError), backend("triton"):
            raise ZeroDivisionError
        assert attention_backend(QKV, [(1, 4)], 16) == ("reference", "forced")
    assert attention_backend(QKV, [(1, 4)], 16).reason != "forced"


def test_wrong_names() -> None:
    wrong = "expected one of reference, triton, sdpa, xformers, got 'cuda'"
    with pytest.raises(ValueError, match=wrong), backend("cuda"):
        pass
    failed = python("import elastic_kernels", ELASTIC_KERNELS_BACKEND="fast")
    assert "backend: expected one of reference, triton, sdpa, xformers, got 'fast'" in failed.stderr


def test_environment_variable() -> None:
    code = (
        "import torch; from elastic_kernels.attention import attention_backend as b; "
        "print(*b(torch.zeros(4), [(1, 4)], 16))"
    )
    assert python(code, ELASTIC_KERNELS_BACKEND="reference").stdout == "reference forced\n"
    forced = python(code, ELASTIC_KERNELS_BACKEND="triton")
    assert "triton, which was forced, but" in forced.stderr


def test_import_prints_nothing_and_brings_neither_poa_nor_triton() -> None:
    code = (
        "import torch, sys, time; had = 'triton' in sys.modules; start = time.process_time(); "
        "import elastic_kernels; spent = time.process_time() - start; assert spent < 0.3, spent; "
        "assert 'poa' not in sys.modules; assert had or 'triton' not in sys.modules"
    )
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


WITHOUT_TRITON = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
"""


def test_works_without_triton() -> None:
    code = WITHOUT_TRITON + (
        "import torch, elastic_kernels as ek\n"
        "print(tuple(ek.packed_attention(torch.zeros(4, 3, 2, 16), [(1, 4)]).shape))\n"
        "with ek.backend('triton'):\n"
        "    ek.packed_attention(torch.zeros(4, 3, 2, 16), [(1, 4)])\n"
    )
    done = python(code)
    assert done.stdout == "(4, 32)\n"
    assert done.stderr.strip().endswith("which was forced, but Triton is not installed")


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("fp32_precision", "tf32", "tf32"),
        ("fp32_precision", "ieee", "ieee"),
        ("allow_tf32", True, "tf32"),
        ("allow_tf32", False, "ieee"),
    ],
)
def test_tf32_is_used_where_pytorch_uses_it(setting: str, value: object, expected: str) -> None:
    """Of both ways to say so; the older cannot be read once the newer was used."""
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, setting)
    setattr(matmul, setting, value)
    try:
        assert precision(torch.zeros(1, device="meta")) == expected  # taken for a GPU's
        assert precision(torch.zeros(1)) == "ieee"
    finally:
        setattr(matmul, setting, before)


def test_report() -> None:
    done = python("import runpy; runpy.run_module('elastic_kernels', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    operators = {case.partition(" ")[0] for case in CASES if case[0].islower()} - {"relative_position_bias"}
    for word in ("torch", "triton", "xformers", "device", "FusedAdamW", "render_crops", *operators):
        assert f"{word} " in done.stdout, word
