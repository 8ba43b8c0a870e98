"""The doors, one an operation: signature, documentation, checks, dispatch; ``fastmask.functional`` exports them."""

from fastmask import _dispatch

_dispatch.preload()  # before anyone traces a door
