"""Random calls of every operation, each held to ``float64_oracles.py``.

A case is its number: ``python tests/fuzz_operations.py --first 17 --calls 1`` runs one again. A long run over two
processes, by hand: ``python tests/fuzz_operations.py --calls 1000000 --processes 2``.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import time
from collections.abc import Callable

import torch
from fuzz_cases import Case
from fuzz_demask_step import demask_step
from fuzz_losses import linear_masked_cross_entropy, masked_cross_entropy
from fuzz_mask_sampling import mask_sampling
from fuzz_remask import remask_, remask_keys, select_to_remask
from fuzz_sample_tokens import sample_tokens

OPERATIONS: dict[str, Callable[[Case], None]] = {
    function.__name__: function
    for function in (
        masked_cross_entropy, linear_masked_cross_entropy, sample_tokens, remask_keys, select_to_remask, remask_,
        demask_step, mask_sampling,
    )
}  # fmt: skip
SHARES = {"remask_keys": 1, "select_to_remask": 2, "remask_": 3}


def run_case(number: int, backend: str = "reference", only: str | None = None) -> str:
    """Runs one case, and says which operation it was of."""
    case = Case(number, backend)
    names, shares = list(OPERATIONS), [SHARES.get(name, 4) for name in OPERATIONS]
    name = case.choices.choices(names, shares)[0] if only is None else only
    try:
        OPERATIONS[name](case)
    except Exception as error:
        raise AssertionError(f"case {number} ({name}, {backend}): {type(error).__name__}: {error}") from error
    return name


# A long run by hand


def _failures(
    first: int, calls: int, stride: int, backend: str, only: str | None
) -> tuple[collections.Counter, list]:
    torch.set_num_threads(1)
    counted: collections.Counter = collections.Counter()
    failed: list[str] = []
    began = time.monotonic()
    for done, number in enumerate(range(first, first + calls, stride)):
        try:
            counted[run_case(number, backend, only)] += 1
        except AssertionError as error:
            failed.append(str(error))
            print(str(error)[:1500], flush=True)
        if done and done % 20_000 == 0:
            print(f"{done} calls in {time.monotonic() - began:.0f} s, {len(failed)} failed", flush=True)
    return counted, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=int(os.environ.get("FASTMASK_FUZZ_CALLS", 1000)))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--backend", default="reference", choices=["reference", "triton"])
    parser.add_argument("--only", choices=list(OPERATIONS))
    given = parser.parse_args()
    began = time.monotonic()
    shares = [
        (given.first + i, given.calls - i, given.processes, given.backend, given.only) for i in range(given.processes)
    ]
    if given.processes == 1:
        results = [_failures(*shares[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
            results = pool.starmap(_failures, shares)
    counted, failed = sum((c for c, _ in results), collections.Counter()), [f for _, fs in results for f in fs]
    print(
        f"{given.calls} calls on {given.backend}, {time.monotonic() - began:.0f} s, "
        f"{len(failed)} failed: {dict(counted)}"
    )
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
