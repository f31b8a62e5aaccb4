"""Retrieval: held-out images ask for training images of their class, by cosine similarity of class tokens.

mAP   mean over queries of the average precision of the whole ranking
R@k   share of queries with an image of their class among the first k
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from poa.errors import InputError
from poa.evaluate.knn import class_token
from poa.evaluate.protocol import Labelled, Protocol

RECALLS = (1, 5, 10)
CHUNK = 256  # queries ranked at a time


def average_precisions(similarities: Tensor, relevant: Tensor) -> Tensor:
    """Average precision of each query, float64 `[Q]`, by similarities `[Q, N]`; 0 where nothing is relevant.

    `mean over relevant ranks r of (relevant among the first r) / r`, as scikit-learn's without ties;
    `relevant` is bool `[Q, N]`.
    """
    hits = relevant.gather(1, similarities.argsort(1, descending=True)).double()
    ranks = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)
    return (hits * hits.cumsum(1) / ranks).sum(1) / hits.sum(1).clamp_min(1)


def retrieval_scores(bank: Labelled, queries: Labelled, device: torch.device) -> dict[str, float]:
    """`{"map": 0..1, "recall@1": 0..1, ...}` of features `[N, C]` of both. Raises InputError: no images in
    the bank."""
    if not len(bank.labels):
        raise InputError("retrieval: expected training images with labels, got none")
    features, labels = F.normalize(bank.features.to(device).float(), dim=1), bank.labels.to(device)
    sums: dict[str, float] = dict.fromkeys(["map", *(f"recall@{k}" for k in RECALLS)], 0.0)
    for start in range(0, len(queries.labels), CHUNK):
        asked = F.normalize(queries.features[start : start + CHUNK].to(device).float(), dim=1)
        similarities = asked @ features.t()
        relevant = queries.labels[start : start + CHUNK].to(device)[:, None] == labels
        sums["map"] += float(average_precisions(similarities, relevant).sum())
        first = relevant.gather(1, similarities.topk(min(max(RECALLS), len(labels)), dim=1).indices)
        for k in RECALLS:
            sums[f"recall@{k}"] += float(first[:, :k].any(1).sum())
    return {name: value / len(queries.labels) for name, value in sums.items()}


RETRIEVAL = Protocol(
    "retrieval",
    "also score the retrieval of images of the same class: mAP and recall",
    class_token,
    lambda train, queries, device, seed: retrieval_scores(train, queries, device),
    lambda score: {"mAP": score["map"], **{f"R@{k}": score[f"recall@{k}"] for k in RECALLS}},
    "mAP",
    {"protocol": "retrieval of training images of the same class by cosine similarity of class tokens"},
)
