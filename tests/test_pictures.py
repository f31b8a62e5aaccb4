"""Attention maps and colours of patches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import poa
from helpers.collections_of_images import encoded
from helpers.commands import fails
from poa.__main__ import main
from poa.embedding.pictures import class_attention, patch_colours


def test_attention_is_that_of_the_last_block(trained: Path) -> None:
    """With it as weights of the values, the class token is what the network gives."""
    model, images = poa.load(trained, "32x2"), torch.randn(2, 3, 24, 24)
    heads = class_attention(model, images)
    patches = model.backbone([images])[0].patches.shape[1]
    assert heads.shape == (2, model.backbone.blocks[-1].attn.heads, patches)  # type: ignore
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    attention = model.backbone.blocks[-1].attn  # type: ignore
    attention.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model.backbone([images])
        x, y = seen[0]
        v = attention.qkv(x).unflatten(2, (3, heads.shape[1], -1))[:, :, 2]
        whole = torch.cat([1 - heads.sum(2, keepdim=True), heads], 2)  # the class token is the only other one
        mixed = torch.einsum("bhn,bnhd->bhd", whole, v).flatten(1)
        torch.testing.assert_close(attention.proj(mixed), y[:, 0])


def test_colours_are_principal_components() -> None:
    draw = torch.Generator().manual_seed(0)
    group = torch.randint(2, (4, 9), generator=draw).float()
    tokens = F.one_hot(group.long(), 2).float() @ torch.randn(2, 8, generator=draw)
    colours = patch_colours(tokens + 0.01 * torch.randn(4, 9, 8, generator=draw))[..., 0]
    assert ((colours > 0.5) == (group > 0)).all() or ((colours > 0.5) == (group == 0)).all()
    assert torch.equal(patch_colours(torch.ones(1, 4, 2)), torch.zeros(1, 4, 3))


def test_page_of_a_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(encoded(0))
    page = ["pictures", str(trained), "--out", str(tmp_path / "a.html"), "--images"]
    assert main([*page, str(tmp_path / "a.png")]) == 0
    heads = sum(s.width // 16 for s in poa.Run(trained).config.method.backbone.space)
    text = (tmp_path / "a.html").read_text()
    assert text.count("<figure") == 1 + 4 + heads and "attention, head 0" in text
    assert main([*page[:-1], "--prototypes", "3"]) == 0
    text = (tmp_path / "a.html").read_text()
    used = [
        int(count) for count in re.findall(r"prototype \d+: nearest of (\d+) images", text.replace(",", ""))
    ]
    assert text.count("<figure") == 3 * 8 and used == sorted(used, reverse=True) and 3 <= sum(used) <= 1797
    assert "expected one of --images FILE and --prototypes N" in fails(capsys, *page[:-1])
    assert "pictures: expected images, got" in fails(capsys, *page, str(tmp_path / "none.png"))
