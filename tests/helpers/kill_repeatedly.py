"""`PYTHONPATH=tests python -m helpers.kill_repeatedly FOLDER SEED`: a tiny run, killed ten times.

Every life of the run is a fork of this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import torch

import helpers.late_imports  # noqa: F401  (forks share them)
from helpers.tiny import tiny_config
from poa import files
from poa.checkpoint import RunFolder
from poa.train import Trainer, pretrain

OPTIONS = ["method.optim.epochs=18", "method.optim.warmup_epochs=1", "run.evaluate_every=15"]
MOMENTS = ("step", "step", "write", "rename", "metrics")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(moment: str, count: int) -> None:
    """Die the `count`-th time that the moment comes in this life."""
    left = [count]

    def comes() -> bool:
        left[0] -= 1
        return left[0] == 0

    if moment == "step":
        step = Trainer.step
        Trainer.step = lambda *a, **k: die() if comes() else step(*a, **k)  # type: ignore[method-assign]
    elif moment == "write":  # in the middle of the file of a checkpoint
        write = files.HashedFile.write

        def half(self: files.HashedFile, data: bytes) -> int:
            if len(data) > 1000 and comes():
                write(self, data[: len(data) // 2])
                self.file.flush()
                die()
            return write(self, data)

        files.HashedFile.write = half  # type: ignore[method-assign]
    elif moment == "rename":  # the new one is there, the old ones are not deleted yet
        delete = RunFolder._delete_old
        RunFolder._delete_old = lambda *a: die() if comes() else delete(*a)  # type: ignore[method-assign]
    else:  # in the middle of a line of the metrics
        log = RunFolder.log

        def torn(self: RunFolder, row: dict) -> None:
            if comes():
                with self.metrics.open("a") as file:
                    file.write('{"step": ' + str(row["step"]))
                die()
            log(self, row)

        RunFolder.log = torn  # type: ignore[method-assign,assignment]


def live(folder: Path, moment: str | None, count: int) -> int:
    """One life of the run; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        if moment:
            arrange_death(moment, count)
        pretrain(tiny_config(*OPTIONS), folder, resume=bool(RunFolder(folder).checkpoints()))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def main() -> None:
    torch.set_num_threads(1)
    folder, draw = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    kills = 0
    while kills < 10:
        moment = draw.choice(MOMENTS)
        count = draw.randint(1, 25 if moment == "write" else 2 if moment == "rename" else 6)
        status = live(folder, moment, count)
        if status == 0:  # it came to its end before the moment did
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        kills += 1
        print(f"killed: {moment} {count}", flush=True)
    assert live(folder, None, 0) == 0


if __name__ == "__main__":
    main()
