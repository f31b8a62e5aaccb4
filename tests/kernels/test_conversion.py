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


def sliced_into(narrow: nn.Module, full: nn.Module, gated: bool) -> None:
    """A network's first channels: of blocks as `corner`, of patches on the first axis, else on the last."""
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            whole = full.get_parameter(name)
            if not name.startswith("blocks."):
                axis = 0 if name.startswith("patch_embed") else -1
                parameter.copy_(whole.narrow(axis, 0, parameter.shape[axis]))
            else:
                parameter.copy_(corner(name.split(".", 2)[2], whole, parameter, gated))


@pytest.mark.parametrize("kind", ["plain", "gated", "rotary"])
def test_a_network_of_timm_and_its_prefixes(kind: str, timm: Any) -> None:
    """Four registers: a DINOv2, one with a gate, and one with a rotary embedding, against sliced ones."""
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "init_values": 0.5}
    gate = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU} if kind == "gated" else {}
    plain = {"reg_tokens": 4, "no_embed_class": True, **gate}
    turned = {"use_rot_pos_emb": True, "rope_type": "dinov3", "use_abs_pos_emb": False, "qkv_bias": False}
    turned |= {"num_reg_tokens": 4, "rope_rotate_half": True, "use_post_transformer_norm": True}

    def network(width: int) -> nn.Module:
        sized = sizes | {"embed_dim": width, "num_heads": width // DIM}
        if kind == "rotary":
            return timm.models.eva.Eva(**sized, **turned).double().eval()
        return timm.models.VisionTransformer(**sized, **plain).double().eval()

    torch.manual_seed(0)
    full, images = network(C), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.uniform_(-0.5, 0.5)
    blocks = [ek.elastic_block_from_timm(block, scale=None) for block in full.blocks]
    for width in (C, 16):
        narrow = network(width)
        sliced_into(narrow, full, kind == "gated")
        x, rope = narrow.patch_embed(images), None
        x = narrow._pos_embed(x)
        if kind == "rotary":
            x, rope = x
        shape, options = x.shape, {}
        assert shape == (2, 16 + 5, width)
        if rope is not None:
            angles = rope.double().chunk(2, -1)
            options = {"rotary": ek.Rotary.of_sequences(*angles, prefix=5, count=2, halves=True)}
        y = x.flatten(0, 1)
        for block in blocks:
            y = block(y, [shape[:2]], **options)
        torch.testing.assert_close(narrow.norm(y.view(shape)), narrow.forward_features(images))


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
    block = made(timm, "dinov2", C)
    block.attn.register_parameter("sink", nn.Parameter(torch.zeros(4)))
    with pytest.raises(ValueError, match="expected no other parameters, got attn.sink"):
        ek.elastic_block_from_timm(block)
    for make in (ek.elastic_block_from_timm, ek.elastic_block_from_vit):
        with pytest.raises(ValueError, match="expected a .*pre-norm .*, got ResPostBlock"):
            make(timm.models.vision_transformer.ResPostBlock(C, 4))
