"""fastmask: masked-token models, trained and sampled at the speed of memory."""

from fastmask import data, functional
from fastmask.heads import Head
from fastmask.records import GenerationStep, Losses, Metrics, Trajectory
from fastmask.schedules import Schedule
from fastmask.wrapper import NonAutoregressiveWrapper

__version__ = "0.1.0"

__all__ = [
    "GenerationStep",
    "Head",
    "Losses",
    "Metrics",
    "NonAutoregressiveWrapper",
    "Schedule",
    "Trajectory",
    "data",
    "functional",
]
