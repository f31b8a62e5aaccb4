"""Packed crops, stochastic depth, and several subnets in one graph."""

from __future__ import annotations

import pytest
import torch

from poa.backbones import ElasticViT, ViTConfig
from poa.errors import InputError
from poa.multicrop import StochasticDepth, draw_stochastic_depth, kept_rows, unpack
from poa.subnets import Subnet

CONFIG = ViTConfig(
    image_size=32,
    patch_size=8,
    min_width=16,
    max_width=48,
    min_depth=2,
    max_depth=4,
    head_dim=16,
    layer_scale=0.5,
    drop_path=0.2,
)
SUBNETS = [Subnet(48, 4), Subnet(32, 3), Subnet(16, 2)]


def network() -> ElasticViT:
    backbone = ElasticViT(CONFIG, torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return backbone


def crops() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(4, 3, 32, 32), (6, 3, 16, 16), (2, 3, 8, 24)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def masks() -> list[torch.Tensor | None]:
    return [torch.rand(4, 16, generator=torch.Generator().manual_seed(3)) < 0.3, None, None]


def test_unpack() -> None:
    packed = torch.randn(23, 8)
    first, second = unpack(packed, ((3, 5), (2, 4)))
    assert torch.equal(first[1], packed[5:10]) and torch.equal(second[1], packed[19:])


@pytest.mark.parametrize("subnet", SUBNETS, ids=str)
def test_packed_crops_equal_separate_passes(subnet: Subnet) -> None:
    backbone, groups = network(), crops()
    together = backbone(groups, subnet, masks=masks())
    for group, mask, features in zip(groups, masks(), together, strict=True):
        (alone,) = backbone([group], subnet, masks=[mask])
        torch.testing.assert_close(features.cls, alone.cls)
        torch.testing.assert_close(features.patches, alone.patches)
        torch.testing.assert_close(features.tokens, alone.tokens)


def test_packed_gradients_equal_separate_passes() -> None:
    def gradients(packed: bool) -> list[torch.Tensor]:
        backbone = network()
        lists = [crops()] if packed else [[c] for c in crops()]
        marks = [masks()] if packed else [[m] for m in masks()]
        features = [f for c, m in zip(lists, marks, strict=True) for f in backbone(c, SUBNETS[1], masks=m)]
        sum((f.cls.sin().sum() + f.patches.cos().sum()) for f in features).backward()
        return [p.grad for p in backbone.parameters() if p.grad is not None]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b)


def test_stochastic_depth_keeps_rows_of_each_group() -> None:
    """Kept crops of a packed pass equal separate passes with the same kept crops."""
    backbone, groups, subnet = network(), crops(), SUBNETS[1]
    shapes = tuple((len(c), 1 + c.shape[2] * c.shape[3] // 64) for c in groups)
    generator = torch.Generator().manual_seed(4)
    kept = [[torch.randperm(n, generator=generator)[: n // 2] for n, _ in shapes] for _ in range(6)]

    def schedule(which: list[int]) -> StochasticDepth:
        halves = [
            kept_rows(tuple(shapes[i] for i in which), [k[i] for i in which], [2.0] * len(which))
            for k in kept
        ]
        return StochasticDepth(tuple(zip(halves[::2], halves[1::2], strict=True)))

    together = backbone(groups, subnet, drop=schedule([0, 1, 2]))
    for i, group in enumerate(groups):
        (alone,) = backbone([group], subnet, drop=schedule([i]))
        torch.testing.assert_close(together[i].cls, alone.cls)
        torch.testing.assert_close(together[i].patches, alone.patches)


@pytest.mark.parametrize(("rate", "kept"), [(0.2, {3, 8}), (0.9, {1}), (0.5, {2, 5})])
def test_large_rates_keep_a_fixed_number(rate: float, kept: set[int]) -> None:
    drop = draw_stochastic_depth(((4, 3), (10, 2)), [rate, 0.0], torch.Generator().manual_seed(0))
    assert drop is not None
    for half in drop.blocks[0]:
        assert {n for n, _ in half.groups} == kept
        assert half.rows.unique().numel() == half.rows.numel() == sum(n * t for n, t in half.groups)
        scales = [
            crops / n
            for (crops, _), (n, t) in zip(((4, 3), (10, 2)), half.groups, strict=True)
            for _ in range(n * t)
        ]
        assert torch.equal(half.scale, torch.tensor(scales))
    assert drop.blocks[1][0].groups == ((4, 3), (10, 2))


def test_small_rates_drop_crops_independently() -> None:
    generator = torch.Generator().manual_seed(0)
    drop = draw_stochastic_depth(((1000, 2),), [0.1] * 4, generator)
    assert drop is not None
    counts = [half.groups[0][0] for pair in drop.blocks for half in pair]
    assert len(set(counts)) > 1
    assert all(abs(count - 900) < 5 * (1000 * 0.1 * 0.9) ** 0.5 for count in counts)
    assert float(drop.blocks[0][0].scale[0]) == pytest.approx(1 / 0.9)
    assert draw_stochastic_depth(((4, 3),), [0.0, 0.0], generator) is None


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_two_students_share_one_module_in_one_graph(recompute: bool) -> None:
    """Gradients of two subnets in one backward are the sum of their own, also when recomputed."""

    def run(subnets: list[Subnet], again: bool) -> dict[str, torch.Tensor]:
        backbone = network()
        loss = sum(
            f.cls.sin().sum() + f.patches.cos().sum()
            for s in subnets
            for f in backbone(crops(), s, masks=masks(), recompute=again)
        )
        loss.backward()
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in backbone.named_parameters()
        }

    both = run([SUBNETS[0], SUBNETS[2]], recompute)
    one, other = run([SUBNETS[0]], False), run([SUBNETS[2]], False)
    for name in both:
        torch.testing.assert_close(both[name], one[name] + other[name], msg=name)
    assert float(one["norm.bias"][16:].abs().min()) > 0
    assert not other["norm.bias"][16:].any()


def test_recomputed_stochastic_depth_uses_the_same_rows() -> None:
    def gradient(recompute: bool) -> torch.Tensor:
        backbone = network()
        shapes = tuple((len(c), 1 + c.shape[2] * c.shape[3] // 64) for c in crops())
        drop = draw_stochastic_depth(shapes, [0.5] * 3, torch.Generator().manual_seed(5))
        features = backbone(crops(), SUBNETS[1], drop=drop, recompute=recompute)
        sum(f.cls.sin().sum() for f in features).backward()
        return backbone.blocks[0].mlp.fc1.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("subnet", SUBNETS, ids=str)
def test_tokens_that_nobody_reads_change_nothing(subnet: Subnet, rate: float, recompute: bool) -> None:
    """The chosen tokens and all gradients are those of a last block that computes every token."""
    shapes = network().groups(crops())
    drop = draw_stochastic_depth(shapes, [rate] * subnet.depth, torch.Generator().manual_seed(6))
    count, length = shapes[-1]
    patches = torch.randperm(count * (length - 1), generator=torch.Generator().manual_seed(7))[:3]

    def gradients(few: bool) -> list[torch.Tensor]:
        backbone = network()
        marks = {"masks": masks(), "drop": drop, "recompute": recompute}
        if few:
            actual = backbone.gather_tokens(crops(), patches, subnet, **marks)
        else:
            features = backbone(crops(), subnet, **marks)
            actual = torch.cat([*(f.cls for f in features), features[-1].patches.flatten(0, 1)[patches]])
        actual.sin().sum().backward()
        used = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
        return [actual.detach(), *used.values()]

    for few, every in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(few, every, rtol=1e-10, atol=1e-12)


def test_a_last_block_without_sequences() -> None:
    """Rates so high that no crop takes part: the tokens pass, and every parameter has a gradient."""
    backbone, shapes = network(), network().groups(crops())
    none = kept_rows(shapes, [torch.zeros(0, dtype=torch.int64)] * 3, [2.0] * 3)
    drop = StochasticDepth(((none, none),) * 2)
    patches = torch.tensor([1, 0])
    actual = backbone.gather_tokens(crops(), patches, SUBNETS[2], drop=drop)
    features = backbone(crops(), SUBNETS[2], drop=drop)
    chosen = features[-1].patches.flatten(0, 1)[patches]
    torch.testing.assert_close(actual, torch.cat([*(f.cls for f in features), chosen]))
    actual.sum().backward()
    last = backbone.active_blocks(SUBNETS[2])[-1]
    assert all(p.grad is not None for p in last.parameters())


def test_nothing_remembers_the_subnet() -> None:
    backbone = network()
    first = backbone(crops(), SUBNETS[0])[0].cls
    backbone(crops(), SUBNETS[2])
    assert torch.equal(backbone(crops(), SUBNETS[0])[0].cls, first)


def test_wrong_input() -> None:
    backbone = network()
    with pytest.raises(InputError, match="divisible by patch size 8, got 20x32"):
        backbone([torch.zeros(1, 3, 20, 32).double()])
    with pytest.raises(InputError, match="expected a width of 16, 32, 48"):
        backbone(crops(), Subnet(24, 2))
    with pytest.raises(InputError, match="multiple of head_dim 64, got 100"):
        ViTConfig(min_width=100)
