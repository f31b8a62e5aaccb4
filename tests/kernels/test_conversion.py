"""Blocks of timm as elastic blocks: equal at full size, and each prefix to a sliced block of timm."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_kernels as ek

C, DIM, TOKENS, PREFIX = 32, 8, 7, 3


@pytest.fixture(scope="module")
def timm() -> Any:
    return pytest.importorskip("timm", reason="timm does not import here", exc_type=Exception)


def dinov2(timm: Any, width: int, **options: Any) -> nn.Module:
    return timm.models.vision_transformer.Block(
        width, width // DIM, init_values=0.5, qkv_bias=True, **options
    )


def eva(timm: Any, width: int, **options: Any) -> nn.Module:
    norm = partial(nn.LayerNorm, eps=1e-6)
    return timm.models.eva.EvaBlock(
        width, width // DIM, num_prefix_tokens=PREFIX, init_values=0.5, norm_layer=norm, **options
    )


KINDS = {
    "dinov2": (dinov2, {}),
    "dinov2-swiglu": (dinov2, {"mlp_layer": "SwiGLUPacked", "act_layer": nn.SiLU}),
    "qk-norm-rms-tanh": (dinov2, {"qk_norm": True, "norm_layer": "RmsNorm", "act_layer": "GELUTanh"}),
    "dinov3": (eva, {"qkv_bias": False, "rotate_half": True}),
    "eva02": (eva, {"qkv_fused": False, "swiglu_mlp": True, "swiglu_align_to": 8}),
    "eva-qkv-bias": (eva, {"act_layer": nn.SiLU}),
}


def made(timm: Any, kind: str, width: int) -> nn.Module:
    make, options = KINDS[kind]
    named = {k: getattr(timm.layers, v) if isinstance(v, str) else v for k, v in options.items()}
    torch.manual_seed(0)
    block = make(timm, width, **named).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.uniform_(-0.5, 0.5)
    return block


def corner(name: str, full: Tensor, like: Tensor, gated: bool) -> Tensor:
    """What a narrower block has of a parameter; q, k and v, and the halves of a gate, are stacked."""
    groups = 3 if "attn.qkv." in name else 2 if gated and name.startswith("mlp.fc1.") else 1
    parts = full.unflatten(0, (groups, -1))
    sizes = (like.shape[0] // groups, *like.shape[1:])
    return parts[(slice(None), *(slice(0, n) for n in sizes))].flatten(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_block(kind: str, timm: Any) -> None:
    full = made(timm, kind, C)
    elastic = ek.elastic_block_from_timm(full, scale=None)
    angles = torch.rand(TOKENS - PREFIX, DIM // 2, dtype=torch.float64)
    halves = KINDS[kind][1].get("rotate_half", False)
    angles = torch.cat([angles, angles], 1) if halves else angles.repeat_interleave(2, 1)
    rope, options = torch.cat([angles.sin(), angles.cos()], 1), {}
    if KINDS[kind][0] is eva:
        table = ek.Rotary.of_sequences(angles.sin(), angles.cos(), prefix=PREFIX, count=2, halves=halves)
        options = {"rotary": table}
    for width in (C, 16):
        block = made(timm, kind, width)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                whole = full.get_parameter(name)
                parameter.copy_(corner(name, whole, parameter, gated=kind == "dinov2-swiglu"))
        x = torch.randn(2, TOKENS, width, dtype=torch.float64)
        expected = block(x, rope=rope) if options else block(x)
        torch.testing.assert_close(elastic(x.flatten(0, 1), [(2, TOKENS)], **options).view_as(x), expected)


@pytest.mark.parametrize("gated", [False, True])
def test_a_dinov2_with_registers(gated: bool, timm: Any) -> None:
    options = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU} if gated else {}
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": C, "depth": 2, "num_heads": 4, "reg_tokens": 4}
    vit = timm.models.VisionTransformer(**sizes, init_values=0.5, no_embed_class=True, **options).eval()
    images = torch.randn(2, 3, 32, 32)
    x = vit._pos_embed(vit.patch_embed(images))
    shape, x = x.shape, x.flatten(0, 1)
    assert shape[1] == 16 + 5
    for block in vit.blocks:
        x = ek.elastic_block_from_timm(block, scale=None)(x, [shape[:2]])
    torch.testing.assert_close(vit.norm(x.view(shape)), vit.forward_features(images))


def test_a_vit_with_rotary_embedding(timm: Any) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": C, "depth": 2, "num_heads": 2}
    kinds = {"use_rot_pos_emb": True, "rope_type": "dinov3", "use_abs_pos_emb": False, "qkv_bias": False}
    kinds |= {"num_reg_tokens": 4, "init_values": 0.5, "rope_rotate_half": True, "qkv_fused": True}
    vit = timm.models.eva.Eva(**sizes, **kinds, use_post_transformer_norm=True).eval()
    images = torch.randn(2, 3, 32, 32)
    x, rope = vit._pos_embed(vit.patch_embed(images))
    shape, x = x.shape, x.flatten(0, 1)
    rotary = ek.Rotary.of_sequences(*rope.chunk(2, -1), prefix=5, count=2, halves=True)
    for block in vit.blocks:
        x = ek.elastic_block_from_timm(block, scale=None)(x, [shape[:2]], rotary=rotary)
    torch.testing.assert_close(vit.norm(x.view(shape)), vit.forward_features(images))


def test_parameters_are_shared(timm: Any) -> None:
    block = made(timm, "dinov2", C)
    elastic = ek.elastic_block_from_timm(block)
    assert dict(elastic.named_parameters()).keys() == dict(block.named_parameters()).keys()
    assert all(p is block.get_parameter(name) for name, p in elastic.named_parameters())


def test_parts_that_an_elastic_block_lacks(timm: Any) -> None:
    block = made(timm, "dinov2", C)
    block.mlp.act = nn.ReLU()
    with pytest.raises(ValueError, match="an activation GELU or SiLU, got ReLU"):
        ek.elastic_block_from_timm(block)
    with pytest.raises(ValueError, match="expected no norm, got LayerNorm"):
        ek.elastic_block_from_timm(eva(timm, C, scale_attn_inner=True))
