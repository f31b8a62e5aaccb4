"""What a training step must cost: FLOPs and the fewest bytes of every kernel, and their time at the ceilings.

    python -m benchmarks roofline --preset vit-l16 --gpu h100

    floor    sum over kernels of max(executed / matmul ceiling, bytes / copy ceiling), one after the other
    overlap  max(sum executed / matmul ceiling, sum bytes / copy ceiling)
    MFU      FLOPs of the algorithm as specified / (time * datasheet peak)

`flops` count the algorithm as specified: 2 per multiply-add of every product, backward twice the forward, all
rows of the last block. `executed` adds recomputation and tile padding and leaves out what need not be done.
`bytes` are those of a design in which nothing is read or written twice without need: fused epilogues, logits
never stored, one pass of the optimiser. Kernels that are not that far show a small share of the floor.
"""

from benchmarks.roofline.costs import GPUS, H100, H200, Ceilings, Cost, Summary
from benchmarks.roofline.step import mean_step, parameters, report, step
from benchmarks.roofline.workload import Workload

__all__ = [
    "GPUS", "H100", "H200", "Ceilings", "Cost", "Summary", "Workload", "mean_step", "parameters", "report",
    "step",
]  # fmt: skip
