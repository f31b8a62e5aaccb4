"""Files of a run that were damaged: named, or read as they were; see helpers/damage.py for hundreds.

And operations on them that fail: see helpers/failing_files.py.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from helpers import damage
from helpers.failing_files import Example

KINDS = {
    "checkpoint": {"fell back"},
    "export, weights": {"refused"},
    "export, JSON": {"refused", "the same"},
    "config": {"refused", "the same", "as if edited"},
    "metrics": {"lines named", "cut between lines", "lines twice", "the same"},
    "evaluation": {"the same place", "kept, another beside it"},
    "latency": {"refused", "the same", "as if edited"},
    "cache": {"the same"},
    "shard": {"refused", "fewer, said", "unreadable, named", "as if edited", "the same"},
    "Parquet": {"refused", "unreadable, named", "as if edited", "the same"},
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[damage.Readers]:
    with pytest.MonkeyPatch.context() as patch:
        yield damage.readers_of(tmp_path_factory.mktemp("damage"), patch.setenv)


@pytest.mark.parametrize("kind", KINDS)
def test_damages(kind: str, readers: damage.Readers) -> None:
    draw = random.Random(1)
    counts = Counter(damage.tried(kind, readers, draw) for _ in range(25))
    assert counts.keys() <= KINDS[kind] and counts.total() == 25


@pytest.mark.parametrize(
    ("command", "operation", "at", "result"),
    [
        ("check folder", "scandir", 2, "refused"),
        ("extract", "write", 1, "ended"),
        ("resume", "fsync", 3, "ended"),
    ],
)
def test_failing_files(command: str, operation: str, at: int, result: str, readers: damage.Readers) -> None:
    example = Example(readers.run.path.parent)
    assert example.tried(command, operation, at, errno.EIO) == result
