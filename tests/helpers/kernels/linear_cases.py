"""Inputs and truth of the tests of linear layers, interpreted and on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import elastic_kernels as ek
from elastic_kernels import backend
from elastic_kernels.linear import Scale
from helpers.kernels.numerics import assert_as_good_as_torch, draw

EPS = 1e-6
HALVES = ("attention-half", "window-half", "mlp-half")


@dataclass(frozen=True)
class Case:
    """Sizes of a product inside a larger weight.

    Attributes:
        rows, width, out: of the product; halves and the MLP ignore `out`.
        kept: rows that take part, of more tokens; None means all of them.
        spare: input features of the weight that are not in use.
        head_dim: of the attention half.
        heads: in use, of two more, in attention halves; None means those of the width.
        hidden: units in use in MLPs; None means those of the width.
        scale: of the products in MLPs and halves.
        activation: of linear layers, MLPs and gates.
    """

    rows: int
    width: int
    out: int
    kept: int | None = None
    spare: int = 16
    head_dim: int = 16
    heads: int | None = None
    hidden: int | None = None
    scale: Scale = "offset"
    activation: str = "gelu"

    @property
    def largest(self) -> int:
        return self.width + self.spare

    @property
    def inner(self) -> tuple[int, int]:
        """Channels of the heads in use, and of all."""
        if self.heads is None:
            return self.width, self.largest
        return self.heads * self.head_dim, (self.heads + 2) * self.head_dim

    @property
    def of_mlp(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "scale": self.scale, "activation": self.activation}

    @property
    def tokens(self) -> int:
        return self.rows if self.kept is None else self.rows + 3

    @property
    def choice(self) -> tuple[Tensor | None, Tensor | None]:
        """Rows and their factors."""
        if self.kept is None:
            return None, None
        order = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(5))
        return order[: self.rows], 1 + torch.rand(self.rows, generator=torch.Generator().manual_seed(6))


FREE_FORMS = ("mlp", "swiglu", "mlp-half", "qkv-bias", "attention-half", "window-half")


def free_cases(form: str) -> list[Case]:
    """Every scale with the share of the width, less and more: of heads, or of hidden units in an MLP."""
    units = (
        [(None, None), (None, 29), (None, 100)]
        if "mlp" in form or form == "swiglu"
        else [(n, None) for n in (None, 1, 3)]
    )
    pairs = product(("offset", None, 0.5), units)
    return [Case(7, 32, 16, heads=heads, hidden=hidden, scale=scale) for scale, (heads, hidden) in pairs]


def corner(*active: int, full: tuple[int, ...], seed: int) -> Tensor:
    """Float64 values of the size of a trained layer's, NaN outside of the corner: never to be read."""
    tensor = torch.full(full, torch.nan, dtype=torch.float64)
    tensor[tuple(slice(0, n) for n in active)] = draw(*active, seed=seed) / active[-1] ** 0.5
    return tensor


def stacked(*active: int, full: tuple[int, ...], seed: int) -> Tensor:
    """Three corners below each other, as the q, k and v projections."""
    return torch.cat([corner(*active, full=full, seed=seed + n) for n in range(3)])


Operator = Callable[..., Tensor]


def linear(case: Case, bias: bool, activation: str | None) -> tuple[Operator, dict[str, Tensor]]:
    full = (case.out + case.spare, case.largest)
    tensors = {"x": draw(case.rows, case.width), "weight": corner(case.out, case.width, full=full, seed=1)}
    if bias:
        tensors["bias"] = corner(case.out, full=full[:1], seed=2)

    def operator(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> Tensor:
        return ek.elastic_linear(
            x, weight, bias, out_features=case.out, activation=activation, scale=1.25, **options
        )

    return operator, tensors


def linear_residual(case: Case, gamma: bool) -> tuple[Operator, dict[str, Tensor]]:
    full = (case.out + case.spare, case.largest)
    tensors = {
        "x": draw(case.rows, case.width),
        "weight": corner(case.out, case.width, full=full, seed=1),
        "residual": draw(case.tokens, case.out, seed=3),
        "bias": corner(case.out, full=full[:1], seed=2),
    }
    if gamma:
        tensors["gamma"] = corner(case.out, full=full[:1], seed=4)
    rows, scale = case.choice

    def operator(
        x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor, gamma: Tensor | None = None, **options
    ) -> Tensor:
        place = {"rows": move(rows, x), "row_scale": move(scale, x)}
        return ek.elastic_linear_residual(x, weight, bias, residual, gamma, **place, **options)

    return operator, tensors


def qkv_weight(case: Case, seed: int) -> Tensor:
    inner, most = case.inner
    return stacked(inner, case.width, full=(most, case.largest), seed=seed)


def qkv(case: Case, bias: bool) -> tuple[Operator, dict[str, Tensor]]:
    tensors = {"x": draw(case.rows, case.width), "weight": qkv_weight(case, seed=1)}
    if bias:
        tensors["bias"] = stacked(case.inner[0], full=case.inner[1:], seed=4)

    def operator(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ek.elastic_qkv(x, weight, bias, out_features=case.inner[0], scale=case.scale)

    return operator, tensors


def mlp_parameters(case: Case) -> dict[str, Tensor]:
    width, largest = case.width, case.largest
    hidden, most = case.hidden or ek.elastic_hidden_features(width, largest, 3 * largest), 3 * largest
    return {
        "fc1_weight": corner(hidden, width, full=(most, largest), seed=1),
        "fc1_bias": corner(hidden, full=(most,), seed=2),
        "fc2_weight": corner(width, hidden, full=(largest, most), seed=3),
        "fc2_bias": corner(width, full=(largest,), seed=4),
    }


def mlp(case: Case) -> tuple[Operator, dict[str, Tensor]]:
    def operator(x: Tensor, **parameters) -> Tensor:
        return ek.elastic_mlp(x, **parameters, **case.of_mlp)

    return operator, {"x": draw(case.rows, case.width), **mlp_parameters(case)}


def swiglu(case: Case) -> tuple[Operator, dict[str, Tensor]]:
    tensors = {"x": draw(case.rows, case.width), **mlp_parameters(case)}
    for name in ("fc1_weight", "fc1_bias"):  # of the gate, and of the units
        tensors[name] = torch.cat([tensors[name], -tensors[name]])

    def operator(x: Tensor, **parameters) -> Tensor:
        return ek.elastic_swiglu(x, **parameters, **case.of_mlp)

    return operator, tensors


def half_parameters(case: Case) -> dict[str, Tensor]:
    full = (case.largest,)
    return {
        "x": draw(case.tokens, case.width),
        "norm_weight": 1 + corner(case.width, full=full, seed=7),
        "norm_bias": corner(case.width, full=full, seed=8),
        "gamma": corner(case.width, full=full, seed=9),
    }


def kept_rows(case: Case, groups: tuple[tuple[int, int], ...], like: Tensor) -> ek.KeptRows | None:
    rows, scale = case.choice
    if rows is None or scale is None:
        return None
    return ek.KeptRows(groups, rows.to(like.device), scale.to(like.device))


def mlp_half(case: Case) -> tuple[Operator, dict[str, Tensor]]:
    def operator(x: Tensor, inplace: bool = False, **parameters) -> Tensor:
        options = {"kept": kept_rows(case, (), x), "hidden": case.hidden, "scale": case.scale}
        return ek.elastic_mlp_half(x, ek.MlpWeights(**parameters), eps=EPS, inplace=inplace, **options)

    return operator, half_parameters(case) | mlp_parameters(case)


def attention_half(case: Case, chosen: bool = False) -> tuple[Operator, dict[str, Tensor]]:
    """Sequences of 5 tokens, then one of the rest; every third token `chosen`, the last one first."""
    first = case.rows // 10
    groups = ((first, 5), (1, case.rows - 5 * first)) if case.rows else ((0, 5),)
    tensors = half_parameters(case) | {
        "qkv_weight": qkv_weight(case, seed=10),
        "qkv_bias": stacked(case.inner[0], full=case.inner[1:], seed=13),
        "proj_weight": corner(case.width, case.inner[0], full=(case.largest, case.inner[1]), seed=16),
        "proj_bias": corner(case.width, full=(case.largest,), seed=17),
    }

    def operator(x: Tensor, inplace: bool = False, **parameters) -> Tensor:
        weights, options = ek.AttentionWeights(**parameters), {"eps": EPS, "head_dim": case.head_dim}
        options["only"] = torch.arange(0, len(x), 3, device=x.device).flip(0) if chosen else None
        options |= {"kept": kept_rows(case, groups, x), "inplace": inplace}
        options |= {"heads": case.heads, "scale": case.scale}
        return ek.elastic_attention_half(x, weights, ek.Sequences(groups), **options)

    return operator, tensors


def window_half(case: Case) -> tuple[Operator, dict[str, Tensor]]:
    """Maps of 1x5 tokens, then one of the rest; windows of 3, shifted."""
    first, n, heads = case.rows // 10, 9, case.inner[0] // case.head_dim
    maps = [(first, 1, 5), (1, 1, case.rows - 5 * first)] if case.rows else [(0, 1, 5)]
    _, tensors = attention_half(case)
    tensors["window_bias"] = corner(heads, n, n, full=(case.inner[1] // case.head_dim, n, n), seed=18)

    def operator(x: Tensor, window_bias: Tensor, inplace: bool = False, **parameters) -> Tensor:
        kept = kept_rows(case, tuple((count, height * width) for count, height, width in maps), x)
        weights, layout = ek.AttentionWeights(**parameters), ek.Windows(maps, 3, 1, window_bias)
        return ek.elastic_attention_half(
            x, weights, layout, eps=EPS, head_dim=case.head_dim, kept=kept, inplace=inplace,
            heads=case.heads, scale=case.scale,
        )  # fmt: skip

    return operator, tensors


def move(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.device)


def forms(case: Case) -> dict[str, tuple[Operator, dict[str, Tensor]]]:
    """Every operator with every epilogue; those that choose rows only where the case does."""
    choosing = {
        "residual": linear_residual(case, gamma=False),
        "residual-gamma": linear_residual(case, gamma=True),
        "mlp-half": mlp_half(case),
    }
    if case.inner[0] % case.head_dim == 0:
        choosing["attention-half"] = attention_half(case)
        choosing["window-half"] = window_half(case)
        choosing["attention-half-only"] = attention_half(case, chosen=True)
    if case.kept is not None:
        return choosing
    return choosing | {
        "linear": linear(case, bias=False, activation=None),
        "linear-bias": linear(case, bias=True, activation=None),
        "linear-act": linear(case, bias=True, activation=case.activation),
        "qkv": qkv(case, bias=False),
        "qkv-bias": qkv(case, bias=True),
        "mlp": mlp(case),
        "swiglu": swiglu(case),
    }


def run(operator: Operator, tensors: dict[str, Tensor], name: str, seed: int = 20) -> dict[str, Tensor]:
    """Output and the gradient of every tensor on a backend, for a random upstream gradient."""
    leaves = {key: t.detach().requires_grad_() for key, t in tensors.items()}
    with backend(name):
        y = operator(**leaves)
        dy = draw(*y.shape, seed=seed).to(y)
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"output": y.detach(), **{f"d{key}": g for key, g in zip(leaves, grads, strict=True)}}


def assert_accurate(case: Case, form: str, dtype: torch.dtype, device: str = "cpu", runs: int = 1) -> None:
    """As good as the definition, the same bits in all runs; gradients are zero where tensors are poisoned."""
    operator, exact = forms(case)[form]
    low = {key: t.to(device, dtype) for key, t in exact.items()}
    truth = run(operator, {key: t.double() for key, t in low.items()}, "reference")
    ours, *again = (run(operator, low, "triton") for _ in range(runs))
    torchs = run(operator, low, "reference")
    for key, value in ours.items():
        assert value.dtype == dtype, key
        assert_as_good_as_torch(value, torchs[key], truth[key], label=key)
        assert all(torch.equal(value, other[key]) for other in again), key
        if key != "output":
            assert not value[low[key[1:]].isnan()].any(), key


def head_mlps(case: Case) -> tuple[Operator, dict[str, Tensor]]:
    def operator(x: Tensor, **parameters) -> Tensor:
        first, second = (tuple(parameters[f"fc{i}_{name}"] for name in ("weight", "bias")) for i in (1, 2))
        return torch.cat(ek.elastic_head_mlps(x, [[first, second]] * 2, scale=case.scale))

    return operator, mlp(dataclasses.replace(case, spare=0))[1]


def assert_same_kept(case: Case, form: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """The same bits, whether activations are kept or made again."""
    operator, exact = head_mlps(case) if form == "head-mlps" else forms(case)[form]
    tensors = {key: t.to(device, dtype) for key, t in exact.items()}
    results = []
    for keep in (False, True):
        with ek.kept_activations(keep):
            results.append(run(operator, tensors, "triton"))
    again, kept = results
    assert all(torch.equal(kept[key], again[key]) for key in again)


def assert_same_in_place(
    case: Case, half: str, affine: bool, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """A half-block that may overwrite its stream: the same bits, forward and backward, in its memory."""
    operator, exact = forms(case)[half]
    tensors = {key: t.to(device, dtype) for key, t in exact.items()}
    if not affine:
        tensors |= {"norm_weight": None, "norm_bias": None}
    leaves = {key: t.nan_to_num().requires_grad_() for key, t in tensors.items() if t is not None}
    inputs, results = list(leaves.values()), []
    for inplace in (False, True):
        stream = leaves["x"] * 1.0
        with backend("triton"):
            y = operator(**{**tensors, **leaves, "x": stream, "inplace": inplace})
            assert (y.data_ptr() == stream.data_ptr()) == inplace
            results.append([y.detach().clone(), *torch.autograd.grad(y.sin().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def with_persistent_programs(monkeypatch: pytest.MonkeyPatch, **settings: int) -> list[tuple[int, bool]]:
    """Fused products take these settings; of each launch of their persistent kernel, programs and whether it
    is backward."""
    from elastic_kernels.triton_ops import gemm, linear, linear_dgrad, linear_persistent

    kernel, others = linear_persistent._linear_persistent_kernel, linear.config_for
    launches: list[tuple[int, bool]] = []

    class Noted:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
            def launch(*arguments: Any, **flags: Any) -> Any:
                launches.append((grid[0], flags["BACKWARD"]))
                return kernel[grid](*arguments, **flags)

            return launch

    config = gemm.GemmConfig(**settings)
    for module in (linear, linear_dgrad):
        monkeypatch.setattr(
            module,
            "config_for",
            lambda form, *of: others(form, *of) if form in ("linear", "dgrad") else config,
        )
    monkeypatch.setattr(linear_persistent, "_linear_persistent_kernel", Noted())
    return launches
