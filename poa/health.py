"""Is it learning? What tells a collapsed run from a healthy one, and the alarms that say so.

    target_entropy.H     entropy of the teacher's class-token targets of head H over ln(prototypes);
                         1: uniform
    target_spread.H      prototypes that an image's target spreads over, exp(entropy); 1: one-hot
    prototypes_used.H    distinct favourites among the targets over as many as there could be
    feature_std.STUDENT  standard deviation over images of the normalised class tokens,
                         times sqrt(channels); 0: all images alike

Figures are means over the micro-batches of a step. DINO (Caron et al., 2021) describes the two ways to
collapse, to a uniform output and to one dominant dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from poa.network import VIEWS, StudentOutput
from poa.tribranch import Targets

LOOKS, STEPS = 3, 40  # that must be bad before an alarm is raised


@torch.no_grad()
def observe(targets: Targets, students: Sequence[StudentOutput]) -> dict[str, Tensor]:
    """The figures above as float32 scalars on the device. Call it after the losses of the micro-batch."""
    seen = {}
    for head, target in enumerate(targets.cls):
        q = target.dense()
        entropy = torch.special.entr(q).sum(1).mean()
        favourites = torch.zeros(q.shape[1], device=q.device).index_fill_(0, q.argmax(1), 1.0)
        seen[f"target_entropy.{head}"] = (entropy / math.log(q.shape[1])).float()
        seen[f"target_spread.{head}"] = entropy.exp().float()
        seen[f"prototypes_used.{head}"] = favourites.sum() / min(q.shape)
    for name, student in zip(("intact", "elastic"), students, strict=True):
        tokens = F.normalize(student.tokens.float().chunk(VIEWS)[0], dim=1)  # of one view: an image once
        seen[f"feature_std.{name}"] = tokens.std(0, unbiased=False).mean() * math.sqrt(tokens.shape[1])
    return seen


@dataclass(frozen=True)
class Alarm:
    """What can go wrong: figures of a `prefix` outside of `low` to `high`; and what to change, `advice`."""

    name: str
    prefix: str
    low: float
    high: float
    advice: str

    def wrong(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The figures that are out of range."""
        return {
            name: value
            for name, value in figures.items()
            if name.startswith(self.prefix) and not self.low <= value <= self.high
        }


ALARMS = (
    Alarm(
        "uniform targets",
        "target_entropy.",
        -math.inf,
        0.995,
        "the teacher prefers no prototype, so there is nothing to learn: lower "
        "method.optim.teacher_temperature (0.04 to 0.07 is usual) and its start, lower method.optim.base_lr, "
        "or warm up longer",
    ),
    Alarm(
        "one-hot targets",
        "target_spread.",
        1.5,
        math.inf,
        "the teacher is certain of everything: raise method.optim.teacher_temperature_start and "
        "method.optim.teacher_temperature, or use method.loss.targets=sinkhorn",
    ),
    Alarm(
        "collapsed features",
        "feature_std.",
        0.05,
        math.inf,
        "all images look alike to the student: lower method.optim.base_lr, use larger batches or more "
        "method.micro_batches, raise method.loss.koleo, or keep method.optim.momentum nearer to 1",
    ),
)


class Watch:
    """Raises an alarm when its figures were bad in `LOOKS` looks in a row over at least `STEPS` steps; once,
    until they are good again.

    Args:
        batch: images of a micro-batch; of a single one there is no deviation.
        heads: whether any loss goes through heads, so that targets matter.
        start: the first step it judges. Networks that begin near to the identity (LayerScale) see all images
            alike until the learning rate has warmed up.
    """

    def __init__(self, batch: int, start: int, heads: bool = True):
        self.start = start
        unknown = {"feature_std."} if batch == 1 else set()
        unused = set() if heads else {"target_entropy.", "target_spread."}
        self.alarms = [a for a in ALARMS if a.prefix not in unknown | unused]
        self.bad = {alarm.name: _Streak() for alarm in ALARMS}

    def look(self, step: int, figures: Mapping[str, float]) -> list[tuple[Alarm, str]]:
        """Judge the figures of a step; return new alarms with the bad figures of each as text."""
        raised = []
        for alarm in self.alarms if step >= self.start else ():
            if not any(name.startswith(alarm.prefix) for name in figures):
                continue  # not observed
            streak, wrong = self.bad[alarm.name], alarm.wrong(figures)
            if not wrong:
                self.bad[alarm.name] = _Streak()
                continue
            streak = _Streak(streak.looks + 1, step if streak.since is None else streak.since, streak.raised)
            if not streak.raised and streak.looks >= LOOKS and step - (streak.since or 0) >= STEPS:
                raised.append((alarm, ", ".join(f"{name} {value:.4f}" for name, value in wrong.items())))
                streak = replace(streak, raised=True)
            self.bad[alarm.name] = streak
        return raised

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {name: vars(streak) for name, streak in self.bad.items()}

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        self.bad |= {name: _Streak(**streak) for name, streak in state.items()}


@dataclass(frozen=True)
class _Streak:
    """Looks in a row at bad figures, the step of the first, and whether the alarm was raised."""

    looks: int = 0
    since: int | None = None
    raised: bool = False
