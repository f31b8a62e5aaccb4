"""The images nearest to prototypes: what the heads of a run tell apart without labels."""

from __future__ import annotations

import torch
from torch import Tensor

from poa.checkpoint import RunFolder
from poa.embedding.embed import embed
from poa.embedding.nearest import Nearest, figure_row, html_page
from poa.errors import InputError
from poa.export import ExportedModel
from poa.export.folder import load
from poa.heads import ProjectionHeads
from poa.network import Network


class PrototypeImages(Nearest):
    """For each prototype of the last head the images with the largest logits, as they pass by.

    The heads are those of a run, on the CPU; `used`, int64 `[prototypes]`, tells of how many images each has
    the largest logit.
    """

    def __init__(self, heads: ProjectionHeads):
        self.heads, self.count = heads, 8
        self.used = torch.zeros(heads.config.prototypes[-1], dtype=torch.int64)
        self.neighbours = []

    def begin(self, model: ExportedModel) -> None:
        self.neighbours = [[] for _ in self.used]

    def similarities(self, cls: Tensor) -> Tensor:
        logits = self.heads(cls)[-1].float()
        self.used += torch.bincount(logits.argmax(1), minlength=len(self.used))
        return logits.T

    def rows(self, most: int) -> list[str]:
        """HTML: a row for each of so many prototypes, those of most images first."""
        order = self.used.argsort(descending=True, stable=True)[:most].tolist()
        titles = [f"prototype {i}: nearest of {self.used[i]:,} images" for i in order]
        rows = zip(titles, (figure_row(self.neighbours[i]) for i in order), strict=True)
        return [f"<h4>{title}</h4>{row}" for title, row in rows]


def prototypes_page(folder: RunFolder, most: int, step: int | None = None) -> str:
    """HTML of the images of a run nearest to its prototypes, `most` of them, as the intact teacher sees them.

    Raises InputError: a fine-tuned run, which has no prototypes; or as `embed`.
    """
    network, _ = folder.network("teacher", step)
    if not isinstance(network, Network):
        raise InputError("--prototypes: expected a run of pre-training, got a fine-tuned one")
    nearest = PrototypeImages(network.head)
    embed(load(folder.path, step=step), folder.config().data.source, nearest=nearest)
    return html_page(nearest.rows(most))
