"""Whether the subnet that `select` chooses for a budget keeps it when it is timed again.

    python -m benchmarks.selection RUN [THREADS]

RUN is a trained run. Its subnets are evaluated where they were not, and measured. Then, for each of several
budgets, the chosen subnet is measured once more.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

import poa
from poa.errors import InputError

ALLOWED = 0.1


def main(path: str, threads: int) -> int:
    """Print a line for each budget; 1 where a latency is off by more than a tenth."""
    run, worst = poa.Run(path), 0.0
    try:
        run.select()
    except InputError:
        run.evaluate(device="cpu")
    table = run.latency(device="cpu", threads=threads)
    name = table.file.stem.removeprefix("latency-")  # type: ignore[union-attr]
    medians = sorted(latency.median for latency in table.latencies.values())
    for budget in np.quantile(medians, (0.25, 0.5, 0.75, 1.0)):
        chosen = run.select(max_ms={name: float(budget)}, cost=name)
        rows = {row["subnet"]: row for row in chosen.rows()}
        within = [row for row in rows.values() if row[f"{name} ms"] <= budget]
        assert rows[chosen.best]["20-NN"] == max(row["20-NN"] for row in within)
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "latency.json"
            again = run.latency(chosen.best, device="cpu", threads=threads, out=out)
        (latency,) = again.latencies.values()
        predicted = rows[chosen.best][f"{name} ms"]
        worst = max(worst, abs(latency.median / predicted - 1))
        print(
            f"at most {budget:.3f} ms: {chosen.best}, predicted {predicted:.3f} ms, timed again "
            f"{latency.median:.3f} ms ({latency.median / predicted - 1:+.1%}); none within is more accurate"
        )
    print(f"largest error {worst:.1%}, allowed {ALLOWED:.0%}", *table.notes(), *again.notes(), sep="\n")
    return int(worst > ALLOWED)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1))
