"""Real operators with every setting that the search may choose, on small shapes; without a GPU's times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fullgraph_cases import CASES
from prototype_cases import Case, run

from elastic_kernels import tune as search
from elastic_kernels import tuning

OPERATORS = (
    "elastic_attention_half kept", "elastic_qkv", "window_attention", "elastic_mlp", "elastic_group_norm",
)  # fmt: skip


def test_all_settings_give_the_fallbacks_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "none")
    monkeypatch.setattr(search, "timed", lambda operator, milliseconds: [1.0])
    torch.manual_seed(0)
    with search.record() as calls:
        for case in OPERATORS:
            function, leaves = CASES[case]()
            leaves = [leaf.detach().half().requires_grad_() for leaf in leaves]
            torch.autograd.grad(function(*leaves).sum(), leaves)
        run(Case(rows=7, prototypes=20, dim=16).inputs(torch.float16, torch.float16), "triton")
    lines = list(search.tune(calls, tmp_path / "table.json", 10, torch.device("cpu")))
    print(*lines, sep="\n")
    assert not [line for line in lines if "left out" in line]
    entries = tuning.read(tmp_path / "table.json", tuning.header(torch.device("cpu")))
    assert {entry.key.kernel for entry in entries} == tuning.TUNABLES.keys()
