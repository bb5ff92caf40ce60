"""What a training costs, known before: a step simulated without memory, a real one beside it, and what fits.

``lorakit.training.costs.plan`` puts them together for a model and its rows.
"""

from lorakit.training.costs.columns import NF4_BITS, Base, Column, four_bit
from lorakit.training.costs.extend import cost_of
from lorakit.training.costs.fit_memory import choose_micro_batch, num_cards, read_size
from lorakit.training.costs.micro_batch import fitting_micro_batch, surely_fits
from lorakit.training.costs.parts import PARTS, Memory, Peaks
from lorakit.training.costs.probe import Probe, probe
from lorakit.training.costs.simulate import Cost, Setup, simulate

__all__ = [
    "NF4_BITS",
    "PARTS",
    "Base",
    "Column",
    "Cost",
    "Memory",
    "Peaks",
    "Probe",
    "Setup",
    "choose_micro_batch",
    "cost_of",
    "fitting_micro_batch",
    "four_bit",
    "num_cards",
    "probe",
    "read_size",
    "simulate",
    "surely_fits",
]
