"""Tokens that are almost never drawn: 50 000 ids of probability 1e-8 each at V 50257, hidden by the others' mass.

By hand: ``python tests/fuzz_tail.py --draws 20000000``. All rows being equal, what the reference finds of a row
before its race is found once, and every draw is a race of its own; ``--whole`` calls the public function for each,
in an hour or more of one core, and gives the same ids.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from fastmask import functional
from fastmask.records import Draws, SampledRows, Sampling
from fastmask.reference import sample_tokens as reference

VOCABULARY, TAIL, SHARE, BINS = 50257, 50_000, 1e-8, 50
ROWS = 1000  # of a call


def logits() -> tuple[torch.Tensor, np.ndarray]:
    """One row [V], float32, and where its tail lies: the other 257 ids are spread among them."""
    heads = np.linspace(0, VOCABULARY - 1, VOCABULARY - TAIL).astype(int)
    is_tail = np.ones(VOCABULARY, dtype=bool)
    is_tail[heads] = False
    law = np.where(is_tail, SHARE, (1 - TAIL * SHARE) / (VOCABULARY - TAIL))
    return torch.from_numpy(np.log(law)).float(), np.flatnonzero(is_tail)


def sampler(row: torch.Tensor, seed: int, whole: bool) -> Callable[[int], torch.Tensor]:
    """A call's number to the ids [ROWS] that it draws: by the public function, or by its races alone."""
    if whole:
        rows = row.expand(1, ROWS, len(row))
        return lambda call: functional.sample_tokens(rows, seed=seed, sample_offset=call, backend="reference").ids[0]
    places = SampledRows(torch.arange(ROWS), ROWS, True)
    z = reference._logits_of(places, row[None], slice(1))
    shares = reference._figures(z, reference._options(Sampling(), None, places)).shares
    assert shares is not None
    z, shares = z.expand(ROWS, -1), shares.expand(ROWS, -1)

    def ids(call: int) -> torch.Tensor:
        draws = Draws(torch.tensor(seed), sample_offset=call)
        return reference._race(z, shares, 1.0, reference.Race.of(places, draws)).squeeze(-1)

    return ids


def tail_ids(draws: int, seed: int, first: int = 0, whole: bool = False, record: Path | None = None) -> list[int]:
    """Which ids of the tail were drawn in so many draws, each at a position of its own."""
    row, tail = logits()
    sample = sampler(row, seed, whole)
    is_tail = torch.zeros(VOCABULARY, dtype=torch.bool)
    is_tail[torch.from_numpy(tail)] = True
    found: list[int] = []
    began = time.monotonic()
    for call in range(first, first + draws // ROWS):
        ids = sample(call)
        found += ids[is_tail[ids]].tolist()
        if record is not None and (call - first) % 200 == 0:
            record.write_text(json.dumps({"draws": (call + 1 - first) * ROWS, "found": found}))
            print(f"{(call + 1 - first) * ROWS} draws in {time.monotonic() - began:.0f} s: {len(found)}", flush=True)
    return found


def figures(found: list[int], draws: int) -> dict[str, float]:
    """The tail's total against its binomial law, and the bins' chi-square."""
    row, tail = logits()
    law = torch.softmax(row.double(), dim=-1).numpy()  # of the float32 logits
    share = float(law[tail].sum())
    places = np.searchsorted(tail, found)
    counts = np.bincount(places * BINS // TAIL, minlength=BINS)
    expected = np.array([law[part].sum() for part in np.array_split(tail, BINS)]) / share * len(found)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return {
        "draws": draws,
        "found": len(found),
        "expected": draws * share,
        "total_pvalue": float(stats.binomtest(len(found), draws, share).pvalue),
        "chi_square": statistic,
        "pvalue": float(stats.chi2.sf(statistic, BINS - 1)),
        "effect": math.sqrt(max(0.0, statistic - (BINS - 1)) / max(1, len(found))),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=20_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="index of the first call, to go on where a run ended")
    parser.add_argument("--whole", action="store_true", help="by the public function")
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(figures(tail_ids(given.draws, given.seed, given.first, given.whole, given.record), given.draws))
