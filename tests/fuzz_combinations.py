"""Random combinations of the parts of a ``demask_step``: kernels give what their twins give, id for id, and neither
depends on the batch, on the rows' order or on the block.

What differs must be shown to be a tie to rounding, and is counted. A case is its number and whether it filters. Long
runs, by hand: ``python tests/fuzz_combinations.py --calls 2000``, and ``--calls 200 --filtered``; one again:
``--first 17 --calls 1``.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import float64_oracles as oracle
import numpy as np
import torch
from conftest import Backend
from fuzz_cases import FLOATS, Case, exactly
from fuzz_remask import counts_of, keys_with_ties
from fuzz_sample_tokens import sampled_logits
from oracles import filtered
from sampling import Door, assert_same_selection, race
from torch import Tensor

from fastmask import functional
from fastmask.functional import LinearLogits

FILTERS = "top_k", "min_p", "top_p"
COUNTERS = "seed", "step", "sample_offset"
OF_ALL = "forbidden", "row_indices"  # tensors that are no sequence's own


class Call(NamedTuple):
    """Arguments of ``demask_step``. exact: the logits of each flat position that is decoded, in float64."""

    logits: Tensor | LinearLogits
    ids: Tensor
    is_masked: Tensor
    options: dict[str, Any]
    exact: dict[int, np.ndarray]

    def changed(self, **options: Any) -> Call:
        """The same with other options; without those that are None."""
        options = {name: value for name, value in (self.options | options).items() if value is not None}
        return self._replace(options=options)

    def rows(self, rows: Any) -> Tensor | LinearLogits:
        """Some rows of the logits, or sequences, by index."""
        if isinstance(self.logits, LinearLogits):
            return self.logits._replace(embeddings=self.logits.embeddings[rows])
        return self.logits[rows]

    def is_open(self) -> Tensor:
        """[B, N] bool, what is decoded."""
        return self.is_masked & is_inside(self.options.get("block"), self.is_masked)

    def numbers(self, b: int) -> dict[str, float]:
        """Temperature and filters of one sequence."""
        given = {name: self.options[name] for name in ("temperature", *FILTERS) if name in self.options}
        return {"temperature": 1.0} | {k: x[b].item() if isinstance(x, Tensor) else x for k, x in given.items()}

    def has_same_bits(self, door: Door) -> bool:
        """Whether the door promises the same bits wherever rows lie. Products behind a head are exact here."""
        if isinstance(self.logits, LinearLogits):
            return self.logits.softcap is None  # whose tanh rounds by the place in a vector
        x = self.logits
        begins_at_16_bytes = x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0
        return not door.backend.is_kernel or (x.is_contiguous() and begins_at_16_bytes)


def is_inside(window: Tensor | None, values: Tensor) -> Tensor:
    position = torch.arange(values.shape[1]).expand(values.shape)
    return position >= 0 if window is None else (position >= window[:, :1]) & (position < window[:, 1:])


# Random calls


def sampling_options(case: Case, batch: int, vocabulary: int, mask_id: int, is_filtered: bool) -> dict[str, Any]:
    values: dict[str, tuple] = {
        "temperature": (0.0, 0.5, 1.0, 1.0, 2.5, 1e-3),
        "top_k": (1, 2, case.choices.randint(1, vocabulary), vocabulary),
        "min_p": (0.0, 0.05, 0.3, 1.0),
        "top_p": (0.0, 0.5, case.choices.random(), 1.0),
    }
    names = ["temperature"] * case.chance(0.7)
    names += case.choices.sample(FILTERS, case.pick(1, 1, 2, 3)) if is_filtered else []
    options: dict[str, Any] = {"processed": case.chance(0.3)}
    for name in names:
        options[name] = case.pick(*values[name])
        if case.chance(0.5):  # each sequence its own
            integers, floats = (torch.int32, torch.int64), (torch.float32, torch.float64, torch.bfloat16)
            own = torch.tensor([case.pick(*values[name]) for _ in range(batch)])
            options[name] = own.to(case.pick(*(integers if name == "top_k" else floats)))
    if case.chance(0.3):
        forbidden = case.flags(0.3, vocabulary)
        forbidden[(mask_id + 2) % vocabulary], forbidden[(mask_id + 1) % vocabulary] = True, False
        options["forbidden"] = case.pick(torch.from_numpy(forbidden), np.flatnonzero(forbidden).tolist())
    return options


def judging_options(case: Case, batch: int, length: int) -> dict[str, Any]:
    """Score, rule, and how many."""
    rules: dict[str, dict[str, float]] = {
        "confidence": {"threshold": case.pick(0.0, 1.0, 0.3, 0.9), "factor": case.pick(0.0, 0.5, 1.0, 2.5)},
        "margin": {"threshold": case.pick(0.0, 1.0, 0.2)},
        "entropy": {"threshold": case.pick(0.0, 0.4, 1.5), "entropy_bound": case.pick(0.0, 0.1, 1.5, 6.0)},
        "random": {},
        "tensor": {},
    }
    score = case.pick("confidence", "entropy", *rules)
    rule = case.pick(*rules[score], None)
    options: dict[str, Any] = {"score": score} | ({rule: rules[score][rule]} if rule else {})
    if score == "tensor":
        options["score"] = case.laid_out(keys_with_ties(case, batch, length), FLOATS[case.dtype()])
    if rule not in ("factor", "entropy_bound"):
        options["choice_temperature"] = case.pick(0.0, 0.0, 0.5, 4.5)
    how_many = case.pick("counts", "commits", *([None] if rule else []))
    return options | ({how_many: counts_of(case, batch, length)[0]} if how_many else {})


def windows(case: Case, batch: int, length: int) -> dict[str, Tensor]:
    found = {}
    for name, share in (("block", 0.5), ("next_block", 0.2)):
        ends = case.numbers.integers(-1, [length, length + 2], (batch, 2))
        if case.chance(0.8):  # else some that hold nothing
            ends[:, 1] += np.maximum(0, ends[:, 0])
        if case.chance(share):
            found[name] = torch.from_numpy(ends)
    return found


def some_logits(case: Case, *shape: int) -> tuple[Any, np.ndarray]:
    """Logits, with a softcap now and then, and their values."""
    logits, exact = sampled_logits(case, *shape)
    if isinstance(logits, LinearLogits) and case.chance(0.4):
        softcap = case.pick(1.0, 5.0)
        logits = logits._replace(softcap=softcap)
        exact = exactly((torch.from_numpy(exact).to(logits.weight.dtype) / softcap).tanh() * softcap)
    return logits, exact


def some_call(case: Case, is_filtered: bool, is_tiny: bool) -> Call:
    batch, length = case.pick(0, *[1, 1, 2, 2] * 4, 3, 5), case.pick(1, 1, 2, 2, 3, 5)
    vocabulary = case.pick(2, 3, 12, 64, 65, case.choices.randint(2, 50), case.choices.randint(2, 300))
    if is_tiny:
        batch, length, vocabulary = case.pick(1, 2), case.pick(1, 2, 3), min(vocabulary, 72)
    elif case.chance(0.05):
        batch, length, vocabulary = min(batch, 2), min(length, 2), case.pick(4095, 4096, 4097, 5000, 2051)
    elif case.chance(0.05):
        batch, length = min(batch, 2), case.choices.randint(7, 40)
    mask_id = case.pick(case.choices.randrange(vocabulary), vocabulary - 1, vocabulary + 3)
    masked = case.flags(case.pick(0.1, 0.2) if length > 6 else case.pick(0.0, *[0.6, 0.8, 1.0] * 3), batch, length)
    ids = case.laid_out(np.where(masked, mask_id, case.ids(vocabulary, batch, length)), torch.int64)
    is_masked = case.laid_out(masked, torch.bool)
    options = {
        "mask_id": mask_id,
        "seed": case.choices.randrange(2**62),
        "step": case.pick(0, 3),
        "sample_offset": case.pick(0, 2),
        "max_masked": case.pick(None, None, case.choices.randint(0, length)),
        **sampling_options(case, batch, vocabulary, mask_id, is_filtered),
        **judging_options(case, batch, length),
        **windows(case, batch, length),
    }
    call = Call(torch.empty(0), ids, is_masked, options, {}).changed()
    if case.chance(0.5):
        logits, exact = some_logits(case, batch, length, vocabulary)
        return call._replace(logits=logits, exact=dict(enumerate(exact.reshape(-1, vocabulary))))
    none = [case.pick(-1, -1, batch * length, 2**40)] * case.pick(0, 1, 2)
    listed = case.numbers.permutation([*np.flatnonzero(call.is_open()), *none]).astype(np.int64)
    logits, exact = some_logits(case, len(listed), vocabulary)
    call = call._replace(logits=logits, exact=dict(zip(listed.tolist(), exact, strict=True)))
    return call.changed(row_indices=torch.from_numpy(listed))


# Steps


class Step(NamedTuple):
    """A step's results, and what it made them of.

    selection: ids, is_masked [B, N], and the list [B, max_masked]. proposed: ids [B, N], before some were masked
    again. figures: [B, N, 2], log_probs and what was scored. remask: the selection from other proposals and figures.
    noise_scale: what it adds of noise.
    """

    selection: list[Tensor]
    proposed: Tensor
    figures: Tensor
    remask: Callable[[Tensor, Tensor], list[Tensor]]
    noise_scale: float


def taken(door: Door, call: Call) -> Step:
    """The step, what it hands from one part to the other overheard."""
    module, told = importlib.import_module("fastmask.ops.demask_step"), {}
    remask_ = module.remask_checked_

    def overheard(ids, is_masked, listed, values, *others):
        *_, remasking, _ = others
        told.update(ids=ids.clone(), values=values.clone(), noise_scale=remasking.noise_scale)
        before = is_masked.clone()

        def again(proposed, figures):
            written = proposed.to(ids.device, copy=True), before.clone()
            rows = listed._replace(row_indices=torch.empty_like(listed.row_indices))
            remask_(*written, rows, figures[..., 1].contiguous().to(ids.device), *others)
            return [written[0].cpu(), written[1].cpu(), rows.row_indices.cpu().view(shape)]

        told["again"] = again
        remask_(ids, is_masked, listed, values, *others)

    shape = len(call.ids), call.options.get("max_masked", call.ids.shape[1])
    with patch.object(module, "remask_checked_", overheard):
        out = door.demask_step(call.logits, call.ids, call.is_masked, **call.options)
    figures = torch.stack([out.log_probs, told["values"].cpu().float()], -1)
    selection = [out.ids, out.is_masked, out.row_indices.view(shape)]
    return Step(selection, told["ids"].cpu(), figures, told["again"], told["noise_scale"])


def assert_lawful(call: Call, step: Step) -> None:
    """What is not decoded is as it was, what is masked has the mask's id, and the list is of what is masked."""
    is_open, (ids, is_masked, listed) = call.is_open(), step.selection
    assert not (is_masked & ~call.is_masked).any()
    assert torch.equal(is_masked[~is_open], call.is_masked[~is_open]), "masks outside"
    assert torch.equal(ids[~is_open], call.ids[~is_open]), "ids outside"
    assert (ids[is_masked & is_open] == call.options["mask_id"]).all()
    assert not step.figures[..., 0][~is_open].any()
    window = call.options.get("next_block", call.options.get("block"))
    batch, room = listed.shape
    rows = oracle.row_list(
        (is_masked & is_inside(window, ids)).numpy(), [b * room for b in range(batch + 1)], batch * room
    )
    assert listed.flatten().tolist() == rows, "the list of rows"


# Ties


class Law:
    """What float64 says of a row: its figures, and whether rounding decides what stays (is_edge) or who wins."""

    def __init__(self, call: Call, b: int, n: int) -> None:
        self.call, self.b, self.n, numbers = call, b, n, call.numbers(b)
        self.temperature, top_k, min_p, top_p = (numbers.get(name) for name in ("temperature", *FILTERS))
        self.at = self.temperature if call.options["processed"] and self.temperature > 0 else 1.0
        row = torch.from_numpy(call.exact[b * call.ids.shape[1] + n].copy())
        options = {"mask_id": call.options["mask_id"], "forbidden": call.options.get("forbidden")}
        options |= {"top_k": top_k, "temperature": self.at}
        self.is_edge = False
        if min_p:
            gaps = self.relative(filtered(row, **options)) - math.log(min_p)
            self.is_edge |= bool((np.abs(gaps) < 1e-6 * (1 - math.log(min_p))).any())
        if top_p is not None and top_p < 1.0:
            mass = np.sort(np.exp(self.relative(filtered(row, **options, min_p=min_p))))[::-1].cumsum()
            self.is_edge |= bool((np.abs(mass / mass[-1] - top_p) < 1e-6).any())
        self.z = self.relative(filtered(row, **options, min_p=min_p, top_p=top_p))
        if top_k == 1:
            self.z[np.arange(len(self.z)) != self.z.argmax()] = -np.inf
        self.is_greedy = self.temperature == 0 or top_k == 1

    def relative(self, z: np.ndarray) -> np.ndarray:
        return (z - z.max()) / self.at

    def assert_near(self, id: int, ours: list[float], theirs: list[float]) -> None:
        """log p and, where it is scored, margin or entropy are equal to rounding."""
        figures = oracle.row_figures(self.z, np.isfinite(self.z))
        bound, score = figures.log_probs_bound[id], self.call.options["score"]
        scored = {"margin": figures.margin_bound, "entropy": figures.entropy_bound}
        bounds = bound, scored.get(score, bound) if isinstance(score, str) else 0.0
        for a, b, most in zip(ours, theirs, bounds, strict=True):
            are_nan = math.isnan(a) and math.isnan(b)  # scores of the caller's
            assert are_nan or a == b or abs(a - b) <= 2 * most, ("figures", self.b, self.n, id, a, b, most)

    def is_level(self) -> bool:
        """Whether two run level in the row's race."""
        if self.is_greedy:
            return False
        seed, step, offset = (self.call.options[name] for name in COUNTERS)
        weights = np.exp(self.z * (self.at / self.temperature))
        return race(weights, seed, self.n, self.b + offset, step)[1] > 1 - 1e-5


def assert_same(call: Call, ours: Step, theirs: Step, has_same_bits: bool = False) -> int:
    """Two steps of a call are equal, but for ties to rounding: how many."""
    ties, is_open = 0, call.is_open()
    differs = (ours.figures != theirs.figures) & ~(ours.figures.isnan() & theirs.figures.isnan())
    differs = differs.any(-1) | (ours.proposed != theirs.proposed)
    assert not differs[~is_open].any(), "what is not decoded"
    assert not (has_same_bits and differs.any()), "not bit for bit"
    for b, n in differs.nonzero().tolist():
        law, ids = Law(call, b, n), [int(step.proposed[b, n]) for step in (ours, theirs)]
        if law.is_edge or (ids[0] != ids[1] and law.is_level()):
            ties += 1
            continue
        assert ids[0] == ids[1], ("another id", b, n, ids)
        law.assert_near(ids[0], ours.figures[b, n].tolist(), theirs.figures[b, n].tolist())
    if all(torch.equal(a, b) for a, b in zip(ours.selection, theirs.selection, strict=True)):
        return ties
    assert not has_same_bits, "another selection"
    # From the same figures the same is selected, or what noise has made level: else their rounding decided.
    again = ours.remask(theirs.proposed, theirs.figures)
    counters = {name: call.options[name] for name in COUNTERS}
    noise = functional.critic_remask_keys(torch.zeros(call.ids.shape), noise_scale=1.0, **counters)
    level = assert_same_selection(again, theirs.selection, theirs.figures[..., 1] + theirs.noise_scale * noise)
    assert level or differs.any(), "another selection from the same figures"
    return ties + 1


# What a step does not depend on


def by_sequence(case: Case, door: Door, call: Call, whole: Step) -> Step:
    """Of each sequence alone."""
    length, listed, steps = call.ids.shape[1], call.options.get("row_indices"), []
    for b in range(len(call.ids)):
        own = {
            name: x[b : b + 1] for name, x in call.options.items()
            if isinstance(x, Tensor) and name not in OF_ALL
        }  # fmt: skip
        own["sample_offset"] = call.options["sample_offset"] + b
        rows: Any = slice(b, b + 1)
        if listed is not None:
            rows = (listed // length == b).nonzero().flatten()
            own["row_indices"] = listed[rows] - b * length
        one = call._replace(logits=call.rows(rows), ids=call.ids[b : b + 1], is_masked=call.is_masked[b : b + 1])
        steps.append(taken(door, one.changed(**own)))
        rows = steps[-1].selection[2]
        rows[rows >= 0] += b * length
    if not steps:
        return whole
    selection = [torch.cat(parts) for parts in zip(*(step.selection for step in steps), strict=True)]
    proposed, figures = (torch.cat([step[i] for step in steps]) for i in (1, 2))
    return whole._replace(selection=selection, proposed=proposed, figures=figures)


def by_other_rows(case: Case, door: Door, call: Call, whole: Step) -> Step:
    """Of compact rows in another order, one that is none among them."""
    num_places, listed = call.ids.numel(), call.options.get("row_indices")
    if not num_places:
        return whole
    if listed is None:
        logits, listed = call.logits, torch.arange(num_places)
        is_head = isinstance(logits, LinearLogits)
        flat = logits._replace(embeddings=logits.embeddings.flatten(0, 1)) if is_head else logits.flatten(0, 1)
        call = call._replace(logits=flat)
    order, half = torch.from_numpy(case.numbers.permutation(len(listed))), len(listed) // 2
    order = torch.cat([order[:half], order[:1], order[half:]])
    rows = listed[order]
    is_row = (rows >= 0) & (rows < num_places) & call.is_open().flatten()[rows.clamp(0, num_places - 1)]
    is_row[half : half + 1] = False
    return taken(door, call._replace(logits=call.rows(order)).changed(row_indices=rows.where(is_row, -1)))


def in_two_calls(case: Case, door: Door, call: Call, whole: Step) -> Step:
    """Sampled in two calls of ``sample_tokens``, of some rows each."""
    listed, score = call.options.get("row_indices"), call.options["score"]
    rows = call.is_open().flatten().nonzero().flatten() if listed is None else listed
    names = "temperature", *FILTERS, "processed", "forbidden", "mask_id", *COUNTERS
    options = {name: call.options[name] for name in names if name in call.options}
    scored = {name: isinstance(score, str) and score == name for name in ("margin", "entropy")}
    room = [torch.zeros(call.ids.shape) if is_scored else None for is_scored in (True, *scored.values())]
    out = functional.Sampled(call.ids.clone(memory_format=torch.contiguous_format), *room)
    cut = case.choices.randint(0, len(rows))
    for part in (slice(cut), slice(cut, None)):
        given, own = (call.logits, {}) if listed is None else (call.rows(part), {"seq_len": call.ids.shape[1]})
        own |= {f"with_{name}": is_scored for name, is_scored in scored.items()}
        out = door.sample_tokens(given, row_indices=rows[part], out=out, **options, **own)
    values = {"confidence": out.log_probs, "margin": out.margins, "entropy": out.entropies}
    of_score = values.get(score) if isinstance(score, str) else None
    of_score = whole.figures[..., 1] if of_score is None else of_score
    return whole._replace(proposed=out.ids, figures=torch.stack([out.log_probs, of_score], -1))


def in_a_block(case: Case, door: Door, call: Call, whole: Step) -> Step:
    """Without a block, nothing masked outside of it; or in a block that holds everything."""
    block = call.options.get("block")
    if block is None:
        everything = torch.tensor([-1, call.ids.shape[1] + 2]).expand(len(call.ids), 2)
        return taken(door, call.changed(block=everything))
    alone = taken(door, call._replace(is_masked=call.is_open()).changed(block=None, next_block=None))
    ids, is_masked, listed = alone.selection
    is_masked = is_masked.where(is_inside(block, ids), call.is_masked)
    return alone._replace(selection=[ids, is_masked, whole.selection[2] if "next_block" in call.options else listed])


WAYS = by_sequence, by_other_rows, in_a_block, in_two_calls


def run_case(number: int, kernel: Backend, reference: Backend, is_filtered: bool, is_tiny: bool = False) -> Counter:
    """Runs a case: how many ties there were, and of what. The kernel, which takes long, goes one of the ways."""
    case, doors, ties = Case(number, "triton"), (Door(kernel), Door(reference)), Counter()
    try:
        call = some_call(case, is_filtered, is_tiny)
        steps = [taken(door, call) for door in doors]
        for step in steps:
            assert_lawful(call, step)
        ties["twin"] += assert_same(call, *steps)
        for door, whole in zip(doors, steps, strict=True):
            ways = WAYS if door is doors[1] else () if is_tiny else (WAYS[number % len(WAYS)],)
            for way in ways:
                ties[way.__name__] += assert_same(call, whole, way(case, door, call, whole), call.has_same_bits(door))
    except Exception as error:
        kind = "filtered" if is_filtered else "unfiltered"
        raise AssertionError(f"case {number} ({kind}): {type(error).__name__}: {error}") from error
    return ties


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--filtered", action="store_true")
    given = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    backends = [Backend(name, torch.device("cpu")) for name in ("interpreter", "reference")]
    ties, failed, began = Counter(), 0, time.monotonic()
    for number in range(given.first, given.first + given.calls):
        try:
            ties += run_case(number, *backends, given.filtered)
        except AssertionError as error:
            failed += 1
            print(str(error)[:1500], flush=True)
    took = f"{time.monotonic() - began:.0f} s, {time.process_time():.0f} of the CPU"
    print(f"{given.calls} calls, {took}, {failed} failed, ties: {dict(ties)}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
