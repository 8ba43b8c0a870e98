"""The samples of ``fastmask/reference/sample_tokens.py``, bit for bit, of few rows on a CPU.

There each of that file's two hundred operations takes longer to be called than to run. Here are one tile and the most
frequent options, of rows with a law. PyTorch's functions are called only where numpy's would round otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask import _streams as streams
from fastmask._devices import is_readable
from fastmask.records import Draws, Sampled, SampledRows, Sampling
from fastmask.reference import _philox_in_numpy
from fastmask.reference.laws import over, sub_tiles_of, sum_of
from fastmask.reference.vocabulary_filter import thresholds

try:
    import numpy as np
except ImportError:  # torch runs without it
    np = None  # type: ignore[assignment]

# Logits of so many ids in all lie in a core's cache.
_MOST = 2**16


def takes(logits: Tensor, rows: SampledRows, draws: Draws, sampling: Sampling) -> bool:
    """Whether samples so few, so plain and so readable may be drawn here."""
    num_rows, num_tokens = rows.row_indices.shape[0], logits.shape[-1]
    return (
        np is not None
        and num_tokens <= streams.TILE
        and 0 < num_rows * num_tokens <= _MOST
        and not (sampling.is_greedy or sampling.with_margin or sampling.with_entropy)
        and sampling.forbidden is None
        and is_readable(logits)
        and is_readable(rows.row_indices)
        and is_readable(draws.seed)
    )


def sample_tokens(z: Tensor, rows: SampledRows, draws: Draws, sampling: Sampling) -> Sampled | None:
    """Of logits z as ``_logits_of`` gives them, which are overwritten; None where a row has no law."""
    logits, row_indices = z.numpy(), rows.row_indices.numpy()
    if sampling.mask_id is not None:
        logits[:, sampling.mask_id] = -np.inf
    starts = np.arange(0, logits.size, logits.shape[1])
    largest_places = starts + logits.argmax(axis=1)
    largest = logits.take(largest_places)
    if not np.isfinite(largest).all():
        return None
    figures_at = sampling.temperature_of_figures
    _filter_(z, largest[:, None], sampling, figures_at)

    law, heat = z.softmax(-1), sampling.temperature / figures_at
    likelihoods = law if heat == 1.0 else _heated(logits, heat)
    race = _Race(draws, row_indices[:, None], rows.seq_len)
    if logits.shape[1] <= streams.SUB_TILE:
        ids = race.winners(likelihoods, streams.ELEMENT_RACE)
    else:
        sub_tiles = race.winners(sub_tiles_of(likelihoods), streams.SUB_TILE_RACE)
        places = starts // streams.SUB_TILE + sub_tiles
        weights = _heated(logits.reshape(-1, streams.SUB_TILE).take(places, axis=0), heat)
        first = sub_tiles * streams.SUB_TILE
        ids = first + race.winners(weights, streams.ELEMENT_RACE, first[:, None])

    likelihoods_at = law.numpy().reshape(-1)
    p_largest = likelihoods_at[largest_places]
    likelihoods_at[largest_places] = 0.0  # as the reference, which sums the others without it
    log_totals = torch.from_numpy(sum_of(law).numpy()[:, 0] / p_largest).log1p_().numpy()
    log_probs = logits.take(starts + ids) - log_totals
    num_places = 2**63 if rows.num_places is None else rows.num_places
    is_stray = row_indices.view(np.uint64) >= num_places  # what is below 0, too
    if is_stray.any():
        ids[is_stray], log_probs[is_stray] = -1, 0.0
    return Sampled(torch.from_numpy(ids), torch.from_numpy(log_probs))


def _filter_(z: Tensor, largest: Any, sampling: Sampling, temperature: float) -> None:
    """As the reference's, with the largest [M, 1] known and finite."""
    threshold = thresholds(z, sampling.top_k, sampling.min_p, sampling.top_p, temperature)
    logits = z.numpy()
    goes = None if threshold is None else logits < threshold.numpy()
    with np.errstate(over="ignore"):  # to -inf
        np.subtract(logits, largest, logits)
        if temperature != 1.0:
            np.multiply(logits, np.float32(over(temperature)), logits)
    if goes is not None:
        np.putmask(logits, goes, -np.inf)


def _heated(logits: Any, temperature: float) -> Tensor:
    """As the reference's."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(logits * np.float32(over(temperature))).softmax(-1)


class _Race:
    """As the reference's, of row_indices [M, 1] int64."""

    def __init__(self, draws: Draws, row_indices: Any, seq_len: int) -> None:
        self.draws = draws
        self.position = (row_indices % seq_len).view(np.uint64)
        self.sample = (row_indices // seq_len + draws.sample_offset & 0xFFFFFFFF).view(np.uint64)

    def winners(self, weights: Tensor, stream: int, first: Any = None) -> Any:
        """argmax_i weights_i / E_i of weights [M, G], [M] int64; counters start at ``first`` [M, 1], None for 0."""
        element = np.arange(weights.shape[1])
        if first is not None:
            element = element + first
        last = np.array([stream << streams.STEP_BITS | self.draws.step], np.uint64)
        waits = _philox_in_numpy.exponentials(
            element.view(np.uint64), self.position, self.sample, last, self.draws.seed
        )
        return (weights.numpy() / waits).argmax(axis=1)
