"""Choosing masks: what is accepted, refused and promised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask import _check, _dispatch
from fastmask._devices import to_device
from fastmask.ops.seeds import as_draws
from fastmask.records import MaskedTokens, Masking, RandomIds, ScheduleValues
from fastmask.reference import mask_sampling as reference
from fastmask.schedules import Schedule, TensorFn, as_schedule


def mask_sampling(
    tokens: Tensor,
    *,
    mask_id: int,
    num_tokens: int,
    schedule: str | TensorFn | float | Schedule = "linear",
    mode: str = "exact",
    stratified: bool = False,
    times: Tensor | None = None,
    counts: Tensor | None = None,
    maskable: Tensor | None = None,
    complement: bool = False,
    gate: str = "batch",
    no_replace_prob: float = 0.0,
    random_token_prob: float = 0.0,
    random_may_be_mask: bool = False,
    random_excludes: Tensor | Sequence[int] | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    global_batch_size: int | None = None,
    check: bool = False,
    backend: str = "auto",
) -> MaskedTokens:
    r"""Chooses the masked positions of a batch, and what the network sees there.

    .. math::
        t_b \sim U(0, 1), \quad k_b = \max(1, \lceil \mathrm{schedule}(t_b)\, n_b \rceil), \quad
        w_b = |\mathrm{schedule}'(t_b)| \, n_b / k_b

    Args:
        tokens: [B, N] int32|int64, clean ids.
        mask_id: the id of the mask token. One outside [0, num_tokens) is allowed.
        num_tokens: V, the size of the vocabulary.
        schedule: t to the mask ratio: "linear" (1 - t), "cosine" (cos(pi t / 2)), a callable on a
            float32 tensor that autograd can differentiate, a :class:`fastmask.Schedule` (under torch.compile with
            its derivative), or a number in (0, 1], a constant ratio, of which w is 0.
        mode: "exact" masks exactly k_b of the n_b maskable positions, a uniformly random subset;
            "bernoulli" masks each with probability schedule(t_b), and w_b = |schedule'| / schedule.
        stratified: t_b = (u + b / B) mod 1 over the global batch, one u for all.
        times: [B] float32, t_b in place of drawn ones; no gradient reaches them.
        counts: [B] int32|int64, k_b in place of the schedule's ("exact" only); clamped to [0, n_b].
        maskable: [B, N] bool, False where a token is never masked (padding, prompts); None for all.
        complement: the n_b - k_b maskable positions that the same seed leaves unmasked otherwise, with their own
            counts and gate, and w_b for them: |schedule'| n_b / (n_b - k_b), or |schedule'| / (1 - schedule).
        gate: "batch", two coins that the call shares, as below; or "token", each masked position by itself: it
            keeps its token with probability no_replace_prob, else gets a random one with random_token_prob (of
            all masked: .1 and .1 are BERT's).
        no_replace_prob: with probability 1/2 per call, ceil(k_b no_replace_prob) of the masked
            positions keep their token.
        random_token_prob: independently with probability 1/2 per call, ceil(r random_token_prob f) of
            the remaining r get a random token; f is 1 - no_replace_prob if the first coin fell so, else 1.
        random_may_be_mask: whether a random token may be mask_id; uniform over the other ids by default.
        random_excludes: [V] bool, True at ids that no random token is (padding, special ids), or a sequence of those
            ids (copied to the device at each call). None for none.
        seed, generator: see the module.
        sample_offset: global index of the first row (data parallelism, split batches).
        global_batch_size: B of the whole batch, for ``stratified``; default the rows given.
        check: also refuse tokens outside [0, num_tokens) or equal to mask_id (synchronises).
        backend: see the module.

    Returns:
        MaskedTokens of
        masked_ids: [B, N] as tokens, what the network sees;
        is_masked: [B, N] bool, the positions in the loss, kept and random ones included;
        times: [B] float32;
        counts: [B] int64, how many are masked;
        loss_weights: [B] float32, w_b (0 where nothing is masked);
        row_indices: [B N] int64, the flat indices b N + i of the masked positions in rising order, then -1;
        num_masked: [] int64, how many of row_indices are masked positions.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, tensors on several devices,
        counts with mode "bernoulli", with gate "token" probabilities whose sum is above 1, no id left to draw
        random tokens from (random_excludes on a GPU are read under check=True only; until then mask_id stands
        there), a schedule without derivative; under check=True unclean tokens. RuntimeError inside of
        torch.func's transforms.

    Randomness: streams TIMES or STRATUM, COINS (gate "batch") and KEYS of the seed.

    Source: k and the subset, MaskGIT (https://arxiv.org/abs/2202.04200); w, MDLM
    (https://arxiv.org/abs/2406.07524, eq. 10, alpha = 1 - schedule); kept and random tokens, BERT
    (https://arxiv.org/abs/1810.04805).

    Example:
        >>> tokens = torch.arange(8)[None]
        >>> out = mask_sampling(tokens, mask_id=8, num_tokens=9, counts=torch.tensor([3]), seed=0)
        >>> int(out.is_masked.sum()), bool((out.masked_ids[out.is_masked] == 8).all())
        (3, True)
    """
    _check.tensor("tokens", tokens, _check.INTEGER, ndim=2)
    batch, length = tokens.shape
    if length == 0:
        raise ValueError("expected tokens [B, N] with N of at least 1, received N = 0")
    num_tokens = _check.integer("num_tokens", num_tokens, 1, 2**31)
    mask_id = _check.integer("mask_id", mask_id, 0, 2**31)
    _check.option("mode", mode, ["exact", "bernoulli"])
    check_gate(gate, no_replace_prob, random_token_prob)
    flags = {"stratified": stratified, "random_may_be_mask": random_may_be_mask, "complement": complement}
    for name, flag in {**flags, "check": check}.items():
        _check.flag(name, flag)
    global_batch_size = batch if global_batch_size is None else global_batch_size
    _check.integer("global_batch_size", global_batch_size, min(1, batch), 2**32)
    if random_token_prob > 0.0 and not random_may_be_mask and num_tokens - (mask_id < num_tokens) < 1:
        raise ValueError(
            f"expected an id besides mask_id {mask_id} to draw random tokens from, received "
            f"num_tokens {num_tokens}; set random_token_prob=0"
        )
    if times is not None:
        _check.tensor("times", times, [torch.float32])
        _check.shape("times", times, [batch], "B")
    if counts is not None:
        if mode == "bernoulli":
            raise ValueError("expected counts with mode='exact', received mode='bernoulli'; leave counts out")
        _check.tensor("counts", counts, _check.INTEGER)
        _check.shape("counts", counts, [batch], "B")
    if maskable is not None:
        _check.tensor("maskable", maskable, [torch.bool])
        _check.shape("maskable", maskable, [batch, length], "B, N")
    tensors = {"tokens": tokens, "times": times, "counts": counts, "maskable": maskable}
    _check.same_device(**tensors)
    _check.plain(**tensors)
    excluded = random_excludes
    if excluded is not None:
        excluded = _check.id_table("random_excludes", excluded, num_tokens, tokens.device)
        _check.plain(random_excludes=excluded)
    if check:
        _check.clean_tokens("tokens", tokens, num_tokens, mask_id)

    schedule = as_schedule(schedule)
    draws = as_draws(seed, tokens.device, generator, step=0, sample_offset=sample_offset)
    masking = Masking(
        mask_id=mask_id,
        num_tokens=num_tokens,
        global_batch_size=global_batch_size,
        schedule=schedule.name,
        bernoulli=mode == "bernoulli",
        stratified=stratified,
        no_replace_prob=float(no_replace_prob),
        random_token_prob=float(random_token_prob),
        random_may_be_mask=random_may_be_mask,
        gates_tokens=gate == "token",
        complement=complement,
    )
    random_ids = RandomIds()
    if excluded is not None and random_token_prob > 0.0:
        random_ids = _allowed(excluded, masking, tokens.device, check=check)
    if times is None and schedule.name is None:
        times = reference.draw_times(draws, batch, masking)
    values = ScheduleValues() if times is None else _values(schedule, times.detach())
    run = _dispatch.implementation(reference.mask_sampling, tokens.device, backend)
    return run(tokens, draws, masking, values, None if counts is None else counts.long(), maskable, random_ids)


def check_gate(gate: str, no_replace_prob: float, random_token_prob: float) -> None:
    """The shares of masked positions that keep their token or get a random one fit the gate."""
    _check.option("gate", gate, ["batch", "token"])
    _check.number("no_replace_prob", no_replace_prob, 0.0, 1.0)
    _check.number("random_token_prob", random_token_prob, 0.0, 1.0)
    if gate == "token" and no_replace_prob + random_token_prob > 1.0:
        raise ValueError(
            "expected no_replace_prob + random_token_prob of at most 1 with gate='token', received "
            f"{no_replace_prob} + {random_token_prob}; BERT's are 0.1 and 0.1"
        )


def _allowed(excluded: Tensor, masking: Masking, device: torch.device, *, check: bool) -> RandomIds:
    """The ids that random tokens are drawn from, as a table: a draw is then one look-up, whatever is excluded.

    Refused where none is left and the host knows it without waiting for a GPU, or is asked to wait.
    """
    mask_id = None if masking.random_may_be_mask else masking.mask_id
    reads = check or (excluded.device.type == "cpu" and not torch.compiler.is_compiling())
    remedy = "set random_token_prob=0"
    is_allowed = to_device(_check.allowed_ids("random_excludes", excluded, mask_id, remedy, reads=reads), device)
    ids = torch.nonzero_static(is_allowed, size=masking.num_tokens, fill_value=masking.mask_id)
    return RandomIds(ids.squeeze(-1), is_allowed.sum())


def _values(schedule: Schedule, times: Tensor) -> ScheduleValues:
    """The schedule at times [B] that carry no derivative: masks are no function of them that has one."""
    ratios, slopes = schedule(times), schedule.slope(times)
    for name, value in (("schedule(t)", ratios), ("the schedule's derivative", slopes)):
        if not isinstance(value, Tensor) or value.shape != times.shape:
            received = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"expected {name} to be a tensor of t's shape {list(times.shape)}, received {received}")
    return ScheduleValues(times, ratios.detach().float(), slopes.detach().float())
