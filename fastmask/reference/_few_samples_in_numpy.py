"""The samples of ``fastmask/reference/sample_tokens.py``, bit for bit, of few rows on a CPU that all have a law.

There each of that file's two hundred operations takes longer to be called than to run. Here one tile races, which all
options but the most frequent are left out of. What rounds is left to the functions of the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask import _streams as streams
from fastmask._devices import is_readable
from fastmask.records import Draws, Sampled, SampledRows, Sampling
from fastmask.reference import _philox_in_numpy
from fastmask.reference.laws import heated, over, sub_tiles_of, sum_of
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
    """Of logits z as ``_logits_of`` gives them, which are overwritten; None where a row is none, or has no law."""
    logits, row_indices = z.numpy(), rows.row_indices.numpy()
    num_rows, num_columns = logits.shape
    if sampling.mask_id is not None:
        logits[:, sampling.mask_id] = -np.inf
    starts = np.arange(0, num_rows * num_columns, num_columns)
    largest_places = starts + logits.argmax(axis=1)
    largest = logits.take(largest_places)
    is_row = row_indices >= 0
    if rows.num_places is not None:
        is_row &= row_indices < rows.num_places
    if np.count_nonzero(is_row & np.isfinite(largest)) < num_rows:
        return None
    figures_at = sampling.temperature_of_figures
    _filter_(z, torch.from_numpy(largest[:, None]), sampling, figures_at)

    law, heat = z.softmax(dim=-1), sampling.temperature / figures_at
    likelihoods = law if heat == 1.0 else heated(z, heat)
    race = _Race(draws, row_indices[:, None], rows.seq_len)
    if num_columns <= streams.SUB_TILE:
        ids = race.winners(likelihoods, streams.ELEMENT_RACE)
    else:
        sub_tiles = race.winners(sub_tiles_of(likelihoods), streams.SUB_TILE_RACE)
        places = starts // streams.SUB_TILE + sub_tiles
        weights = heated(torch.from_numpy(logits.reshape(-1, streams.SUB_TILE).take(places, axis=0)), heat)
        first = sub_tiles * streams.SUB_TILE
        ids = first + race.winners(weights, streams.ELEMENT_RACE, first[:, None])

    likelihoods_at = law.numpy().reshape(-1)
    largest = torch.from_numpy(likelihoods_at[largest_places])
    likelihoods_at[largest_places] = 0.0  # as the reference, which sums the others without it
    log_totals = (sum_of(law).squeeze(-1) / largest).log1p_()
    return Sampled(torch.from_numpy(ids), torch.from_numpy(logits.take(starts + ids)) - log_totals)


def _filter_(z: Tensor, largest: Tensor, sampling: Sampling, temperature: float) -> None:
    """As the reference's, with the largest [M, 1] known and finite."""
    threshold = thresholds(z, sampling.top_k, sampling.min_p, sampling.top_p, temperature)
    goes = None if threshold is None else z < threshold
    z.sub_(largest)
    if goes is not None:
        z.masked_fill_(goes, -torch.inf)
    if temperature != 1.0:
        z.mul_(over(temperature))


class _Race:
    """As the reference's, of row_indices [M, 1] int64."""

    def __init__(self, draws: Draws, row_indices: Any, seq_len: int) -> None:
        self.draws = draws
        self.position = (row_indices % seq_len).view(np.uint64)
        self.sample = (row_indices // seq_len + draws.sample_offset).view(np.uint64)

    def winners(self, weights: Tensor, stream: int, first: Any = None) -> Any:
        """argmax_i weights_i / E_i of weights [M, G], [M] int64; the counters start at ``first`` [M, 1], None for 0."""
        element = np.arange(weights.shape[1])
        if first is not None:
            element = element + first
        last = np.array([stream << streams.STEP_BITS | self.draws.step], np.uint64)
        counter = element.view(np.uint64), self.position, self.sample, last
        return (weights.numpy() / _philox_in_numpy.exponentials(counter, self.draws.seed)).argmax(axis=1)
