"""Cross-entropy of masked positions: what is accepted, refused and promised, and the checks that both losses share.

The equation is ``fastmask/reference/masked_cross_entropy.py``'s.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

from fastmask import _check, _dispatch, vocabulary_parallel
from fastmask._devices import to_device
from fastmask._memoised import memoised
from fastmask.records import CrossEntropy, LossOptions, LossRows, Reduction
from fastmask.reference import masked_cross_entropy as reference

Function = TypeVar("Function", bound=Callable[..., Any])


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    is_masked: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    exclude_id: int | None = None,
    with_correct: bool = False,
    ignore_index: int | None = None,
    num_tokens: int | None = None,
    inplace_grad: bool = False,
    check: bool = False,
    backend: str = "auto",
) -> CrossEntropy:
    r"""Cross-entropy at the masked positions, in nats, float32 whatever the logits are.

    .. math::
        \ell_i = w_i \left[(1 - \epsilon)(L_i - z_{i,y_i}) + \epsilon (L_i - \bar z_i) + \lambda L_i^2\right],
        \quad L_i = \log \sum_{v \in A} e^{z_{i,v}}, \quad \bar z_i = \mathrm{mean}_{v \in A} z_{i,v}

    with z the logits, or c tanh(logits / c) under a softcap c.

    With everything left at its default this is ``F.cross_entropy(logits[is_masked].float(),
    targets[is_masked])``, and 0 where nothing is masked.

    Args:
        logits: [..., V] float16|bfloat16|float32|float64, unnormalised. A DTensor that is Shard(-1), split over the
            ranks of a mesh of one dimension, stays split: so is its gradient, and the result is that of the whole on
            each rank. All other tensors are plain, and equal on these ranks (docs/distributed.md).
        targets: [...] int32|int64; never read where unmasked.
        is_masked: [...] bool, the positions in the loss; None for all.
        weights: [...] float32|float64, w of each position, or [B] of each sequence of targets [B, N];
            constant; 0 is as good as unmasked. None for 1.
        reduction: "none", "sum", or "mean": the sum divided by the number of masked positions.
        denominator: what "mean" divides by instead (gradient accumulation, data parallelism; B N with
            MDLM weights). A number or a tensor of one.
        label_smoothing: epsilon in [0, 1], spread over the columns A.
        z_loss: lambda >= 0.
        softcap: c > 0, or None for none.
        exclude_id: a column that leaves A and gets gradient 0 (mask_id, for MDLM's SUBS). A target equal
            to it costs +inf.
        with_correct: also compare the argmax over A (ties to the lower id) with the target.
        ignore_index: targets equal to it are as good as unmasked (-100 in Hugging Face's labels); None for none.
        num_tokens: how many ids there are: columns from there on pad the vocabulary, leave A and get gradient 0.
            None for V.
        inplace_grad: let the gradient take the logits' memory, in forward or backward: the caller reads them
            no more (nor recomputes them from a checkpoint) and runs backward once; what comes from above, if not
            1, then scales the rounded gradient. A permission: where it cannot be had (torch.compile, logits
            that are not contiguous) the gradient gets memory of its own.
        check: also refuse targets outside [0, V) or equal to exclude_id at masked positions (synchronises).
        backend: see the module.

    Returns:
        CrossEntropy of
        loss: [] or, for "none", [...], 0 where unmasked; float32 (float64 for float64 logits), nats;
        nll: [...], L - z_y of each position, unweighted, 0 where unmasked; not differentiable;
        correct: [...] bool, False where unmasked; None unless asked for.
        A masked row whose target is outside [0, V) has loss, nll and gradient NaN, and is not correct.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, reduction or number, weights that require
        grad, a denominator without "mean"; under check=True targets out of range. RuntimeError on
        double backward, on a second backward with inplace_grad, and inside of torch.func's transforms or with
        forward-mode tangents: derivatives are reverse-mode only.

    Compiled: the kernels are one operator in a graph. PyTorch's code (backend "reference") computes as many rows as
    are masked, which no graph holds: with a mask or weights torch.compile splits the graph there, and refuses with
    fullgraph=True.

    Randomness: none.

    Source: label smoothing, Szegedy et al. (https://arxiv.org/abs/1512.00567, section 7); z-loss, PaLM
    (https://arxiv.org/abs/2204.02311, section 5); softcap, Gemma 2
    (https://arxiv.org/abs/2408.00118, section 2); SUBS, MDLM (https://arxiv.org/abs/2406.07524, section 3.2.3).

    Example:
        >>> logits = torch.zeros(1, 3, 4)
        >>> is_masked = torch.tensor([[True, False, True]])
        >>> masked_cross_entropy(logits, torch.tensor([[0, 1, 2]]), is_masked).loss
        tensor(1.3863)
    """
    _check.tensor("logits", logits, _check.FLOATING)
    _check.flag("inplace_grad", inplace_grad)
    _check.flag("check", check)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise ValueError(f"expected logits of shape [..., V] with V of at least 1, received {list(logits.shape)}")
    num_tokens = check_num_tokens(num_tokens, logits.shape[-1])
    rows = loss_rows(logits, targets, is_masked, weights)
    reducing = loss_reduction(logits, reduction, denominator)
    options = checked_loss_options(num_tokens, label_smoothing, z_loss, softcap, exclude_id, with_correct)
    tensors = {"logits": logits, **rows._asdict()}
    _check.same_device(**tensors)
    _check.plain(**tensors, denominator=reducing.denominator)
    if ignore_index is not None:
        is_target = not_ignored(targets, ignore_index)
        rows = rows._replace(is_masked=is_target if is_masked is None else is_masked & is_target)
    if check:
        _check.clean_tokens("targets", targets, num_tokens, exclude_id, rows.counted())
    if vocabulary_parallel.is_split(logits):
        vocabulary_parallel.check(backend, **rows._asdict(), denominator=reducing.denominator)
        local, columns = vocabulary_parallel.local_part("logits", logits, -1, num_tokens)
        return reference.of_columns(local, rows, reducing, options, inplace_grad, columns)
    run = _dispatch.implementation(reference.masked_cross_entropy, logits.device, backend, logits.dtype)
    logits = logits if num_tokens == logits.shape[-1] else logits[..., :num_tokens]
    return run(logits, rows, reducing, options, inplace_grad)


# What both losses share: their rows, their reduction and their options


def check_num_tokens(num_tokens: int | None, num_columns: int) -> int:
    """How many of the columns are ids."""
    return num_columns if num_tokens is None else _check.integer("num_tokens", num_tokens, 1, num_columns + 1)


def loss_rows(logits: Tensor, targets: Tensor, is_masked: Tensor | None, weights: Tensor | None) -> LossRows:
    """The rows of logits (or embeddings) [..., V]: weights in the targets' shape and the loss's dtype."""
    shape = logits.shape[:-1]
    _check.tensor("targets", targets, _check.INTEGER)
    _check.shape("targets", targets, shape, "...")
    if is_masked is not None:
        _check.tensor("is_masked", is_masked, [torch.bool])
        _check.shape("is_masked", is_masked, shape, "...")
    if weights is None:
        return LossRows(targets, is_masked)
    _check.tensor("weights", weights, [torch.float64, torch.float32])
    _check_constant("weights", weights)
    weights = weights.to(_loss_dtype(logits))
    if len(shape) == 2 and weights.shape == shape[:1]:
        weights = weights[:, None].expand(shape)
    if weights.shape != shape:
        raise ValueError(
            f"expected weights of the targets' shape {list(shape)}, or [B] for targets [B, N]; "
            f"received {list(weights.shape)}"
        )
    return LossRows(targets, is_masked, weights)


def not_ignored(targets: Tensor, ignore_index: int) -> Tensor:
    """Which targets are any, bool."""
    return targets != _check.integer("ignore_index", ignore_index, -(2**31), 2**31)


def loss_reduction(logits: Tensor, kind: str, denominator: Tensor | float | None) -> Reduction:
    """The reduction of losses of logits (or embeddings), the denominator on their device, in the loss's dtype."""
    _check.option("reduction", kind, ["none", "sum", "mean"])
    if denominator is None:
        return Reduction(kind)
    if kind != "mean":
        raise ValueError(f"expected denominator with reduction='mean', received reduction={kind!r}")
    device, dtype = logits.device, _loss_dtype(logits)
    if not isinstance(denominator, Tensor):
        _check.number("denominator", denominator, 0.0)
        return Reduction(kind, torch.full((), float(denominator), dtype=dtype, device=device))
    _check.tensor("denominator", denominator, [*_check.INTEGER, *_check.FLOATING])
    if denominator.numel() != 1:
        raise ValueError(f"expected denominator to be one number, received shape {list(denominator.shape)}")
    _check_constant("denominator", denominator)
    return Reduction(kind, to_device(denominator.reshape(()), device, dtype))


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _check_constant(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"expected {name} without gradient, received requires_grad=True; use {name}.detach()")


@memoised
def checked_loss_options(
    num_tokens: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    exclude_id: int | None,
    with_correct: bool,
) -> LossOptions:
    """Options in range for so many columns, as plain floats and ints."""
    _check.flag("with_correct", with_correct)
    _check.number("label_smoothing", label_smoothing, 0.0, 1.0)
    _check.number("z_loss", z_loss, 0.0)
    check_softcap(softcap)
    if exclude_id is not None:
        exclude_id = _check.integer("exclude_id", exclude_id, 0, num_tokens)
        if num_tokens == 1:
            raise ValueError("expected a column besides exclude_id, received logits with V = 1")
    softcap = None if softcap is None else float(softcap)
    return LossOptions(float(label_smoothing), float(z_loss), softcap, exclude_id, with_correct)


def check_softcap(softcap: float | None) -> None:
    """A softcap of logits is above 0, if there is one."""
    if softcap is not None:
        _check.number("softcap", softcap, 0.0)
        if softcap == 0.0:
            raise ValueError("expected softcap above 0, received 0; leave it out for logits as they are")


class LossKeywords(TypedDict, total=False):
    """LossOptions, as keywords of a function that carries them unlisted."""

    label_smoothing: float
    z_loss: float
    softcap: float | None
    exclude_id: int | None
    with_correct: bool


def shows_loss_options(door: Function) -> Function:
    """Shows, in the signature of a door that takes ``**options``, those that masked_cross_entropy lists."""
    signature, listed = inspect.signature(door), inspect.signature(masked_cross_entropy).parameters
    *parameters, options = signature.parameters.values()
    assert options.kind is inspect.Parameter.VAR_KEYWORD
    place = [parameter.name for parameter in parameters].index("check")
    parameters[place:place] = [listed[name] for name in LossOptions._fields]
    door.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return door
