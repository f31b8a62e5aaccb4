"""Naive slicing: what one writes without elastic kernels, in eager PyTorch.

Weights are sliced, activations are scaled in a pass of their own, LayerScale and the residual are passes too,
and stochastic depth gathers and adds rows; as in the official code, but for its gather-copies of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import ElasticBlock, KeptRows

Groups = Sequence[tuple[int, int]]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """`W[:out, :in] (s x) + b[:out]`."""
    width = x.shape[-1]
    if width < weight.shape[1]:
        x = x * (weight.shape[1] / width)
    return F.linear(x, weight[:out_features, :width], None if bias is None else bias[:out_features])


def qkv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[tokens, 3, w]` of three corners."""
    width, largest = x.shape[-1], weight.shape[1]
    rows = torch.arange(3 * largest, device=x.device).view(3, largest)[:, :width].flatten()
    x = x * (largest / width) if width < largest else x
    return F.linear(x, weight[rows, :width], bias[rows]).unflatten(-1, (3, width))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    return F.layer_norm(x, (width,), weight[:width], bias[:width], eps)


def attention(qkv: Tensor, groups: Groups) -> Tensor:
    """One call of PyTorch's attention for each length."""
    outputs = []
    for part, (count, length) in zip(qkv.split([c * n for c, n in groups]), groups, strict=True):
        q, k, v = part.unflatten(0, (count, length)).permute(2, 0, 3, 1, 4).unbind(0)
        o = F.scaled_dot_product_attention(q, k, v)
        outputs.append(o.transpose(1, 2).reshape(count * length, -1))
    return torch.cat(outputs)


def residual(x: Tensor, branch: Tensor, gamma: Tensor | None, kept: KeptRows | None) -> Tensor:
    if gamma is not None:
        branch = branch * gamma[: x.shape[-1]]
    if kept is None:
        return x + branch
    return x.index_add(0, kept.rows, (branch * kept.scale.unsqueeze(-1)).to(x.dtype))


def mlp(x: Tensor, fc1: Tensor, b1: Tensor, fc2: Tensor, b2: Tensor) -> Tensor:
    width, (most, largest) = x.shape[-1], fc1.shape
    return linear(F.gelu(linear(x, fc1, b1, int(width / largest * most))), fc2, b2, width)


def block(
    self: ElasticBlock,
    x: Tensor,
    groups: Groups,
    kept: tuple[KeptRows, KeptRows] | None = None,
    recompute_mlp: bool = False,
    only: Tensor | None = None,
    reuse: bool = False,
) -> Tensor:
    """As `ElasticBlock.forward`, which makes `only` some tokens; this one makes all, in a new tensor."""
    first, second = kept or (None, None)
    norm, attn, parts = self.norm1, self.attn, self.mlp
    rows = x if first is None else x[first.rows]
    h = qkv(layer_norm(rows, norm.weight, norm.bias, norm.eps), attn.qkv.weight, attn.qkv.bias)
    h = attention(h.unflatten(-1, (-1, attn.head_dim)), groups if first is None else first.groups)
    h = linear(h, attn.proj.weight, attn.proj.bias, x.shape[-1])
    x = residual(x, h, self.ls1.gamma if self.ls1 else None, first)
    norm, rows = self.norm2, x if second is None else x[second.rows]
    h = layer_norm(rows, norm.weight, norm.bias, norm.eps)
    h = mlp(h, parts.fc1.weight, parts.fc1.bias, parts.fc2.weight, parts.fc2.bias)
    x = residual(x, h, self.ls2.gamma if self.ls2 else None, second)
    return x if only is None else x[only]


def sinkhorn(t: Tensor, tau: float, iterations: int = 3) -> Tensor:
    """Scaling vector of the prototypes, by normalising all assignments in place."""
    q = (t.to(torch.promote_types(t.dtype, torch.float32)) / tau).exp()
    log_u = torch.zeros_like(q[0])
    for _ in range(iterations):
        used = q.sum(0)
        log_u = log_u - used.log()
        q /= used
        q /= q.sum(1, keepdim=True)
    return log_u


@contextmanager
def installed(compiled: bool = False) -> Iterator[Callable[[], int]]:
    """Make every `ElasticBlock` naive while the context lasts.

    Args:
        compiled: by `torch.compile`, a graph for each shape.

    Yields:
        A function that tells how many graphs were compiled so far.
    """
    torch._dynamo.reset()
    forward = ElasticBlock.forward
    ElasticBlock.forward = torch.compile(block, dynamic=False) if compiled else block  # type: ignore[method-assign]
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 10_000  # beyond it compilation would silently stop
    started = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    try:
        yield lambda: int(torch._dynamo.utils.counters["stats"]["unique_graphs"] - started)
    finally:
        ElasticBlock.forward = forward  # type: ignore[method-assign]
        torch._dynamo.config.recompile_limit = limit
