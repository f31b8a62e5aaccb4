"""Weighted k-nearest-neighbour classification of features.

The protocol of DINO: cosine similarity, votes weighted by `exp(similarity / 0.07)`, top-1 accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from poa.errors import InputError

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CHUNK = 1024  # queries compared with the bank at a time


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Top-1 accuracy of weighted k-NN for several k.

    Args:
        bank: `[N, C]` features of labelled images.
        bank_labels: int64 `[N]`.
        queries: `[M, C]` features to classify.
        query_labels: int64 `[M]`.
        neighbours: values of k; a k above N counts all N.
        temperature: of the weights.

    Returns:
        `{k: accuracy in 0..1}`.

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
    bank = F.normalize(bank.float(), dim=1)
    classes = int(torch.maximum(bank_labels.max(), query_labels.max())) + 1
    correct = dict.fromkeys(neighbours, 0)
    for start in range(0, len(queries), CHUNK):
        part = F.normalize(queries[start : start + CHUNK].float(), dim=1)
        similarity, index = (part @ bank.t()).topk(min(max(neighbours), len(bank)), dim=1)
        weights, votes = (similarity / temperature).exp(), bank_labels[index]
        truth = query_labels[start : start + CHUNK]
        for k in neighbours:
            score = weights.new_zeros(len(part), classes)
            score.scatter_add_(1, votes[:, :k], weights[:, :k])
            correct[k] += int((score.argmax(1) == truth).sum())
    return {k: hits / len(queries) for k, hits in correct.items()}
