"""Inputs and truth of norms and the rotary embedding of queries and keys, interpreted and on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_kernels import Rotary, backend, qk_norm
from helpers.kernels.numerics import assert_all_as_good, draw

Form = tuple[str | None, str | None]  # norm, pairs of channels
NORMS = (None, "rms", "layer")
FORMS: list[Form] = [(norm, pairs) for norm in NORMS for pairs in (None, "neighbours", "halves")][1:]


def assert_accurate(sizes: tuple[int, int, int], form: Form, dtype: torch.dtype, device: str = "cpu") -> None:
    """Output and gradients of `(tokens, heads, head_dim)` are as good as the reference's."""
    (tokens, heads, dim), (norm, pairs) = sizes, form
    qkv = draw(tokens, 3, heads + 1, dim, seed=1).to(device, dtype)[:, :, :heads]
    vectors = [draw(2, dim, seed=2 + n).float().to(device) for n in range(2)][: NORMS.index(norm)]
    angles = draw(tokens, dim, seed=5).float().to(device)  # each channel's its own
    dy = draw(tokens, 3, heads, dim, seed=6).to(device, dtype)

    def run(name: str, exact: bool = False) -> list[Tensor]:
        leaves, tables, upstream = [qkv, *vectors], [angles.sin(), angles.cos()], dy
        if exact:
            leaves, tables = ([t.double() for t in part] for part in (leaves, tables))
            upstream = dy.double()
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        rotary = None if pairs is None else Rotary(*tables, halves=pairs == "halves")
        with backend(name):
            y = qk_norm(leaves[0], *leaves[1:], eps=0.1, rotary=rotary)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    assert_all_as_good(run("triton"), run("reference"), run("reference", exact=True))
