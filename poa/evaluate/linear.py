"""Linear classification of frozen features: many classifiers at once over one pass of features.

    13 learning rates x {1, 4} last blocks x {class tokens, class tokens + mean patch token}

Each is trained by SGD (momentum 0.9, no weight decay, cosine to 0); the best on the queries is reported with
its setting, as is usual. There is no augmentation, because the features are computed once.

Source: the linear evaluation of DINOv2 (Oquab et al., 2023), its learning rates and inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from poa.backbones import Backbone
from poa.errors import InputError
from poa.evaluate.protocol import Function, Protocol
from poa.subnets import Subnet

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
BLOCKS = (1, 4)
BATCH = 1024
EPOCHS, FEWEST_STEPS, MOST_STEPS = 10, 1000, 12500
MOMENTUM = 0.9


@dataclass(frozen=True)
class LinearScore:
    """Accuracy (0..1) of one classifier and its setting."""

    accuracy: float
    rate: float
    blocks: int
    mean_patch: bool


def probe_input(backbone: Backbone, subnet: Subnet) -> Function:
    """`[B, blocks + 1, width]` float16: class tokens of the last blocks, mean patch token of the last."""

    def function(images: Tensor) -> Tensor:
        outputs = backbone.last_blocks(images, subnet, max(BLOCKS))
        return torch.stack([*(f.cls for f in outputs), outputs[-1].patches.mean(1)], dim=1).half()

    return function


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    device: torch.device,
    *,
    seed: int = 0,
    steps: int | None = None,
) -> list[LinearScore]:
    """Train and score all classifiers.

    Args:
        train: `[N, blocks + 1, width]`, class tokens of the last blocks, then the mean patch token.
        train_labels: int64 `[N]`.
        queries, query_labels: the same of `M` images.
        device: to compute on; features go there in batches.
        seed: of batches and initial weights.
        steps: of SGD; default 10 epochs of batches of 1024, but 1,000 to 12,500.

    Returns:
        The scores, best first. Subnets with fewer than 4 blocks use all they have.

    Raises:
        InputError: no features, or different numbers of features and labels.
    """
    for rows, labels, what in ((train, train_labels, "train"), (queries, query_labels, "query")):
        if not len(rows) or len(rows) != len(labels):
            raise InputError(
                f"linear: expected a label per {what} feature, got {len(labels)} for {len(rows)}"
            )
    classes = int(torch.maximum(train_labels.max(), query_labels.max())) + 1
    steps = steps or min(max(EPOCHS * len(train) // BATCH, FEWEST_STEPS), MOST_STEPS)
    train, queries, width = train.flatten(1), queries.flatten(1), train.shape[2]
    probes = [_Probe(part, classes, device, seed) for part in _inputs(train.shape[1] // width - 1, width)]
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        index = torch.randint(len(train), (min(BATCH, len(train)),), generator=draw)
        x, y = train[index].to(device).float(), train_labels[index].to(device)
        for probe in probes:
            probe.step(x, y, 0.5 * (1 + math.cos(math.pi * step / steps)))
    correct = [torch.zeros(len(RATES), device=device) for _ in probes]
    for start in range(0, len(queries), BATCH):
        x = queries[start : start + BATCH].to(device).float()
        y = query_labels[start : start + BATCH].to(device)
        for hits, probe in zip(correct, probes, strict=True):
            hits += (probe.logits(x).argmax(-1) == y[:, None]).sum(0)
    scores = [
        LinearScore(count / len(queries), rate, probe.part.blocks, probe.part.mean_patch)
        for probe, hits in zip(probes, correct, strict=True)
        for rate, count in zip(RATES, hits.tolist(), strict=True)
    ]
    return sorted(scores, key=lambda s: -s.accuracy)


@dataclass(frozen=True)
class _Input:
    """The columns of the features that a classifier sees."""

    blocks: int
    mean_patch: bool
    columns: slice


def _inputs(stored: int, width: int) -> list[_Input]:
    parts = []
    for blocks in sorted({min(count, stored) for count in BLOCKS}):
        for mean_patch in (False, True):
            columns = slice((stored - blocks) * width, (stored + mean_patch) * width)
            parts.append(_Input(blocks, mean_patch, columns))
    return parts


class _Probe:
    """Softmax classifiers on one input, one for each learning rate; the gradient is written out."""

    def __init__(self, part: _Input, classes: int, device: torch.device, seed: int):
        self.part = part
        size = part.columns.stop - part.columns.start
        draw = torch.Generator().manual_seed(seed)
        shape = (len(RATES) * classes, size)
        self.weight = torch.normal(0.0, 0.01, shape, generator=draw).to(device)
        self.bias = torch.zeros(len(RATES) * classes, device=device)
        self.moved = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        scaled = torch.tensor(RATES, device=device) * BATCH / 256
        self.rates = scaled.repeat_interleave(classes)

    def logits(self, x: Tensor) -> Tensor:
        """`[B, rates, classes]`."""
        return F.linear(x[:, self.part.columns], self.weight, self.bias).unflatten(1, (len(RATES), -1))

    def step(self, x: Tensor, y: Tensor, share: float) -> None:
        """One step of SGD at a share of the learning rates."""
        error = self.logits(x).softmax(-1)
        error.scatter_add_(2, y.view(-1, 1, 1).expand(-1, len(RATES), 1), -torch.ones_like(error[..., :1]))
        error = error.flatten(1) / len(x)
        gradients = error.t() @ x[:, self.part.columns], error.sum(0)
        for parameter, moved, gradient in zip((self.weight, self.bias), self.moved, gradients, strict=True):
            moved.mul_(MOMENTUM).add_(gradient)
            rates = share * self.rates
            parameter -= moved * (rates[:, None] if moved.dim() == 2 else rates)


LINEAR = Protocol(
    "linear",
    "also train linear classifiers",
    probe_input,
    lambda train, queries, device, seed: [
        vars(s) for s in linear_accuracy(*train, *queries, device, seed=seed)
    ],
    lambda scores: {"linear": scores[0]["accuracy"]},
    "linear",
    {
        "protocol": "linear probe of frozen features, the best setting on the queries",
        "rates": list(RATES),
        "rate_scale": BATCH / 256,
        "blocks": list(BLOCKS),
        "batch": BATCH,
        "momentum": MOMENTUM,
    },
)
