"""What a policy of drawing subnets costs: the time in which processes wait for the one with the most to do.

    waiting = 1 - mean over processes / largest, of a step; averaged over steps

by the FLOPs of the micro-batches, and measured by the time of the students' forward passes, which wait for
nobody: on a GPU by its own clock, on a CPU by processor time, so that the sharing of cores does not count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE, STDOUT

from tqdm import tqdm

from benchmarks.results import Row, place
from poa.checkpoint import RunFolder
from poa.flops import micro_batch_flops
from poa.presets import preset
from poa.subnets import POLICIES, SubnetSampler

ROOT = Path(__file__).parent.parent
WARM_UP = 5  # steps
STEPS_BY_FLOPS = 2000


def waiting_by_flops(name: str, policy: str, processes: int) -> float:
    """Of a preset, with one micro-batch a process."""
    method = preset(name).method
    sampler = SubnetSampler(method.backbone.space, policy, method.seed, processes, method.backbone.flops)
    cost = {subnet: micro_batch_flops(method, subnet, 0) for subnet in method.backbone.space}
    shares = []
    for step in range(STEPS_BY_FLOPS):
        costs = [cost[sampler.draw(step, micro_batch)] for micro_batch in range(processes)]
        shares.append(1 - sum(costs) / processes / max(costs))
    return sum(shares) / len(shares)


def run(name: str, data: str, processes: int, steps: int, device: str) -> list[Row]:
    """Train with each policy for so many steps and print what it costs.

    The processes share this machine, each with one micro-batch.
    """
    print(f"    {'policy':10} {'waiting by FLOPs':>17} {'measured':>9}")
    rows = []
    for policy in POLICIES:
        logged = _train(name, data, processes, steps, device, policy)
        waits = [1 - sum(t) / len(t) / max(t) for t in (row["rank_seconds"] for row in logged[WARM_UP:])]
        predicted = waiting_by_flops(name, policy, processes)
        measured = sum(waits) / len(waits)
        print(f"    {policy:10} {predicted:>17.1%} {measured:>9.1%}", flush=True)
        rows.append(
            {
                "op": "sampling",
                "provider": policy,
                "mode": f"{processes} processes",
                "shape": name,
                "dtype": preset(name).method.precision,
                "waiting": measured,
                "waiting_by_flops": predicted,
                **place("cuda" if logged[0]["mfu"] is not None else "cpu"),
            }
        )
    return rows


def _train(name: str, data: str, processes: int, steps: int, device: str, policy: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = {
            "method.sampling": policy,
            "method.optim.epoch_steps": 1,
            "method.optim.epochs": WARM_UP + steps,
            "method.optim.warmup_epochs": 1,
            "method.optim.ibot_start_epoch": 0,
            "performance.threads": max((os.cpu_count() or 1) // processes, 1),
            "run.log_every": 1,
            "run.evaluate_every": 0,
            "run.device": device,
        }
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "poa"]
        what = ["pretrain", "--preset", name, "--data", data, "--out", str(out)]
        command = [sys.executable, "-m", *launcher, *what, *(f"{key}={v}" for key, v in options.items())]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        env, said = os.environ | {"PYTHONPATH": path}, []
        bar = tqdm(total=WARM_UP + steps, desc=policy, unit="step", leave=False)
        with bar, subprocess.Popen(command, env=env, stdout=PIPE, stderr=STDOUT, text=True) as run:
            for line in run.stdout or ():
                said.append(line.strip())
                bar.update("  loss " in line)
        if run.returncode:
            why = next((line for line in said if "error: " in line), said[-1])
            raise ValueError(f"sampling: a run with {policy} failed: {why}")
        return [row for row in RunFolder(out).rows() if "loss" in row]
