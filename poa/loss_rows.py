"""Rows of a student's features: the targets they learn from, and what they weigh in the terms of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poa.masks import Masks

TERMS = ("dino", "ibot", "distill")


@dataclass(frozen=True)
class LossRows:
    """Of class tokens of local crops, then of global ones, then of masked patches.

    Attributes:
        classes: int64 `[class tokens, 2]`, targets, -1 for none: local crops learn from both views of their
            image, global ones from the other view, whose target stands in their own row.
        patches: int64 `[masked, 1]`, each learns from its own.
        weights: `[rows, terms]`: of a row's cross-entropy in each of `TERMS`.
    """

    classes: Tensor
    patches: Tensor
    weights: Tensor

    @classmethod
    def of(cls, views: int, local_views: int, masks: Masks) -> LossRows:
        """Those of a micro-batch whose masks are of `views` global crops an image.

        "dino" is the sum over all pairs of crops of two views, each the mean over images, divided by the
        number of pairs as the official code counts them: the global ones twice. "ibot" is the mean over an
        image's masked patches, then over all global crops, masked or not. "distill" is the mean over local
        crops and that over global ones, which count alike.
        """
        whole, masked = len(masks.mask), len(masks.indices)
        images, device = whole // views, masks.weights.device
        local = local_views * images
        own = torch.arange(whole, device=device)
        both = own.view(views, images).t()
        classes = torch.cat([both.repeat(local_views, 1), torch.stack([own, torch.full_like(own, -1)], 1)])
        weights = masks.weights.new_zeros(local + whole + masked, len(TERMS))
        dino, ibot, distill = weights.unbind(1)
        dino[: local + whole] = 1 / (images * (views + max(views * local_views, 1)))
        torch.div(masks.weights, whole, out=ibot[local + whole :])
        distill[:local] = 1 / max(local, 1)
        distill[local : local + whole] = 1 / whole
        return cls(classes, torch.arange(masked, device=device).unsqueeze(1), weights)
