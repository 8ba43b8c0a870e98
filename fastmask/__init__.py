"""fastmask: masked-token models, trained and sampled at the speed of memory."""

from fastmask import functional
from fastmask.schedules import Schedule
from fastmask.wrapper import Losses, NonAutoregressiveWrapper, Trajectory

__version__ = "0.1.0"

__all__ = ["Losses", "NonAutoregressiveWrapper", "Schedule", "Trajectory", "functional"]
