"""Top-1 and top-5 accuracy of the classifiers of a fine-tuned run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from poa.backbones import Backbone
from poa.classifier import Classifier
from poa.data.sources import DataSplit
from poa.data.summary import EXAMPLES, printable
from poa.errors import InputError
from poa.evaluate.protocol import Function, Labelled, Protocol
from poa.subnets import Subnet


def top_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of images `{"top1": 0..1, "top5": 0..1}` whose label, int64 `[N]`, is among the largest logits
    `[N, classes]`."""
    order = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {"top1": float(order[:, 0].double().mean()), "top5": float(order.any(1).double().mean())}


def _of_no_classifier(backbone: Backbone, subnet: Subnet) -> Function:
    raise InputError("top1: expected a fine-tuned run, got one of pre-training; poa finetune makes one")


def _score(train: Labelled, queries: Labelled, device: torch.device, seed: int) -> Any:
    return top_accuracy(*queries)


TOP1 = Protocol(
    "top1",
    None,
    _of_no_classifier,
    _score,
    lambda score: {"top-1": score["top1"], "top-5": score["top5"]},
    "top-1",
    {"protocol": "accuracy of the fine-tuned classifier of each subnet"},
    learns=False,
    baselines=(),
)


def require_classes(model: Sequence[str], data: DataSplit, name: str) -> None:
    """Raise InputError where the classes of the data are not those of a model, whose labels are numbers."""
    if list(model) != list(data.train.classes):
        ours, theirs = (", ".join(map(printable, names[:EXAMPLES])) for names in (model, data.train.classes))
        raise InputError(
            f"{name}: expected the {len(model)} classes of the model ({ours}, ...), got "
            f"{len(data.train.classes)} others ({theirs}, ...)"
        )


def top1_of(network: Classifier) -> Protocol:
    """The protocol for a fine-tuned network."""
    return replace(TOP1, features=lambda _, subnet: lambda images: network.logits(images, subnet))
