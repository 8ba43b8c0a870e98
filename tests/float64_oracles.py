"""What the operations mean, once more, in NumPy's float64: nothing here is fastmask's own arithmetic.

Tolerances are bounds, not guesses: what a rounding of the operands to float32, or to the dtype they came in, can do
to a figure to first order, half as much again, and the rounding of the figure itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# Half a unit in the last place, relative.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
SMALLEST = {"float16": 2.0**-25, "bfloat16": 2.0**-134, "float32": 2.0**-150, "float64": 0.0}
MARGIN = 1.5
# How many roundings a figure goes through: exp, log, a division, and sums.
STEPS = 6


def assert_within(got, exact, bound, what: str) -> None:
    """Equal where not finite, and else as near as the bound."""
    got, exact = np.asarray(got, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    assert got.shape == exact.shape, (what, got.shape, exact.shape)
    is_finite = np.isfinite(exact)
    same = np.where(np.isnan(exact), np.isnan(got), got == exact)
    with np.errstate(invalid="ignore"):
        near = np.abs(got - exact) <= np.broadcast_to(bound, exact.shape)
    good = np.where(is_finite, near, same)
    assert good.all(), (what, got[~good][:5], exact[~good][:5], np.broadcast_to(bound, exact.shape)[~good][:5])


# Losses


class RowLoss(NamedTuple):
    """Of one row [V]: figures, and what rounding may make of each."""

    loss: float
    nll: float
    gradient: np.ndarray
    loss_bound: float
    nll_bound: float
    gradient_bound: np.ndarray
    may_be_correct: set[bool]


def row_loss(
    logits: np.ndarray,
    target: int,
    *,
    error: np.ndarray | float = 0.0,
    rounding: float = 2.0**-24,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    exclude_id: int | None = None,
) -> RowLoss:
    """The docstring's loss of one row [V], float64, and its gradient by the logits.

    Args:
        error: of the logits, absolute.
        rounding: of one operation.
    """
    e, lam, num_columns = label_smoothing, z_loss, len(logits)
    z, slope, slope_error = logits, np.ones(num_columns), np.zeros(num_columns)
    error = np.broadcast_to(np.asarray(error, dtype=np.float64), logits.shape).copy()
    if softcap is not None:
        th = np.tanh(logits / softcap)
        z = softcap * th
        slope = 1.0 / np.cosh(np.clip(logits / softcap, -300, 300)) ** 2
        slope_error = STEPS * rounding + slope * np.expm1(np.minimum(2 * error / softcap, 50.0))  # sech^2 ~ exp(-2 x)
        error = error * slope + STEPS * rounding * np.abs(z)
    allowed = np.ones(num_columns, dtype=bool)
    if exclude_id is not None:
        allowed[exclude_id] = False
    size = allowed.sum()
    kept = np.where(allowed, z, -np.inf)
    top = kept.max()
    if not 0 <= target < num_columns or np.isnan(z[allowed]).any() or not np.isfinite(top):
        nan = np.full(num_columns, np.nan)
        return RowLoss(np.nan, np.nan, nan, 0.0, 0.0, nan, {False})
    gap = kept - top  # at most 0
    weights = np.exp(gap)
    total = weights.sum()
    others = np.delete(weights, target).sum()
    lse = top + math.log(total)
    p = weights / total
    p_target, q = p[target], others / total
    z_target = kept[target]  # -inf for the excluded column
    if p_target > 0.5:
        nll = math.log1p(others / weights[target])
    else:
        nll = lse - z_target
    smooth = math.log(total) - gap[allowed].mean()  # L less the mean
    with np.errstate(invalid="ignore"):  # under a smoothing of 1 an impossible target's is 0 times infinity
        loss = np.float64(1 - e) * nll + lam * lse**2
    if e > 0.0:
        loss = loss + e * smooth
    gradient = p * (1 + 2 * lam * lse) - np.where(allowed, e / size, 0.0)
    gradient[target] = (1 - e) * -q + e * (p_target - 1 / size) + 2 * lam * lse * p_target
    by_z = gradient.copy()
    gradient = gradient * slope
    gradient[~allowed] = 0.0

    # What rounding does. A weight's relative error: its exponent's absolute one, and a few roundings.
    finite_gap = np.where(np.isfinite(gap), -gap, 0.0)
    finite_error = np.where(np.isfinite(kept), error, 0.0)
    top_error = finite_error.max()
    exponent = rounding * STEPS * (finite_gap + 1) + finite_error + top_error
    exponent = np.expm1(np.minimum(exponent, 50.0))
    average = float((p * exponent).sum())
    relative = exponent + average  # of p
    lse_error = average + rounding * STEPS * (abs(top) + abs(lse) + 1)
    # others / e_y, relative: the odds are what a likely target's nll is made of.
    odds = float((np.delete(p, target) * np.delete(exponent, target)).sum())
    tiny = num_columns * (2.0**-126 if rounding > 2.0**-50 else 2.0**-1022)  # what underflows
    odds = odds + q * exponent[target] + tiny
    rounded_top = (
        rounding * STEPS * (abs(top) + (abs(z_target) if np.isfinite(z_target) else 0.0)) * (p_target < 0.75)
    )
    nll_bound = (odds + rounded_top + rounding * STEPS * abs(nll)) if np.isfinite(nll) else 0.0
    if np.isfinite(nll) and p_target < 0.75:
        nll_bound += finite_error[target] + top_error
    smooth_error = (
        average + rounding * (STEPS + num_columns) * finite_gap.mean() + 2 * finite_error.mean() + top_error
    )
    loss_bound = (1 - e) * nll_bound + lam * (2 * abs(lse) + lse_error) * lse_error + rounding * STEPS * abs(loss)
    loss_bound += e * (smooth_error + rounding * STEPS) if e > 0 else 0.0
    by_lse = 1 + 2 * lam * abs(lse)
    gradient_bound = (
        tiny + p * relative * by_lse + p * 2 * lam * lse_error + rounding * STEPS * (np.abs(by_z) + e / size)
    )
    gradient_bound[target] = (
        odds
        + q * average
        + p_target * relative[target] * (e + 2 * lam * abs(lse))
        + p_target * 2 * lam * lse_error
        + rounding * STEPS * (q + e * p_target + e / size + 2 * lam * abs(lse) * p_target)
    )
    gradient_bound = gradient_bound * slope + np.abs(by_z) * slope_error
    gradient_bound[~allowed] = 0.0

    rivals = np.flatnonzero(kept >= top - 2 * top_error)
    exact_best = np.flatnonzero(kept == top)[0]
    if len(rivals) == 1 or top_error == 0.0:
        may_be = {bool(exact_best == target)}
    else:
        may_be = {False, True} if target in rivals else {False}
    return RowLoss(
        float(loss),
        float(nll),
        gradient,
        MARGIN * float(loss_bound) if np.isfinite(loss_bound) else 0.0,
        MARGIN * float(nll_bound),
        MARGIN * gradient_bound,
        may_be,
    )


# Vocabularies


def allowed_ids(num_tokens: int, mask_id: int | None, forbidden: np.ndarray | None) -> np.ndarray:
    allowed = np.ones(num_tokens, dtype=bool)
    if forbidden is not None:
        allowed &= ~forbidden
    if mask_id is not None and 0 <= mask_id < num_tokens:
        allowed[mask_id] = False
    return allowed


def vocabularies(
    logits: np.ndarray, top_k: int | None, top_p: float | None, mask_id: int | None, forbidden: np.ndarray | None
) -> list[np.ndarray]:
    """Which ids [V] of a row may be sampled; more than one answer where rounding decides about the nucleus' last."""
    allowed = allowed_ids(len(logits), mask_id, forbidden)
    z = np.where(allowed, logits, -np.inf)
    if top_k == 1:
        return [np.arange(len(z)) == z.argmax()]
    stays = z > -np.inf
    if top_k is not None and top_k < len(z):
        stays &= z >= np.sort(z)[::-1][top_k - 1]
    if top_p is None or top_p >= 1.0:
        return [stays]
    answers: list[np.ndarray] = []
    levels = np.unique(z[stays])[::-1]
    masses = np.array([np.exp(level - z.max()) * (z[stays] == level).sum() for level in levels])
    above = masses.cumsum() - masses  # the mass of what is likelier
    total = masses.sum()
    for slack in (-(2.0**-18), 0.0, 2.0**-18):
        # Of one level all tie: it stays as long as what is likelier falls short of the share.
        is_in = above < (top_p + slack) * total
        is_in[0] = True
        kept = stays & (z >= levels[is_in].min())
        if not any((kept == answer).all() for answer in answers):
            answers.append(kept)
    return answers


class RowFigures(NamedTuple):
    """Of one row over a vocabulary: log p of every id, the margin, the entropy; and the bounds of each."""

    log_probs: np.ndarray
    margin: float
    entropy: float
    log_probs_bound: np.ndarray
    margin_bound: float
    entropy_bound: float


def row_figures(logits: np.ndarray, vocabulary: np.ndarray) -> RowFigures:
    z = np.where(vocabulary, logits, -np.inf)
    z = z - z.max()
    weights = np.exp(z)
    total = weights.sum()
    best = int(weights.argmax())
    log_probs = z - math.log(total)
    others = np.delete(weights, best).sum()
    log_probs[best] = -math.log1p(others)  # the likeliest id, accurately
    falling = np.sort(weights)[::-1]
    margin = (falling[0] - (falling[1] if len(falling) > 1 else 0.0)) / total
    gap = np.where(np.isfinite(z), -z, 0.0)
    p = weights / total
    entropy = float(math.log(total) + (p * gap).sum())
    rounding, count = 2.0**-24, len(z)
    exponent = rounding * STEPS * (gap + 1)  # relative, of a weight
    average = float((p * exponent).sum())
    bound = average + rounding * STEPS * (gap + math.log(total)) + rounding
    bound[best] = average + rounding * STEPS * math.log(total) + rounding
    second = gap[np.argsort(weights)[::-1][1]] if count > 1 else 0.0
    return RowFigures(
        log_probs,
        float(margin),
        entropy,
        MARGIN * bound,
        MARGIN * (rounding * STEPS * (second + 2) + average),
        MARGIN * (average + float((p * gap * exponent).sum()) + rounding * STEPS * (entropy + math.log(total) + 1)),
    )


# Which positions are masked again


def expected_selection(keys: np.ndarray, eligible: np.ndarray, count: int, min_key: float | None) -> np.ndarray:
    """The ``count`` eligible positions of the highest keys of a row [N]: NaN first, of those that tie the last."""
    if min_key is not None:
        eligible = eligible & ~(keys < min_key)
    places = [int(i) for i in np.flatnonzero(eligible)]
    places.sort(key=lambda i: (0 if np.isnan(keys[i]) else 1, 0.0 if np.isnan(keys[i]) else -keys[i], -i))
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[places[: max(0, count)]] = True
    return chosen


def row_list(is_masked: np.ndarray, starts: list[int], num_places: int) -> list[int]:
    """The flat positions of what is masked [B, N], those of sequence b in places starts[b] to starts[b + 1]."""
    batch, length = is_masked.shape
    places = [-1] * num_places
    for b in range(batch):
        rows = [b * length + i for i in range(length) if is_masked[b, i]]
        for place, row in zip(range(starts[b], starts[b + 1]), rows, strict=False):
            places[place] = row
    return places


# Masks


def exact_count(ratio: np.float32, num_maskable: int) -> int:
    """max(1, ceil(float32(ratio n))), at most n."""
    wanted = math.ceil(float(np.float32(ratio) * np.float32(num_maskable)))
    return min(max(1, wanted), num_maskable)


def share_of(count: int, share: float) -> int:
    """ceil(float32(count share)), the share a double rounded to float32."""
    return math.ceil(float(np.float32(count) * np.float32(share)))


def gate_counts(count: int, keeps: bool, replaces: bool, keep: float, random: float) -> tuple[int, int]:
    """How many of a sequence's masked positions keep their token, and how many get a random one."""
    kept = share_of(count, keep) if keeps else 0
    left = count - kept
    replaced = share_of(left, random * (1.0 - keep) if keeps else random) if replaces else 0
    return kept, min(replaced, left)
