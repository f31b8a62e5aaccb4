"""Nearest neighbours of query images among images that pass by, and a page that shows them."""

from __future__ import annotations

import base64
import heapq
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from poa.data.decode import ImageError, decode, to_picture, to_pixels
from poa.data.preprocessing import Picture
from poa.data.sources import ImageSource
from poa.data.summary import printable
from poa.errors import InputError
from poa.export import ExportedModel
from poa.files import open_regular, require_writable, write_text
from poa.table import Table

SIDE = 128  # pixels of a picture on the page
STYLE = (
    "body{font:13px sans-serif;margin:2em}figure{display:inline-block;width:136px;margin:4px;"
    "vertical-align:top}figcaption{overflow-wrap:anywhere}.query{border-right:2px solid grey}"
    f"img{{width:{SIDE}px}}.wide,.wide img{{width:{2 * SIDE}px}}"
)


class Neighbour(NamedTuple):
    """An image and its similarity to a query."""

    similarity: float
    source: ImageSource
    position: int

    @property
    def name(self) -> str:
        return self.source.name(self.position)


class Nearest:
    """The images most similar to each query, by the cosine of class tokens; shows itself in a notebook.

    Args:
        queries: files or pictures.
        count: neighbours of each.

    Example:
        >>> import poa
        >>> nearest = poa.Nearest(["photo.jpg"], count=3)
        >>> embeddings = poa.embed(poa.load("runs/first"), "digits", nearest=nearest, workers=0)
        >>> [neighbour.name for neighbour in nearest.neighbours[0]]  # doctest: +ELLIPSIS
        ['image ...', 'image ...', 'image ...']
    """

    def __init__(self, queries: Sequence[Picture], count: int = 10):
        if not queries:
            raise InputError("--query: expected images, got none")
        self.queries, self.count = list(queries), count
        self.neighbours: list[list[Neighbour]] = [[] for _ in queries]
        self._features, self._channels = torch.zeros(0), 3

    def begin(self, model: ExportedModel) -> None:
        """Compute the features of the queries by a model.

        Raises:
            InputError: one cannot be read.
        """
        device = next(model.parameters()).device
        try:
            crops = [model.preprocess(query) for query in self.queries]
        except ImageError as error:
            raise InputError(f"--query: expected an image, got {error}") from None
        self._features = F.normalize(torch.cat([model(crop.to(device)).cpu() for crop in crops]), dim=1)
        self.neighbours = [[] for _ in self.queries]
        self._channels = model.preprocess.channels

    def add(self, source: ImageSource, positions: Sequence[int], cls: Tensor) -> None:
        """Look at more images: positions in a source, and their class tokens, `[images, C]` on the CPU."""
        similarities, order = self.similarities(cls).topk(min(self.count, len(cls)))
        for neighbours, values, columns in zip(
            self.neighbours, similarities.tolist(), order.tolist(), strict=True
        ):
            new = [Neighbour(value, source, positions[i]) for value, i in zip(values, columns, strict=True)]
            neighbours[:] = heapq.nlargest(self.count, [*neighbours, *new], key=lambda n: n.similarity)

    def similarities(self, cls: Tensor) -> Tensor:
        """Of the queries and class tokens `[images, C]`: `[queries, images]`."""
        return self._features @ F.normalize(cls, dim=1).T

    def page(self) -> str:
        """HTML: a row for each query, nearest first."""
        shown = (picture_of(query, self._channels) for query in self.queries)
        rows = (
            figure_of(pixels, name, "query") + figure_row(neighbours)
            for pixels, name, neighbours in zip(shown, self._names(), self.neighbours, strict=True)
        )
        return html_page(rows)

    def write(self, path: Path) -> None:
        """Write the page."""
        write_text(path, self.page())

    def __repr__(self) -> str:
        rows = [
            {"query": name, "similarity": n.similarity, "label": n.source.label(n.position), "image": n.name}
            for name, neighbours in zip(self._names(), self.neighbours, strict=True)
            for n in neighbours
        ]
        return repr(Table(rows, {"similarity": ".3f"}))

    def _repr_html_(self) -> str:
        return self.page()

    def _names(self) -> list[str]:
        pictures = (isinstance(query, Image.Image) for query in self.queries)
        return [f"query {i}" if p else str(self.queries[i]) for i, p in enumerate(pictures)]


def html_page(rows: Iterable[str]) -> str:
    """HTML of rows of pictures."""
    body = "".join(f"<div>{row}</div>" for row in rows)
    return f"<!DOCTYPE html><html lang=en><meta charset=utf-8><style>{STYLE}</style>{body}</html>\n"


def require_page(path: Path, option: str, *also: str) -> None:
    """Raise InputError where no page, or file with `also` an ending, can be written."""
    if path.suffix not in (".html", *also):
        raise InputError(f"{option}: expected a name ending in {' or '.join(('.html', *also))}, got {path}")
    require_writable(path, option)


def picture_of(query: Picture, channels: int) -> np.ndarray:
    """A picture or file as pixels that fit a square of `SIDE`."""
    if isinstance(query, Image.Image):
        return to_pixels(query, SIDE, channels=channels)
    with open_regular(query) as file:
        return decode(file, SIDE, channels=channels)


def figure_row(neighbours: Sequence[Neighbour]) -> str:
    return "".join(map(_neighbour, neighbours))


def _neighbour(neighbour: Neighbour) -> str:
    label = neighbour.source.label(neighbour.position)
    about = [f"{neighbour.similarity:.3f}", *([label] if label else []), neighbour.name]
    return figure_of(neighbour.source.read(neighbour.position, SIDE), "\n".join(about))


def figure_of(pixels: np.ndarray, about: str, kind: str = "") -> str:
    """HTML of a picture, uint8 `[H, W, C]`, and what is said of it, line by line."""
    picture = io.BytesIO()
    to_picture(pixels).save(picture, "PNG")
    data = base64.b64encode(picture.getvalue()).decode()
    lines = "<br>".join(html.escape(printable(line)) for line in about.split("\n"))
    return (
        f"<figure class='{kind}'><img src='data:image/png;base64,{data}'>"
        f"<figcaption>{lines}</figcaption></figure>"
    )
