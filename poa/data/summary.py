"""What is left out of a collection of images: counts by reason, with examples."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES = 3  # of each reason
HIDDEN = "hidden or of the system"
OTHER = "without an ending of images"


class LeftOut(dict[str, tuple[int, list[str]]]):
    """Number and first examples of what was left out, by reason."""

    def add(self, reason: str, example: str, count: int = 1) -> None:
        self.update_from({reason: (count, [example])})

    def update_from(self, other: Mapping[str, tuple[int, list[str]]]) -> None:
        """Add all that another one counted."""
        for reason, (count, examples) in other.items():
            before, known = self.get(reason, (0, []))
            self[reason] = before + count, [*known, *examples][:EXAMPLES]

    def __str__(self) -> str:
        return "; ".join(
            f"{count:,} {reason} ({', '.join(map(printable, examples))}{', ...' * (count > len(examples))})"
            for reason, (count, examples) in self.items()
        )


def printable(name: str) -> str:
    """A name in one line that any terminal takes."""
    return " ".join(name.encode("utf-8", "backslashreplace").decode().split())
