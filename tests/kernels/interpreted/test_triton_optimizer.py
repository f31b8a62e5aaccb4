"""The one-pass optimiser under Triton's interpreter, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch

from elastic_kernels import FusedAdamW, backend
from helpers.kernels.optimizer_cases import Setting, assert_accurate, assert_same_at_odd_addresses, run


def test_steps() -> None:
    assert_accurate()


def test_a_gradient_that_is_no_number_changes_no_weight() -> None:
    setting = Setting(torch.float32)
    optimizer = setting.optimizer()
    with backend("triton"):
        setting.give_gradients(0)
        optimizer.step(momentum=0.9)
        before = setting.results(optimizer)
        setting.give_gradients(1)
        setting.params[5].grad[3, 4] = torch.inf
        optimizer.step(max_norm=1.0, momentum=0.9)
    assert not optimizer.finite
    assert optimizer.norms["first"].isfinite() and not optimizer.norms["second"].isfinite()
    for name, value in setting.results(optimizer).items():
        assert torch.equal(value, before[name]) != name.startswith("average"), name


def test_addresses_that_allow_no_wide_accesses() -> None:
    assert_same_at_odd_addresses()


def test_gradients_of_other_strides() -> None:
    results = []
    for transposed in (False, True):
        setting = Setting(torch.float32)
        setting.give_gradients(0)
        if transposed:
            grad = setting.params[0].grad
            setting.params[0].grad = grad.t().contiguous().t()
        optimizer = setting.optimizer()
        with backend("triton"):
            optimizer.step()
        results.append(setting.results(optimizer))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_tensors_that_moved_are_found_again() -> None:
    setting = Setting(torch.float32)
    optimizer = setting.optimizer()
    with backend("triton"):
        for step in range(2):
            setting.give_gradients(step)
            optimizer.step()
            old = setting.params[0].data
            setting.params[0].data = old.clone()
            old.fill_(torch.nan)
    assert all(p.isfinite().all() for p in setting.params)


@pytest.mark.parametrize("first", ["triton", "reference", "torch"])
def test_goes_on_where_another_way_stopped(first: str) -> None:
    """The state of a step taken in another way continues as if there had been only one."""
    setting, expected = Setting(torch.float32), Setting(torch.float32)
    plain = torch.optim.AdamW(expected.groups)
    before = torch.optim.AdamW(setting.groups) if first == "torch" else setting.optimizer()
    after = setting.optimizer()
    for step in range(2):
        for each in (setting, expected):
            each.give_gradients(step)
        plain.step()
        if step == 1:
            after.load_state_dict(before.state_dict())
        with backend("triton" if step == 1 or first == "torch" else first):
            (after if step == 1 else before).step()
    for ours, torchs in zip(setting.params, expected.params, strict=True):
        torch.testing.assert_close(ours, torchs)
        assert float(after.state[ours]["step"]) == 2


def test_repeats_bitwise() -> None:
    first, second = (run(Setting(torch.float32), "triton")[0] for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = FusedAdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with backend("triton"), pytest.raises(TypeError, match="dense float32 gradients, got torch.sparse_coo"):
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float16, {}, "contiguous float32 parameters, got torch.float16"),
        (torch.float32, {"amsgrad": True}, "neither amsgrad nor maximize"),
    ],
)
def test_what_the_kernel_does_not_take(dtype: torch.dtype, options: dict, message: str) -> None:
    optimizer = FusedAdamW([torch.zeros(3, dtype=dtype, requires_grad=True)])
    optimizer.param_groups[0].update(options)
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        optimizer.step()
