"""Choosing a subnet: what each costs on a device, what it is worth, and which are worth their cost."""

from poa.selection.agreement import Agreement, agreements
from poa.selection.choice import Candidate, Choice, Cost, choose
from poa.selection.latency import LatencyTable, Setting, measure
from poa.selection.runtimes import RUNTIMES

__all__ = [
    "RUNTIMES",
    "Agreement",
    "Candidate",
    "Choice",
    "Cost",
    "LatencyTable",
    "Setting",
    "agreements",
    "choose",
    "measure",
]
