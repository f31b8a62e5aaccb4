"""Files of a run that were damaged: named, or read as they were; see helpers/damage.py for hundreds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from helpers import damage

KINDS = {
    "checkpoint": {"fell back"},
    "export, weights": {"refused"},
    "export, JSON": {"refused", "the same"},
    "config": {"refused", "the same", "as if edited"},
    "metrics": {"lines named", "cut between lines", "lines twice", "the same"},
    "evaluation": {"the same place", "kept, another beside it"},
    "cache": {"the same"},
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
