"""What a run leaves in its folder: rows the moment they are measured, and how every case ended."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from benchmarks import results
from benchmarks.results import Row

ROWS, CASES = "rows.jsonl", "cases.jsonl"
Case = tuple[str, str]
"""Names of a part and of one of its cases."""


class Journal:
    """Rows and ends of cases, each a line of JSON that is on disk when the call returns.

    A line of `cases.jsonl` has `part`, `case` and `outcome`: `done` or `failed`; or about a `provider` of the
    case `refused`, and then whether it was `lost` with its process, or `settled`. To `retry` forgets cases
    that failed or lost a provider, so that they are measured again.

    Raises:
        ValueError: the folder holds a run and `resume` is not set.
    """

    def __init__(self, folder: Path, resume: bool = False, retry: bool = False):
        self.folder, self._lock = folder, threading.Lock()
        present = [name for name in (ROWS, CASES) if (folder / name).exists()]
        if present and not resume:
            raise ValueError(f"--out: expected a folder without {present[0]}, or --resume; got {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        for name in present:
            _drop_unfinished_line(folder / name)
        lines = (folder / CASES).read_text().splitlines() if CASES in present else []
        self.entries: list[Row] = [json.loads(line) for line in lines]
        if retry:
            failed = {_case(e) for e in self.entries if _is_failure(e)}
            self.entries = [e for e in self.entries if e["outcome"] == "settled" or _case(e) not in failed]
            (folder / CASES).write_text("".join(json.dumps(e) + "\n" for e in self.entries))

    def row(self, row: Row) -> None:
        with self._lock:
            results.append(self.folder / ROWS, [row])

    def end(self, case: Case, reason: str, seconds: float) -> None:
        """A case has ended, and failed if there is a reason."""
        outcome = "failed" if reason else "done"
        self._enter(case, outcome=outcome, reason=reason, seconds=round(seconds, 1))

    def refuse(self, case: Case, provider: str, reason: str, lost: bool) -> None:
        """A provider of a case has failed."""
        self._enter(case, outcome="refused", provider=provider, reason=reason, lost=lost)

    def settle(self, case: Case, provider: str) -> None:
        """A provider of a case need not be tried again."""
        self._enter(case, outcome="settled", provider=provider)

    def rows(self) -> list[Row]:
        return results.load([self.folder / ROWS]) if (self.folder / ROWS).exists() else []

    def finished(self) -> set[Case]:
        """Cases that are not measured again."""
        return {_case(e) for e in self.entries if e["outcome"] in ("done", "failed")}

    def aside(self, case: Case) -> set[str]:
        """Providers of a case that are settled, or took their process with them."""
        mine = (e for e in self.entries if _case(e) == case)
        return {e["provider"] for e in mine if e["outcome"] == "settled" or e.get("lost")}

    def failures(self) -> list[str]:
        """A line for each reason, with how many cases it holds for."""
        counts: dict[tuple[str, str, str], list[str]] = {}
        for e in self.entries:
            if e["outcome"] in ("failed", "refused"):
                who = e.get("provider") or e["case"]
                cases = counts.setdefault((e["part"], who, e["reason"]), [])
                cases += [e["case"]] if e["case"] not in cases else []
        return [
            f"{part}: {who}: {reason}" + (f" ({len(cases)} cases)" if len(cases) > 1 else "")
            for (part, who, reason), cases in counts.items()
        ]

    def has_failed(self) -> bool:
        """Whether a case or one of our own providers failed; absent peers do not count."""
        return any(_is_failure(e) for e in self.entries)

    def _enter(self, case: Case, **entry: object) -> None:
        line: Row = {"part": case[0], "case": case[1], **entry}
        with self._lock:
            self.entries.append(line)
            results.append(self.folder / CASES, [line])


def _case(entry: Row) -> Case:
    return entry["part"], entry["case"]


def _is_failure(entry: Row) -> bool:
    ours = entry["outcome"] == "refused" and entry["provider"] == "ours"
    return ours or entry["outcome"] == "failed" or entry.get("lost", False)


def _drop_unfinished_line(path: Path) -> None:
    """The writer may have been killed in the middle of it."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])
