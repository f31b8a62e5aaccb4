"""Choosing a subnet: what each costs on a device, what it is worth, and which are worth their cost."""

from poa.selection.agreement import Agreement, agreements
from poa.selection.choice import Candidate, Choice, Cost, choose
from poa.selection.latency import LatencyTable, Setting, measure
from poa.selection.runtimes import RUNTIMES
from poa.selection.select import Budgets, Selection

__all__ = [
    "RUNTIMES",
    "Agreement",
    "Budgets",
    "Candidate",
    "Choice",
    "Cost",
    "LatencyTable",
    "Selection",
    "Setting",
    "agreements",
    "choose",
    "measure",
]
