"""Layers of today's vision transformers against formulas on slices, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import elastic_kernels as ek
from helpers.kernels.numerics import draw, poisoned

C, DIM = 24, 8


@pytest.mark.parametrize("gather", [False, True])
def test_rms_norm(gather: bool) -> None:
    x, weight, rows = draw(5, 16), draw(16, seed=1), torch.tensor([3, 0])
    shared = poisoned(weight, C)
    y = ek.elastic_rms_norm(x, shared, 0.1, rows=rows if gather else None)
    kept = x[rows] if gather else x
    torch.testing.assert_close(y, kept / (kept.pow(2).mean(1, keepdim=True) + 0.1).sqrt() * weight)
    (gradient,) = torch.autograd.grad(y.sin().sum(), shared)
    assert gradient[:16].all() and not gradient[16:].any()


@pytest.mark.parametrize(("scale", "hidden"), [("offset", None), (None, 7), (0.5, 20)])
def test_swiglu(scale: str | float | None, hidden: int | None) -> None:
    n = hidden or 13  # int(16 / 24 * 20)
    gate, units, down, bias = draw(n, 16), draw(n, 16, seed=1), draw(16, n, seed=2), draw(2 * n, seed=3)
    fc1 = torch.cat([poisoned(gate, 20, C), poisoned(units, 20, C)])
    b1 = torch.cat([poisoned(bias[:n], 20), poisoned(bias[n:], 20)])
    y = ek.elastic_swiglu(x := draw(5, 16), fc1, b1, poisoned(down, C, 20), None, hidden=hidden, scale=scale)
    s, t = {"offset": (C / 16, 20 / n), None: (1, 1), 0.5: (0.5, 0.5)}[scale]
    h = F.silu(s * x @ gate.T + bias[:n]) * (s * x @ units.T + bias[n:])
    torch.testing.assert_close(y, t * h @ down.T)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_activations(name: str) -> None:
    x, mlp = draw(5, 16), ek.ElasticMLP(C, 30, scale=None, activation=name).double()
    act = {"silu": lambda u: u * u.sigmoid(), "gelu_tanh": lambda u: F.gelu(u, approximate="tanh")}[name]
    h = act(x @ mlp.fc1.weight[:20, :16].T + mlp.fc1.bias[:20])
    torch.testing.assert_close(mlp(x), h @ mlp.fc2.weight[:16, :20].T + mlp.fc2.bias[:16])


@pytest.mark.parametrize("halves", [False, True])
def test_rotary_turns_pairs_by_their_angles(halves: bool) -> None:
    angles = draw(5, DIM // 2)
    full = torch.cat([angles, angles], 1) if halves else angles.repeat_interleave(2, 1)
    rotary = ek.Rotary.of_sequences(full.sin(), full.cos(), prefix=1, count=2, halves=halves)
    qkv = draw(12, 3, 2, DIM)
    turned = rotary.turn(qkv)
    assert torch.equal(turned[:, 2], qkv[:, 2]) and torch.equal(turned[::6], qkv[::6])
    pairs = [t.unflatten(-1, (2, -1)).mT if halves else t.unflatten(-1, (-1, 2)) for t in (qkv, turned)]
    before, after = (torch.view_as_complex(t.contiguous()) for t in pairs)
    phase = torch.polar(torch.ones_like(angles), angles)[:, None, None]
    torch.testing.assert_close(after[1:6, :2], before[1:6, :2] * phase)
    few = rotary.rows(torch.tensor([7, 2]))
    assert torch.equal(few.turn(qkv[[7, 2]]), turned[[7, 2]])


def test_scores_of_a_grid_depend_on_distances_alone() -> None:
    rotary = ek.Rotary.of_grid(3, 4, DIM)
    qkv = draw(1, 3, 1, DIM).float().expand(12, -1, -1, -1)
    q, k, _ = rotary.turn(qkv).unbind(1)
    scores = (q[:, 0] @ k[:, 0].T).view(3, 4, 3, 4)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[1, 1, 2, 3])
    assert not torch.isclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])


@pytest.mark.parametrize("qk_norm", ["layer", "rms", None])
def test_block_of_any_layers(qk_norm: str | None) -> None:
    """Norms of queries and keys, rotary, gate, LayerScale: against PyTorch's on slices."""
    torch.manual_seed(0)
    attn = ek.ElasticRotaryAttention(C, DIM, qk_norm=qk_norm, scale=None, eps=1e-3)
    parts = ek.ElasticRMSNorm(C), attn, ek.ElasticLayerNorm(C), ek.ElasticSwiGLU(C, 30, scale=None)
    block = ek.ElasticPreNormBlock(*parts, ek.LayerScale(C, 0.5), ek.LayerScale(C, 2.0)).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.uniform_(-1, 1)
    rotary = ek.Rotary.of_grid(2, 2, DIM, prefix=1, count=2)
    x, w, heads = draw(10, 16), 16, 1
    h = F.rms_norm(x, (w,), block.norm1.weight[:w], 1e-6)
    stack = attn.qkv.weight.view(3, C, C)[:, : heads * DIM, :w]
    qkv = torch.einsum("tw,gcw->tgc", h, stack) + attn.qkv.bias.view(3, C)[:, : heads * DIM]
    qkv = qkv.unflatten(-1, (heads, DIM))
    if qk_norm:
        pairs = ((qkv[:, 0], attn.q_norm), (qkv[:, 1], attn.k_norm))
        if qk_norm == "layer":
            normed = [F.layer_norm(t, (DIM,), n.weight, n.bias, 1e-3) for t, n in pairs]
        else:
            normed = [F.rms_norm(t, (DIM,), n.weight, 1e-3) for t, n in pairs]
        qkv = torch.stack([*normed, qkv[:, 2]], 1)
    q, k, v = rotary.turn(qkv).view(2, 5, 3, heads, DIM).permute(2, 0, 3, 1, 4)
    o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(10, heads * DIM)
    y = (
        x
        + 0 * o[:, :1]
        + block.ls1.gamma[:w] * (o @ attn.proj.weight[:w, : heads * DIM].T + attn.proj.bias[:w])
    )
    h = F.layer_norm(y, (w,), block.norm2.weight[:w], block.norm2.bias[:w], block.norm2.eps)
    y = y + block.ls2.gamma[:w] * block.mlp(h, 11)
    torch.testing.assert_close(block(x, [(2, 5)], hidden=11, heads=heads, rotary=rotary), y)


@pytest.mark.parametrize("width", [5, 12])
def test_patches_and_1x1_convolutions(width: int) -> None:
    embed, conv = ek.ElasticPatchEmbed(2, 12).double(), ek.ElasticConv1x1(12, 7).double()
    images = draw(2, 3, 4, 6)
    tokens = embed(images, width)
    torch.testing.assert_close(tokens, embed.proj(images).flatten(2).mT[..., :width])
    maps = tokens.mT.unflatten(-1, (2, 3))
    expected = F.conv2d(maps * (12 / width), conv.weight[:6, :width], conv.bias[:6])
    torch.testing.assert_close(conv(maps, 6), expected)


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="expected 'layer', 'rms' or None, got 'batch'"):
        ek.ElasticRotaryAttention(C, DIM, qk_norm="batch")
    with pytest.raises(ValueError, match="head_dim a multiple of 4, got 6"):
        ek.Rotary.of_grid(2, 2, 6)
    with pytest.raises(ValueError, match=r"sin and cos \[3, 8\], got \[4, 8\] and \[4, 8\]"):
        ek.Rotary.of_grid(2, 2, DIM).turn(draw(3, 3, 1, DIM))
    with pytest.raises(ValueError, match=r"fc1_weight \[2 \* H, C\] and fc2_weight \[C, H\], got"):
        ek.elastic_swiglu(draw(2, 4), draw(6, 4), None, draw(4, 4), None)
    with pytest.raises(ValueError, match="activation one of 'gelu', 'gelu_tanh', 'silu', got 'relu'"):
        ek.elastic_mlp(draw(2, 4), draw(4, 4), None, draw(4, 4), None, activation="relu")
    with pytest.raises(ValueError, match=r"width in 1..12, got 13"):
        ek.ElasticPatchEmbed(2, 12)(draw(1, 3, 2, 2).float(), 13)
