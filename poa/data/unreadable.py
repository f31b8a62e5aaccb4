"""Counting the images that cannot be read, over all processes and over the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from poa.distributed import World
from poa.errors import InputError
from poa.files import append_rows, read_rows

LEAST = 1000  # images, before a share means anything


@dataclass
class Unreadable:
    """Names every unreadable image once in a file of JSON lines, which the main process writes, and ends a
    run that meets more than a `share`."""

    file: Path
    world: World
    share: float
    count: int = 0
    new: list[str] = field(default_factory=list)
    known: set[str] | None = None

    def add(self, messages: Sequence[str]) -> None:
        self.new += messages

    def settle(self, step: int, images: int) -> int:
        """Count what all processes met since the last call, after `step` steps that asked for `images` images
        in all. Raises InputError: too many; in all processes."""
        messages = [message for rank in self.world.gather(self.new) for message in rank]
        self.new = []
        self.count += len(messages)
        if messages and self.world.is_main:
            self._write(step, messages)
        if messages and self.count > self.share * max(images, LEAST):
            raise InputError(
                f"data: expected at most {self.share:.2%} unreadable images (data.unreadable_share), got "
                f"{self.count} among {images}; they are named in {self.file}; the last: {messages[-1]}"
            )
        return self.count

    def _write(self, step: int, messages: Sequence[str]) -> None:
        if self.known is None:
            self.known = {row["image"] for row in read_rows(self.file, "image", str)}
        new = [message for message in dict.fromkeys(messages) if message not in self.known]
        self.known |= set(new)
        append_rows(self.file, [{"step": step, "image": message} for message in new])
