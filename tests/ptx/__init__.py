"""A stand-in for an NVIDIA GPU: what Triton compiles for sm_90 is run on the CPU, from its PTX; see README.md."""

from ptx.cost import Cost, costs
from ptx.driver import activate
from ptx.execution import Machine, Program
from ptx.memory import Region

__all__ = ["Cost", "Machine", "Program", "Region", "activate", "costs"]
