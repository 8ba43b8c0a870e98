"""The operations of fastmask as plain functions, for people with loops of their own.

Every function checks its arguments, then runs the Triton kernel or the pure-PyTorch reference:
``backend="auto"`` takes the kernel on a GPU that has one, and the environment variable
FASTMASK_BACKEND overrides "auto". Checks never read a tensor's values (that would wait for the GPU)
unless ``check=True``.

Randomness is Philox with a 64-bit seed: given as ``seed=`` (an int, or an int64 scalar tensor on the
device), else drawn from ``generator=`` or torch's generator of the device. The same seed gives the same
result, up to floating-point ties, for every split of a batch, when ``sample_offset`` says which samples the rows are.
"""

from fastmask.ops.demask_step import demask_step
from fastmask.ops.linear_masked_cross_entropy import linear_masked_cross_entropy
from fastmask.ops.mask_sampling import mask_sampling
from fastmask.ops.masked_cross_entropy import masked_cross_entropy
from fastmask.ops.remask import confidence_remask_keys, critic_remask_keys, remask_, select_to_remask
from fastmask.ops.sample_tokens import sample_tokens
from fastmask.ops.seeds import draw_seed
from fastmask.ops.select_at_random import select_at_random
from fastmask.records import CrossEntropy, Demasked, LinearLogits, MaskedTokens, Sampled

__all__ = [
    "CrossEntropy",
    "Demasked",
    "LinearLogits",
    "MaskedTokens",
    "Sampled",
    "confidence_remask_keys",
    "critic_remask_keys",
    "demask_step",
    "draw_seed",
    "linear_masked_cross_entropy",
    "mask_sampling",
    "masked_cross_entropy",
    "remask_",
    "sample_tokens",
    "select_at_random",
    "select_to_remask",
]
