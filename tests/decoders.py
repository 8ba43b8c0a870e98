"""Public decoders of masked-token models, each written from its formula, in float64, one sequence at a time.

A network is called with one sequence [N] and gives logits [N, V] as NumPy; ids hold MASK where they are open. Each
returns the ids, the pass in which each position was committed (-1 where it was given), and the number of passes that
committed something.
"""

from __future__ import annotations

import numpy as np
from generating import MASK
from scipy.special import log_softmax, softmax


class Canvas:
    """One sequence that is being filled in."""

    def __init__(self, net, ids, ends=()):
        self.net, self.ids, self.ends = net, np.array(ids), ends
        self.is_given = self.ids != MASK
        self.is_open = self.ids == MASK
        self.committed_at = np.full(len(self.ids), -1)
        self.passes = 0
        self.is_ended = False

    def open_in(self, begin, end):
        return [i for i in range(begin, min(end, len(self.ids))) if self.is_open[i]]

    def probabilities(self):
        z = np.array(self.net(np.where(self.is_open, MASK, self.ids)), dtype=np.float64)
        z[:, MASK] = -np.inf
        return softmax(z, axis=-1)

    def commit(self, positions, ids):
        for i in positions:
            self.ids[i], self.is_open[i], self.committed_at[i] = ids[i], False, self.passes
        self.passes += 1
        for i, given in enumerate(self.is_given):
            if self.is_open[i]:
                break
            if not given and self.ids[i] in self.ends:
                rest = [j for j in range(i + 1, len(self.ids)) if not self.is_given[j]]
                self.ids[rest], self.is_open[rest], self.committed_at[rest] = self.ids[i], False, -1
                self.is_ended = True
                break

    @property
    def result(self):
        return self.ids.tolist(), self.committed_at.tolist(), self.passes


def first_open(canvas):
    return int(np.argmax(canvas.is_open)) if canvas.is_open.any() else len(canvas.ids)


def surest(positions, score):
    """The positions by falling score, of equal ones the lower first."""
    return sorted(positions, key=lambda i: (-score[i], i))


def llada(net, ids, length, steps, ends=()):
    """ML-GSAI/LLaDA's generate.py, low_confidence at temperature 0: blocks from the prompt's end, even split.

    With ends a sequence stops at the first of them before which nothing is open; what follows is that end.
    """
    canvas = Canvas(net, ids, ends)
    for begin in range(first_open(canvas), len(ids), length):
        num_open = len(canvas.open_in(begin, begin + length))
        for step in range(steps):
            each = num_open // steps + (step < num_open % steps)
            positions = canvas.open_in(begin, begin + length)
            if each and positions:
                p = canvas.probabilities()
                canvas.commit(surest(positions, p.max(-1))[:each], p.argmax(-1))
    return canvas.result


def fast_dllm(net, ids, length, *, threshold=None, factor=None, ends=()):
    """NVlabs/Fast-dLLM's llada/generate.py: as many passes as it takes."""
    canvas = Canvas(net, ids, ends)
    for begin in range(first_open(canvas), len(ids), length):
        while positions := canvas.open_in(begin, begin + length):
            p = canvas.probabilities()
            order = surest(positions, p.max(-1))
            confidence = [p[i].max() for i in order]
            if threshold is not None:
                count = sum(c > threshold for c in confidence)
            else:
                count = max([n for n in range(1, len(order) + 1) if confidence[n - 1] >= 1 - factor / (n + 1)] or [0])
            canvas.commit(order[: max(1, count)], p.argmax(-1))
    return canvas.result


def sdar_dynamic(net, ids, length, steps, threshold):
    """JetAstra/SDAR's dynamic remasking, as in LLaDA2.0: blocks at multiples of their length."""
    canvas = Canvas(net, ids)
    for begin in range(0, len(ids), length):
        num_open = len(canvas.open_in(begin, begin + length))
        for step in range(steps):
            positions = canvas.open_in(begin, begin + length)
            if not positions:
                break
            p = canvas.probabilities()
            order = surest(positions, p.max(-1))
            each = num_open // steps + (step < num_open % steps)
            above = sum(p[i].max() > threshold for i in order)
            count = len(order) if step == steps - 1 else max(above, each, 1)
            canvas.commit(order[:count], p.argmax(-1))
    return canvas.result


def llada21(net, ids, length, threshold, editing_threshold, editing_steps, ends=()):
    """LLaDA2.1: of each block what is above a threshold, or the surest, while committed ids that are not given give
    way to others above theirs; then so many passes at most that only edit, until one changes nothing."""
    canvas = Canvas(net, ids, ends)
    for begin in range(0, len(ids), length):
        inside = [i for i in range(begin, min(begin + length, len(ids))) if not canvas.is_given[i]]
        left = editing_steps if inside and not canvas.is_ended else 0
        while left:
            positions, p = canvas.open_in(begin, begin + length), canvas.probabilities()
            best, c = p.argmax(-1), p.max(-1)
            order = surest(positions, c)
            chosen = order[: max(1, sum(c[i] > threshold for i in order))]
            edits = [
                i for i in inside if i not in positions and best[i] != canvas.ids[i] and c[i] > editing_threshold
            ]
            canvas.commit(chosen + edits, best)
            if not positions:
                left = left - 1 if edits else 0
            if canvas.is_ended:
                left = 0
    return canvas.result


def eb_sampler(net, ids, bound):
    """EB-Sampler: by rising entropy, the n-th while those before it sum to at most the bound."""
    canvas = Canvas(net, ids)
    while positions := canvas.open_in(0, len(ids)):
        p = canvas.probabilities()
        entropy = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0), axis=-1)
        order = surest(positions, -entropy)
        before = np.concatenate([[0.0], np.cumsum(entropy[order])[:-1]])
        canvas.commit(order[: int(np.sum(before <= bound))], p.argmax(-1))
    return canvas.result


def p2(net, ids, steps):
    """P2 with eta 1: what is committed is scored anew, by its own id; of all that is open the lowest are masked."""
    return _rescored(net, ids, steps, keeps_scores=False)


def mask_predict(net, ids, steps):
    """Mask-Predict: what is committed keeps the probability of the pass that predicted it."""
    return _rescored(net, ids, steps, keeps_scores=True)


def _rescored(net, ids, steps, *, keeps_scores):
    """The ids after each pass."""
    ids, states = np.array(ids), []
    is_open, is_masked = ids == MASK, ids == MASK
    score = np.zeros(len(ids))
    places = [i for i in range(len(ids)) if is_open[i]]
    for step in range(steps):
        z = np.array(net(np.where(is_masked, MASK, ids)), dtype=np.float64)
        z[:, MASK] = -np.inf
        log_p = log_softmax(z, axis=-1)
        for i in places:
            if is_masked[i]:
                ids[i] = log_p[i].argmax()
            if is_masked[i] or not keeps_scores:
                score[i] = log_p[i, ids[i]]
        is_masked[:] = False
        left = int(len(places) * (steps - 1 - step) / steps + 1e-4)
        is_masked[sorted(places, key=lambda i: (score[i], -i))[:left]] = True
        states.append(np.where(is_masked, MASK, ids).tolist())
    return states


def in_order(net, ids, order, steps):
    """A fixed order (Halton's, left to right), so many positions a step that a linear schedule keeps the rest."""
    canvas = Canvas(net, ids)
    places = [i for i in order if canvas.is_open[i]]
    for step in range(steps):
        left = int(len(places) * (steps - 1 - step) / steps + 1e-4)
        positions = [i for i in places[: len(places) - left] if canvas.is_open[i]]
        if positions:
            canvas.commit(positions, canvas.probabilities().argmax(-1))
    return canvas.result
