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

from elastic_kernels import ElasticBlock, ElasticBottleneck, ElasticSwinBlock, KeptRows, Rotary
from elastic_kernels.window_attention import MASK_VALUE

Groups = Sequence[tuple[int, int]]
Maps = Sequence[tuple[int, int, int]]


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
    only: Tensor | None = None,
    inplace: bool = False,
    rotary: Rotary | None = None,
) -> Tensor:
    """As `ElasticBlock.forward`, which makes `only` some tokens; this one makes all, in a new tensor."""
    if rotary is not None:
        raise ValueError("naive: expected learned positions, got a rotary embedding")
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


def window_attention(
    qkv: Tensor, bias: Tensor, pad: Tensor, maps: Maps, *, window: int, shift: int = 0
) -> Tensor:
    """Padding, roll, partition, matrix products and back, for each size of map."""
    heads, dim = qkv.shape[2:]
    outputs = []
    parts = qkv.flatten(1).split([count * height * width for count, height, width in maps])
    for part, (count, height, width) in zip(parts, maps, strict=True):
        fill = pad[:, :heads].to(qkv.dtype).flatten()
        rows, columns = (-(-side // window) * window for side in (height, width))
        x = part.unflatten(0, (count, height, width))
        x = torch.cat([x, fill.expand(count, rows - height, width, -1)], 1)
        x = torch.cat([x, fill.expand(count, rows, columns - width, -1)], 2)
        x = x.roll((-shift, -shift), (1, 2)) if shift else x
        x = x.view(count, rows // window, window, columns // window, window, -1).transpose(2, 3)
        q, k, v = x.reshape(count, -1, window**2, 3, heads, dim).permute(3, 0, 1, 4, 2, 5).unbind(0)
        scores = (q * dim**-0.5) @ k.transpose(-1, -2) + bias[:heads].to(qkv.dtype)
        if shift:
            scores = scores + _apart(rows, columns, window, shift, scores)
        x = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3)
        x = x.unflatten(1, (rows // window, columns // window)).unflatten(3, (window, window))
        x = x.transpose(2, 3).reshape(count, rows, columns, -1)
        x = x.roll((shift, shift), (1, 2)) if shift else x
        outputs.append(x[:, :height, :width].reshape(count * height * width, -1))
    return torch.cat(outputs)


def _apart(rows: int, columns: int, window: int, shift: int, like: Tensor) -> Tensor:
    """The mask of shifted windows, `[windows, 1, n, n]`."""
    label = like.new_zeros(rows, columns)
    edges = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (down, right) in enumerate((down, right) for down in edges for right in edges):
        label[down, right] = number
    label = (
        label.view(rows // window, window, columns // window, window).transpose(1, 2).flatten(2).flatten(0, 1)
    )
    return MASK_VALUE * (label[:, None, :, None] != label[:, None, None, :]).to(like.dtype)


def relative_position_bias(table: Tensor, window: int) -> Tensor:
    """The bias `[heads, n, n]` by an index into the table."""
    side = torch.arange(window, device=table.device)
    y, x = side.repeat_interleave(window), side.repeat(window)
    index = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
    return table[index].permute(2, 0, 1)


def swin_block(
    self: ElasticSwinBlock,
    x: Tensor,
    maps: Maps,
    kept: tuple[KeptRows, KeptRows] | None = None,
    inplace: bool = False,
) -> Tensor:
    """As `ElasticSwinBlock.forward`, in a new tensor."""
    first, second = kept or (None, None)
    norm, attn, parts, active = self.norm1, self.attn, self.mlp, maps
    if first is not None:
        active = [(c, height, width) for (c, _), (_, height, width) in zip(first.groups, maps, strict=True)]
    rows = x if first is None else x[first.rows]
    h = qkv(layer_norm(rows, norm.weight, norm.bias, norm.eps), attn.qkv.weight, attn.qkv.bias)
    bias = relative_position_bias(attn.relative_position_bias_table, attn.window)
    pad = attn.qkv.bias.view(3, -1, attn.head_dim)
    h = h.unflatten(-1, (-1, attn.head_dim))
    h = window_attention(h, bias, pad, active, window=attn.window, shift=attn.shift)
    x = residual(x, linear(h, attn.proj.weight, attn.proj.bias, x.shape[-1]), None, first)
    norm, rows = self.norm2, x if second is None else x[second.rows]
    h = layer_norm(rows, norm.weight, norm.bias, norm.eps)
    return residual(
        x, mlp(h, parts.fc1.weight, parts.fc1.bias, parts.fc2.weight, parts.fc2.bias), None, second
    )


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Channels-last maps `[N, ..., C]`; addition and ReLU are passes of their own."""
    channels = x.shape[-1]
    y = F.group_norm(x.movedim(-1, 1), groups, weight[:channels], bias[:channels], eps).movedim(1, -1)
    if residual is not None:
        y = y + residual
    return F.relu(y) if activation == "relu" else y


def bottleneck(self: ElasticBottleneck, x: Tensor, middle: int) -> Tensor:
    """As `ElasticBottleneck.forward`, by convolutions with sliced weights on scaled maps."""

    def convolved(x: Tensor, weight: Tensor, out: int, stride: int = 1) -> Tensor:
        width = x.shape[-1]
        if width < weight.shape[1]:
            x = x * (weight.shape[1] / width)
        kernel = (weight if weight.dim() == 4 else weight[..., None, None])[:out, :width]
        y = F.conv2d(x.permute(0, 3, 1, 2), kernel, stride=stride, padding=kernel.shape[-1] // 2)
        return y.permute(0, 2, 3, 1)

    def normed(norm: torch.nn.GroupNorm, x: Tensor, added: Tensor | None = None, relu: bool = True) -> Tensor:
        activation = "relu" if relu else None
        return group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, added, activation)

    out, identity = self.conv3.out_features, x
    if self.downsample is not None:
        layer, norm = self.downsample
        identity = normed(norm, convolved(x, layer.weight, out, self.stride), relu=False)  # type: ignore[arg-type]
    h = normed(self.norm1, convolved(x, self.conv1.weight, middle))
    h = normed(self.norm2, convolved(h, self.conv2.weight, middle, self.stride))
    return normed(self.norm3, convolved(h, self.conv3.weight, out), identity)


def sinkhorn(t: Tensor, tau: float) -> Tensor:
    """Scaling vector of the prototypes, by normalising all assignments in place."""
    q = (t.to(torch.promote_types(t.dtype, torch.float32)) / tau).exp()
    log_u = torch.zeros_like(q[0])
    for _ in range(3):
        used = q.sum(0)
        log_u = log_u - used.log()
        q /= used
        q /= q.sum(1, keepdim=True)
    return log_u


NAIVE: dict[type[torch.nn.Module], Callable[..., Tensor]] = {
    ElasticBlock: block,
    ElasticSwinBlock: swin_block,
    ElasticBottleneck: bottleneck,
}


@contextmanager
def installed(compiled: bool = False) -> Iterator[Callable[[], int]]:
    """Make every elastic block naive while the context lasts.

    Args:
        compiled: by `torch.compile`, a graph for each shape.

    Yields:
        A function that tells how many graphs were compiled so far.
    """
    torch._dynamo.reset()
    forwards = {kind: kind.forward for kind in NAIVE}
    for kind, function in NAIVE.items():
        kind.forward = torch.compile(function, dynamic=False) if compiled else function
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 10_000  # beyond it compilation would silently stop
    started = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    try:
        yield lambda: int(torch._dynamo.utils.counters["stats"]["unique_graphs"] - started)
    finally:
        for kind, forward in forwards.items():
            kind.forward = forward
        torch._dynamo.config.recompile_limit = limit
