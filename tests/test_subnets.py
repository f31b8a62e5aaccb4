"""Search spaces, sizes of subnets and the sampling policies."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from poa.backbones import ElasticViT, ViTConfig
from poa.errors import InputError
from poa.subnets import POLICIES, SearchSpace, Subnet, SubnetSampler

PAPER = ViTConfig()
TINY = ViTConfig(
    image_size=32, patch_size=8, min_width=16, max_width=48, min_depth=2, max_depth=4, head_dim=16
)


def sampler(policy: str, micro_batches: int, config: ViTConfig = PAPER, seed: int = 0) -> SubnetSampler:
    return SubnetSampler(config.space, policy, seed, micro_batches, config.flops)


@pytest.mark.parametrize("subnet", TINY.space, ids=str)
def test_sizes_match_the_network(subnet: Subnet) -> None:
    backbone = ElasticViT(TINY)
    assert TINY.parameters(subnet) == sum(p.numel() for p in backbone.to_static(subnet).parameters())
    # The counter knows the products of the math attention only.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone([torch.zeros(1, 3, 32, 32)], subnet)
    assert TINY.flops(subnet) == counter.get_total_flops()


@pytest.mark.parametrize("policy", POLICIES)
def test_draws_depend_on_seed_step_and_micro_batch_only(policy: str) -> None:
    first = [[sampler(policy, 4).draw(step, c) for c in range(4)] for step in (0, 7, 1000)]
    one = sampler(policy, 4)
    again = [[one.draw(step, c) for c in (3, 1, 0, 2)] for step in (1000, 0, 7)]
    assert [[row[2], row[1], row[3], row[0]] for row in again] == [first[2], first[0], first[1]]
    assert any(sampler(policy, 4, seed=1).draw(step, 0) != one.draw(step, 0) for step in range(20))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_long_run_distribution(policy: str, micro_batches: int) -> None:
    """Over `micro_batches` rounds every policy draws every subnet in proportion to its multiplicity."""
    entries = TINY.space.round_of_draws()
    draw = sampler(policy, micro_batches, TINY)
    steps = len(entries)  # `micro_batches` rounds of draws in all
    counts = Counter(
        draw.draw(step, micro_batch) for step in range(steps) for micro_batch in range(micro_batches)
    )
    assert counts == {s: micro_batches * n for s, n in Counter(entries).items()}


def test_micro_batches_differ_under_per_rank_and_agree_under_shared() -> None:
    per_rank, shared = sampler("per-rank", 4), sampler("shared", 4)
    assert any(per_rank.draw(step, 0) != per_rank.draw(step, 1) for step in range(10))
    assert all(len({shared.draw(step, c) for c in range(4)}) == 1 for step in range(100))


@pytest.mark.parametrize(("micro_batches", "worst", "mean"), [(2, 0.1, 0.01), (8, 0.2, 0.04), (32, 0.3, 0.1)])
def test_balanced_micro_batches_cost_about_the_same(micro_batches: int, worst: float, mean: float) -> None:
    """How much more than a step's mean its dearest subnet costs; under per-rank it is 50 % and more."""
    draw = sampler("balanced", micro_batches)
    excess = []
    for step in range(2 * len(draw.entries)):
        costs = [PAPER.flops(draw.draw(step, micro_batch)) for micro_batch in range(micro_batches)]
        excess.append(max(costs) * micro_batches / sum(costs) - 1)
    print(f"micro-batches {micro_batches}: worst {max(excess):.3f}, mean {sum(excess) / len(excess):.3f}")
    assert max(excess) < worst
    assert sum(excess) / len(excess) < mean


def test_balanced_steps_are_shuffled_not_sorted() -> None:
    draw = sampler("balanced", 8)
    costs = [PAPER.flops(draw.draw(step, 0)) for step in range(60)]
    rises = sum(a < b for a, b in zip(costs, costs[1:], strict=False))
    assert 15 < rises < 45


def test_space_of_one_subnet() -> None:
    space = SearchSpace((64,), (4,))
    assert set(space.round_of_draws()) == {Subnet(64, 4)}
    assert SubnetSampler(space, "per-rank", 0, 1, lambda s: 1.0).draw(5, 0) == Subnet(64, 4)


@pytest.mark.parametrize("text", ["", "64", "x4", "64x", "64x-1", "axb", "64x4x2"])
def test_subnet_text_must_be_width_x_depth(text: str) -> None:
    with pytest.raises(InputError, match="WIDTHxDEPTH"):
        Subnet.parse(text)


def test_outside_the_space() -> None:
    with pytest.raises(InputError, match=r"subnet 400x12: expected a width of 384..1024 step 64"):
        PAPER.space.require(Subnet(400, 12))
    with pytest.raises(InputError, match="expected one of per-rank, shared, balanced, got 'random'"):
        sampler("random", 1)
    with pytest.raises(ValueError, match=r"micro_batch: expected 0..1, got 2"):
        sampler("shared", 2).draw(0, 2)
