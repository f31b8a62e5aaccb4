"""Attention maps and colours of patches."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import poa
from helpers.collections_of_images import encoded
from helpers.commands import fails
from poa.__main__ import main
from poa.embedding.pictures import class_attention, matches, patch_colours


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


def test_matches_are_mutual_and_the_most_alike_first() -> None:
    draw = torch.Generator().manual_seed(0)
    left = torch.randn(9, 32, generator=draw)
    order = torch.randperm(9, generator=draw)
    noise = torch.randn(9, 32, generator=draw) * torch.linspace(0.1, 0.3, 9)[:, None]
    right = 3 * (left + noise)[order]
    pairs = matches(left, right)
    assert {(a, int(order[b])) for a, b in pairs.tolist()} == {(i, i) for i in range(9)}
    likeness = F.cosine_similarity(left[pairs[:, 0]], right[pairs[:, 1]])
    assert (likeness.diff() <= 0).all() and torch.equal(matches(left, right, 4), pairs[:4])
    assert len(matches(left, left[:1].expand(9, -1))) == 1


def test_page_of_a_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(encoded(0))
    page = ["pictures", str(trained), "--out", str(tmp_path / "a.html"), "--images"]
    assert main([*page, str(tmp_path / "a.png")]) == 0
    heads = sum(s.width // 16 for s in poa.Run(trained).config.method.backbone.space)
    text = (tmp_path / "a.html").read_text()
    assert text.count("<figure") == 1 + 4 + heads and "attention, head 0" in text
    (tmp_path / "ü.png").write_bytes(encoded(1))
    matched = ["--match", str(tmp_path / "ü.png")]
    assert main([*page, *[str(tmp_path / "a.png")] * 2, *matched]) == 0
    text = (tmp_path / "a.html").read_text()
    assert text.count("<figure") == 2 * (1 + 2 * 4 + heads) and text.count("patches most alike") == 2 * 4
    drawn = ["pictures", str(trained), "--out", str(tmp_path / "a.png.png"), "--images", matched[1]]
    assert main([*drawn, *matched]) == 0
    with Image.open(tmp_path / "a.png.png") as picture:
        assert picture.size == ((1 + 2) * 136 + 2 * 128 + 8, 5 * 156)
        joined = np.asarray(picture)[156:284, -264:-8]  # an image and itself: lines are level
        assert (joined[:, :128] != joined[:, 128:]).any() and (joined[:, 120:136].std(1) == 0).any()
    assert "expected --images FILE with --match" in fails(capsys, *page[:-1], "--prototypes", "3", *matched)
    assert "ending in .html or .png, got" in fails(capsys, *drawn[:3], "a.gif", *drawn[4:])
    assert main([*page[:-1], "--prototypes", "3"]) == 0
    text = (tmp_path / "a.html").read_text()
    used = [
        int(count) for count in re.findall(r"prototype \d+: nearest of (\d+) images", text.replace(",", ""))
    ]
    assert text.count("<figure") == 3 * 8 and used == sorted(used, reverse=True) and 3 <= sum(used) <= 1797
    assert "expected one of --images FILE and --prototypes N" in fails(capsys, *page[:-1])
    assert "pictures: expected images, got" in fails(capsys, *page, str(tmp_path / "none.png"))
