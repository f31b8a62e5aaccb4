"""What the operators' `autograd.Function`s share: no second derivatives, nothing lost, a second run like the
first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import elastic_kernels as ek
from elastic_kernels import backend
from elastic_kernels.recompute import recomputed
from elastic_kernels.triton_ops.registration import ops
from helpers.kernels.numerics import draw

WIDTH, HEAD = 32, 16
GROUPS = [(2, 5)]


def block() -> ek.ElasticBlock:
    torch.manual_seed(0)
    return ek.ElasticBlock(WIDTH, 64, HEAD, layer_scale=0.5)


def swin_block() -> ek.ElasticSwinBlock:
    torch.manual_seed(0)
    return ek.ElasticSwinBlock(WIDTH, 64, HEAD, 2, 1)


def weight(*shape: int) -> Tensor:
    return draw(*shape, seed=1).float()


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: ek.elastic_layer_norm(x, weight(WIDTH), weight(WIDTH), 1e-6),
    "unit_rows": lambda x: ek.unit_rows(x, weight(10, 1)),
    "embedding": lambda x: ek.elastic_embedding(
        [x[:8].view(2, 1, 8, 16)],
        ek.EmbeddingWeights(weight(40, 1, 8, 8), weight(40), weight(1, 1, 40), None, weight(1, 3, 40)),
        WIDTH,
    ),
    "koleo": lambda x: ek.koleo(x),
    "linear": lambda x: ek.elastic_linear(x, weight(40, WIDTH), None),
    "linear-gelu": lambda x: ek.elastic_linear(x, weight(40, WIDTH), None, activation="gelu"),
    "linear-residual": lambda x: ek.elastic_linear_residual(x, weight(WIDTH, WIDTH), None, weight(10, WIDTH)),
    "mlp": lambda x: ek.elastic_mlp(x, weight(64, WIDTH), None, weight(WIDTH, 64), None),
    "head_mlps": lambda x: ek.elastic_head_mlps(x, [[(weight(8, WIDTH), None), (weight(3, 8), None)]])[0],
    "qkv": lambda x: ek.elastic_qkv(x, weight(3 * WIDTH, WIDTH), None),
    "rms_norm": lambda x: ek.elastic_rms_norm(x, weight(WIDTH), 1e-6),
    "swiglu": lambda x: ek.elastic_swiglu(x, weight(64, WIDTH), None, weight(WIDTH, 32), None),
    "qk_norm": lambda x: ek.qk_norm(x.repeat(1, 3).view(10, 3, 2, HEAD), weight(2, HEAD)),
    "mixed_width": lambda x: ek.mixed_width_block(block(), x, GROUPS, torch.full((10,), WIDTH)),
    "group_norm": lambda x: ek.elastic_group_norm(x[None], weight(WIDTH), weight(WIDTH), 4, 1e-5),
    "attention": lambda x: ek.packed_attention(x.repeat(1, 3).view(10, 3, 2, HEAD), GROUPS),
    "offsets": lambda x: ek.packed_attention(
        x.repeat(1, 3).view(10, 3, 2, HEAD), torch.tensor([0, 3, 10]), torch.tensor([1] * 3 + [2] * 7)
    ),
    "window_attention": lambda x: ek.window_attention(
        x[:8].repeat(1, 3).view(8, 3, 2, HEAD), weight(2, 4, 4), weight(3, 2, HEAD), [(2, 2, 2)], window=2
    ),
    "block": lambda x: block()(x, GROUPS),
    "last-block": lambda x: block()(x, GROUPS, only=torch.tensor([0, 5])),
    "swin-block": lambda x: swin_block()(x, [(1, 2, 5)]),
    "prototypes": lambda x: ek.prototype_cross_entropy(
        [x],
        weight(7, WIDTH),
        weight(3, 7),
        torch.zeros(7),
        torch.zeros(10, 2).long(),
        teacher_temperature=0.1,
    )[0],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_are_refused(name: str) -> None:
    """Also where the upstream gradient needs none itself, as in a gradient penalty."""
    x = draw(10, WIDTH).float().requires_grad_()
    with pytest.raises(
        RuntimeError, match="expected a backward with create_graph=False, got create_graph=True"
    ):
        torch.autograd.grad(OPERATORS[name](x).sum(), x, create_graph=True)
    (first,) = torch.autograd.grad(OPERATORS[name](x).sum(), x)
    assert first.shape == x.shape and not first.requires_grad


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_written_that_only_backward_would_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad no operator gives a second tensor: no statistics, no sums before activations."""
    x = draw(10, WIDTH).float().requires_grad_()
    trained = OPERATORS[name](x)
    written: list[int] = []

    def counted(operator: Callable[..., Any], *arguments: Any) -> Any:
        outputs = operator(*arguments)
        if outputs is not None:  # else it writes into the stream
            written.append(sum(output.numel() > 0 for output in tree_leaves(outputs)))
        return outputs

    for key, operator in vars(ops).items():
        monkeypatch.setattr(ops, key, partial(counted, operator))
    with torch.no_grad():
        served = OPERATORS[name](x)
    assert torch.equal(trained, served) and max(written) <= 1


def test_a_gradient_that_would_be_lost_is_an_error() -> None:
    """The wide pass, for whose gradients the narrow one's wait, is no part of the loss."""
    network = block()
    with ek.shared_gradients():
        network(draw(10, WIDTH).float(), GROUPS)
        narrow = network(draw(10, HEAD).float(), GROUPS)
    with pytest.raises(RuntimeError, match="expected every pass to be part of the loss, got 6 weights"):
        narrow.sum().backward()


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_the_second_run_takes_what_held_in_the_first(name: str) -> None:
    """The backend and the rounded weights, though their contexts have ended; gradients to the bit."""
    network, x = block(), draw(10, WIDTH).float().requires_grad_()
    leaves = [x, *network.parameters()]
    weights = [p for p in network.parameters() if p.dim() == 2]
    results = []
    for again in (False, True):
        with ek.working_weights(weights, torch.float16), backend(name), torch.autocast("cpu", torch.float16):
            y = recomputed(network, x, GROUPS) if again else network(x, GROUPS)
        with backend("reference" if name == "triton" else "triton"):
            results.append(torch.autograd.grad(y.sin().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
