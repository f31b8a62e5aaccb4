"""Weighted k-nearest-neighbour classification of features.

The protocol of DINO: cosine similarity, votes weighted by `exp(similarity / 0.07)`, top-1 accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from poa.backbones import Backbone
from poa.errors import InputError
from poa.evaluate.protocol import Function, Protocol
from poa.subnets import Subnet

NEIGHBOURS = (10, 20, 100, 200)
REPORTED_K = 20
"""The k that curves, plots and pages show."""

TEMPERATURE = 0.07
CHUNK = 1024  # queries compared at a time
BANK_CHUNK = 1 << 17  # with so many images of the bank


def class_token(backbone: Backbone, subnet: Subnet) -> Function:
    """Class-token features `[B, width]` of a subnet."""
    return lambda images: backbone([images], subnet)[0].cls.float()


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: torch.device | None = None,
) -> dict[int, float]:
    """Top-1 accuracy of weighted k-NN for several k, `{k: accuracy in 0..1}`.

    Args:
        bank, bank_labels: `[N, C]` features of labelled images, and int64 `[N]`.
        queries, query_labels: the same of `M` images to classify.
        neighbours: values of k; a k above N counts all N.
        temperature: of the weights.
        device: to compute on, which holds a part of the bank at a time; default that of the features.

    Raises:
        InputError: no features, or different numbers of features and labels.
    """
    if not len(bank) or not len(queries):
        raise InputError(f"k-NN: expected features, got {len(bank)} in the bank and {len(queries)} queries")
    if len(bank) != len(bank_labels) or len(queries) != len(query_labels):
        raise InputError(
            f"k-NN: expected a label per feature, got {len(bank_labels)} for {len(bank)} "
            f"and {len(query_labels)} for {len(queries)}"
        )
    device = bank.device if device is None else device
    classes = int(torch.maximum(bank_labels.max(), query_labels.max())) + 1
    correct = dict.fromkeys(neighbours, 0)
    votes_of = bank_labels.to(device)
    for start in range(0, len(queries), CHUNK):
        part = F.normalize(queries[start : start + CHUNK].to(device).float(), dim=1)
        similarity, index = nearest(part, bank, min(max(neighbours), len(bank)))
        weights, votes = (similarity / temperature).exp(), votes_of[index]
        truth = query_labels[start : start + CHUNK].to(device)
        for k in neighbours:
            score = weights.new_zeros(len(part), classes)
            score.scatter_add_(1, votes[:, :k], weights[:, :k])
            correct[k] += int((score.argmax(1) == truth).sum())
    return {k: hits / len(queries) for k, hits in correct.items()}


def nearest(queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and positions of the nearest `count` of the bank, nearest first."""
    best, positions = queries.new_zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.int64)
    positions = positions.to(queries.device)
    for start in range(0, len(bank), BANK_CHUNK):
        part = F.normalize(bank[start : start + BANK_CHUNK].to(queries.device).float(), dim=1)
        nearest, index = (queries @ part.t()).topk(min(count, len(part)), dim=1)
        best, positions = torch.cat([best, nearest], 1), torch.cat([positions, index + start], 1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        positions = positions.gather(1, order)
    return best, positions


KNN = Protocol(
    "knn",
    None,
    class_token,
    lambda bank, queries, device, seed: knn_accuracy(*bank, *queries, device=device),
    lambda score: {f"k={k}": accuracy for k, accuracy in score.items()},
    f"k={REPORTED_K}",
    {
        "protocol": "weighted k-NN, cosine similarity, class token; a k above the bank counts all of it",
        "temperature": TEMPERATURE,
    },
)
