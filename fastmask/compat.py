"""What ``compat=True`` restores of x-transformers 2.31.10, formula by formula (DESIGN 3.3b).

For people who must reproduce old runs: the same loss for the same masks and ids, and the same arithmetic
of sampling. README's table says why each differs by default.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmask.functional import Sampled
from fastmask.schedules import Schedule


def loss_weights(schedule: Schedule, times: Tensor) -> Tensor:
    """schedule' / (1 - schedule) at times [B], taken on the mask ratio: negative."""
    return schedule.slope(times) / (1.0 - schedule(times))


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float,
    filter_thres: float | None,
    generator: torch.Generator | None,
) -> Sampled:
    """Gumbel-max over logits [M, V], noise and probabilities in the logits' dtype, mask_id not excluded."""
    if filter_thres is not None:
        k = math.ceil((1 - filter_thres) * logits.shape[-1])
        values, indices = logits.topk(k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, indices, values)
    if generator is not None and generator.device != logits.device:
        seed = torch.randint(2**62, (), device=generator.device, generator=generator)
        generator = torch.Generator(logits.device).manual_seed(int(seed))
    uniform = torch.zeros_like(logits).uniform_(0, 1, generator=generator)
    noise = -_log(-_log(uniform))
    ids = (logits / max(temperature, 1e-10) + noise).argmax(dim=-1)
    probs = logits.softmax(dim=-1).gather(-1, ids[:, None]).squeeze(-1)
    return Sampled(ids, probs.float().log())


def _log(x: Tensor) -> Tensor:
    # The uniform 0, one in 256 of bfloat16's, becomes noise of -3.1, not of -inf.
    return torch.log(x + 1e-10)
