"""Targets and losses beyond the recorded cases: many ranks, extreme values, degenerate batches."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from helpers import processes
from poa import losses

PROTOTYPES = (16, 24)


def logits(rows: int, seed: int, spread: float = 0.3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(rows, k, generator=generator) for k in PROTOTYPES]


def plain_sinkhorn(t: Tensor, temperature: float) -> Tensor:
    """The textbook iteration in float64, rows and columns of a matrix."""
    q = (t.double() / temperature).exp().t()
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * q.shape[0]
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).t()


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_sinkhorn_is_the_textbook_iteration(rows: int) -> None:
    problems = logits(rows, seed=rows)
    for target, t in zip(losses.sinkhorn(problems, 0.05), problems, strict=True):
        torch.testing.assert_close(target.dense().double(), plain_sinkhorn(t, 0.05), atol=1e-6, rtol=1e-4)


def test_sinkhorn_survives_what_overflows_a_plain_exponential() -> None:
    problems = logits(8, seed=0, spread=30.0)
    assert (problems[0] / 0.04).exp().isinf().any()
    for target in (t.dense() for t in losses.sinkhorn(problems, 0.04)):
        assert target.isfinite().all()
        torch.testing.assert_close(target.sum(1), torch.ones(8))


def test_sinkhorn_without_rows() -> None:
    assert [t.dense().shape for t in losses.sinkhorn(logits(0, 0), 0.05)] == [(0, 16), (0, 24)]


def _rank_work(rank: int, world: int, rows: list[int], port: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    union = logits(sum(rows), seed=9)
    start = sum(rows[:rank])
    mine = [t[start : start + rows[rank]] for t in union]
    centers = {equal: [torch.zeros(k) for k in PROTOTYPES] for equal in (False, True)}
    for equal, values in centers.items():
        losses.update_centers(values, mine, micro_batches=[len(mine[0])] if equal else None)
    targets = [target.dense() for target in losses.sinkhorn(mine, 0.05)]
    result = {"targets": targets, "exact": centers[False], "official": centers[True]}
    torch.save(result, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("rows", [[5, 5], [7, 3], [4, 0], [3, 1, 0, 6]], ids=str)
def test_ranks_equal_one_process_on_the_union(rows: list[int], tmp_path, free_port: int) -> None:
    world = len(rows)
    arguments = (world, rows, free_port, str(tmp_path))
    mp.start_processes(_rank_work, arguments, nprocs=world, start_method=processes.FORKS.get_start_method())
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    union = logits(sum(rows), seed=9)
    for head, target in enumerate(losses.sinkhorn(union, 0.05)):
        got = torch.cat([r["targets"][head] for r in results])
        torch.testing.assert_close(got, target.dense(), atol=1e-6, rtol=1e-5)
    for head, t in enumerate(union):
        parts = [p.mean(0) for p in t.split(rows) if len(p)]
        for result in results:
            torch.testing.assert_close(result["exact"][head], 0.1 * t.mean(0))
            torch.testing.assert_close(result["official"][head], 0.1 * torch.stack(parts).mean(0))


def test_centers_stay_without_rows() -> None:
    centers = [torch.ones(k) for k in PROTOTYPES]
    losses.update_centers(centers, logits(0, 0))
    assert all(torch.equal(c, torch.ones_like(c)) for c in centers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_koleo_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(6, 8).to(dtype)
    x[1] = x[0]
    loss = losses.koleo(x)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    torch.testing.assert_close(loss, losses.koleo(x.float()))


def test_feature_distillation() -> None:
    """Against the sums written out, of another width; the gradient leads to the teacher's similarities."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 4, generator=generator, dtype=torch.float64)

    def shares(tokens: torch.Tensor, row: int) -> torch.Tensor:
        unit = tokens / tokens.norm(dim=1, keepdim=True)
        return torch.stack([unit[row] @ unit[k] / 0.1 for k in range(5) if k != row]).softmax(0)

    pairs = [(shares(x, row), shares(teacher, row)) for row in range(5)]
    expected = torch.stack([(t * (t.log() - s.log())).sum() for s, t in pairs]).mean()
    loss = losses.feature_distillation(x, teacher, 0.1)
    torch.testing.assert_close(loss, expected)
    assert float(losses.feature_distillation(2 * teacher, teacher, 0.1)) < 1e-12
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(losses.feature_distillation(x - 0.01 * gradient, teacher, 0.1)) < float(loss)
