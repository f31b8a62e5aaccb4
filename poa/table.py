"""Rows of figures that show themselves as a table: as text, and in notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Table(list[dict[str, Any]]):
    """Rows with the same columns; a list of dictionaries, as data frames take them.

    `formats` are of the values of some columns, such as `{"params": ",", "k=20": ".1%"}`.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], formats: Mapping[str, str] | None = None):
        super().__init__(dict(row) for row in rows)
        self.formats = formats or {}

    def cells(self) -> list[list[str]]:
        """The titles, then every row, as text."""
        titles = list(dict.fromkeys(title for row in self for title in row))
        return [titles, *([self._cell(row.get(title), title) for title in titles] for row in self)]

    def _cell(self, value: Any, title: str) -> str:
        return "" if value is None else format(value, self.formats.get(title, ""))

    def __repr__(self) -> str:
        cells = self.cells()
        wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(f"{c:>{w}}" for c, w in zip(row, wide, strict=True)) for row in cells)

    def _repr_html_(self) -> str:
        titles, *rows = self.cells()
        return html_table(titles, rows)


def html_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in HTML; `head` may be empty."""

    def line(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line('th', head) if head else ''}{''.join(line('td', row) for row in rows)}</table>"
