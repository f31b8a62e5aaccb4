"""Elastic blocks of timm's vision transformers: plain ones, DINOv2 with registers or a gate, EVA, DINOv3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elastic_kernels.blocks import ElasticBlock
from elastic_kernels.linear import Scale
from elastic_kernels.modules import ElasticLayerNorm, ElasticMLP, LayerScale
from elastic_kernels.vit_layers import (
    ElasticPreNormBlock,
    ElasticRMSNorm,
    ElasticRotaryAttention,
    ElasticSwiGLU,
)

OP = "elastic_block_from_timm"


def elastic_block_from_timm(block: Any, *, scale: Scale = "offset") -> ElasticPreNormBlock:
    """Make an elastic block of a pre-norm transformer block of timm.

    Args:
        block: a `Block` of `timm.models.vision_transformer` or an `EvaBlock` of `timm.models.eva`: with
            LayerNorm or RMSNorm; LayerScale or none; norms of q and k or none; an MLP with a GELU (exact or
            tanh) or SiLU, or a SwiGLU, packed or not. Angles of its rotary embedding go to the call: see
            `Rotary`.
        scale: of all products, as in `elastic_linear`.

    Returns:
        The block. Parameters are those of `block`, not copies, but for what timm keeps in several tensors
        (projections of q, k and v, or their biases, and of a gate), which are copied into one. Stochastic
        depth and dropout are not taken over.

    Raises:
        ValueError: the block has a part that an elastic block lacks; the message names it.

    Example:
        >>> import timm, torch
        >>> from elastic_kernels import elastic_block_from_timm
        >>> block = timm.models.vision_transformer.Block(64, num_heads=4, qk_norm=True, init_values=0.1)
        >>> elastic_block_from_timm(block)(torch.randn(10, 32), [(2, 5)]).shape
        torch.Size([10, 32])
    """
    if not {"Block", "EvaBlock"} & {kind.__name__ for kind in type(block).__mro__}:
        raise ValueError(f"{OP}: expected a pre-norm Block or EvaBlock, got {type(block).__name__}")
    gammas = [_gamma(block, name) for name in ("1", "2")]
    with torch.device("meta"):
        scales = [None if gamma is None else LayerScale(len(gamma), 1.0) for gamma in gammas]
    for holder, gamma in zip(scales, gammas, strict=True):
        if holder is not None and gamma is not None:
            holder.gamma = gamma
    attn, mlp = _attention(block.attn, scale), _mlp(block.mlp, scale)
    elastic = ElasticPreNormBlock(_norm(block.norm1), attn, _norm(block.norm2), mlp, *scales)
    ours, theirs = (sum(p.numel() for p in module.parameters()) for module in (elastic, block))
    if ours not in (theirs, theirs + attn.qkv.out_features // 3):  # timm has no bias of keys
        names = dict(block.named_parameters()).keys() - dict(elastic.named_parameters()).keys()
        raise ValueError(f"{OP}: expected no other parameters, got {', '.join(sorted(names))}")
    return elastic


def _gamma(block: Any, number: str) -> nn.Parameter | None:
    layer = getattr(block, f"ls{number}", None)
    return getattr(layer, "gamma", None) if layer is not None else getattr(block, f"gamma_{number}", None)


def _one(*parts: Tensor) -> nn.Parameter:
    """A parameter itself, or several tensors as a new one."""
    if len(parts) == 1 and isinstance(parts[0], nn.Parameter):
        return parts[0]
    return nn.Parameter(torch.cat([part.detach() for part in parts]))


def _without(op: str, owner: Any, *names: str) -> None:
    for name in names:
        part = getattr(owner, name, None)
        if part is not None and not isinstance(part, nn.Identity):
            raise ValueError(f"{op}: expected no {name}, got {type(part).__name__}")


def _norm(norm: Any) -> ElasticLayerNorm | ElasticRMSNorm:
    weight: Any = getattr(norm, "weight", None)
    bias: Any = getattr(norm, "bias", None)
    eps = getattr(norm, "eps", 0.0)
    rms = "rms" in type(norm).__name__.lower()
    if weight is None or rms == (bias is not None):
        raise ValueError(f"{OP}: expected a LayerNorm with a bias or an RMSNorm, got {norm}")
    with torch.device("meta"):
        elastic = ElasticRMSNorm(len(weight), eps) if rms else ElasticLayerNorm(len(weight), eps=eps)
    elastic.weight = weight
    if isinstance(elastic, ElasticLayerNorm):
        elastic.bias = bias
    return elastic


def _linear(layer: nn.Linear, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]


def _attention(attn: Any, scale: Scale) -> ElasticRotaryAttention:
    _without(OP, attn, "norm", "gate")
    fused = getattr(attn, "qkv", None) is not None
    parts = [attn.qkv] if fused else [attn.q_proj, attn.k_proj, attn.v_proj]
    weight, biases = _one(*(part.weight for part in parts)), [part.bias for part in parts]
    if fused and getattr(attn, "q_bias", None) is not None:
        biases = [attn.q_bias, attn.k_bias, attn.v_bias]
    if any(bias is not None for bias in biases):
        zeros = weight.new_zeros(weight.shape[0] // 3)  # timm has no bias of keys
        biases = [zeros if bias is None else bias for bias in biases]
    bias = None if biases[0] is None else _one(*biases)
    heads, width = attn.num_heads, weight.shape[1]
    with torch.device("meta"):
        elastic = ElasticRotaryAttention(
            width, weight.shape[0] // (3 * heads), bias is not None, heads=heads, scale=scale
        )
    _linear(elastic.qkv, weight, bias)
    _linear(elastic.proj, attn.proj.weight, attn.proj.bias)
    if not isinstance(getattr(attn, "q_norm", None), nn.Identity | None):
        elastic.q_norm, elastic.k_norm = _norm(attn.q_norm), _norm(attn.k_norm)
    return elastic


def _mlp(mlp: Any, scale: Scale) -> ElasticMLP | ElasticSwiGLU:
    _without(OP, mlp, "norm")
    activation = _activation(mlp.act)
    split = hasattr(mlp, "fc1_g")
    hidden, width = mlp.fc2.in_features, mlp.fc2.out_features
    gated = split or mlp.fc1.out_features == 2 * hidden
    if gated and getattr(mlp, "gate_last", False):
        raise ValueError(f"{OP}: expected a gate that is the first half of fc1, got {mlp}")
    with torch.device("meta"):
        kind = ElasticSwiGLU if gated else ElasticMLP
        elastic = kind(width, hidden, scale=scale, activation=activation)
    first = [mlp.fc1_g, mlp.fc1_x] if split else [mlp.fc1]
    bias = None if first[0].bias is None else _one(*(part.bias for part in first))
    _linear(elastic.fc1, _one(*(part.weight for part in first)), bias)
    _linear(elastic.fc2, mlp.fc2.weight, mlp.fc2.bias)
    return elastic


def _activation(act: nn.Module) -> str:
    name = type(act).__name__
    tanh = name == "GELUTanh" or getattr(act, "approximate", "none") == "tanh"
    kind = {"GELU": "gelu", "GELUTanh": "gelu", "SiLU": "silu"}.get(name)
    if kind is None:
        raise ValueError(f"{OP}: expected an activation GELU or SiLU, got {act}")
    return "gelu_tanh" if tanh else kind


def elastic_block_from_vit(block: Any, *, scale: Scale = "offset") -> ElasticBlock:
    """Make an elastic block that shares the parameters of a timm-style ViT block.

    Args:
        block: a pre-norm module with `norm1`, `attn.qkv`, `attn.proj`, `attn.num_heads`, `norm2`, `mlp.fc1`,
            `mlp.fc2`, and perhaps `ls1.gamma` and `ls2.gamma`, such as
            `timm.models.vision_transformer.Block`.
        scale: as of `ElasticBlock`.

    Returns:
        The block; its parameters are those of `block`, not copies. Stochastic depth and dropout are not taken
        over: pass `kept` to the block instead.

    Raises:
        ValueError: the block has parts that an elastic block lacks, such as norms of q and k.

    Example:
        >>> import timm, torch
        >>> from elastic_kernels import elastic_block_from_vit
        >>> block = elastic_block_from_vit(timm.models.vision_transformer.Block(64, num_heads=4))
        >>> block(torch.randn(10, 32), [(2, 5)]).shape
        torch.Size([10, 32])
    """
    op = "elastic_block_from_vit"
    if any(word in type(block).__name__ for word in ("Post", "RelPos")):
        raise ValueError(f"{op}: expected a plain pre-norm block, got {type(block).__name__}")
    attn, mlp = block.attn, block.mlp
    _without(op, attn, "q_norm", "k_norm", "norm")
    _without(op, mlp, "norm")
    act = getattr(mlp, "act", None)
    if not isinstance(act, nn.GELU) or act.approximate != "none":
        raise ValueError(f"{op}: expected an exact nn.GELU, got {act}")
    (hidden, width), heads = mlp.fc1.weight.shape, attn.num_heads
    gammas = [getattr(getattr(block, name, None), "gamma", None) for name in ("ls1", "ls2")]
    if (gammas[0] is None) != (gammas[1] is None):
        raise ValueError(f"{op}: expected ls1 and ls2 both or neither, got one of them")
    if attn.qkv.weight.shape != (3 * width, width) or width % heads:
        raise ValueError(
            f"{op}: expected qkv [{3 * width}, {width}] for {heads} equal heads, "
            f"got {tuple(attn.qkv.weight.shape)}"
        )
    with torch.device("meta"):
        elastic = ElasticBlock(
            width,
            hidden,
            width // heads,
            eps=block.norm1.eps,
            layer_scale=None if gammas[0] is None else 1.0,
            qkv_bias=attn.qkv.bias is not None,
            scale=scale,
        )
    elastic.norm2.eps = block.norm2.eps
    theirs = dict(block.named_parameters())
    mine = dict(elastic.named_parameters())
    if theirs.keys() != mine.keys():
        odd = ", ".join(sorted(theirs.keys() ^ mine.keys()))
        raise ValueError(f"{op}: expected the parameters of a plain block, differs in {odd}")
    for name in mine:
        owner, _, leaf = name.rpartition(".")
        setattr(elastic.get_submodule(owner), leaf, theirs[name])
    return elastic
