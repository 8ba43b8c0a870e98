"""The programs that are compiled without a GPU, by operation and name: calls of public functions, and of which of
their launches each is.

Shapes are chosen for what Triton makes a program of: of a launch table each row, and no integer that 16 divides
unless said otherwise ("behind a head": rows begin at 16 bytes, yet their stride is 8 times an odd number). No call
runs: tensors are left empty.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask import functional as F

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
_DRAWS: dict[str, Any] = {"seed": 0, "sample_offset": 3}
_STEP = 3


class Program(NamedTuple):
    """What is launched. number: which of the launches of that kernel it is."""

    call: Callable[[], object]
    kernel: str
    number: int = 0


def _empty(*shape: int, dtype: torch.dtype = torch.float32, width: int | None = None) -> Tensor:
    """A tensor [*shape], the first part of rows of a width."""
    return torch.empty((*shape[:-1], width or shape[-1]), dtype=dtype)[..., : shape[-1]]


# Masks


def _mask(length: int, with_maskable: bool = False, **options: Any) -> object:
    """Of a linear schedule unless told otherwise; the mask is an id that a random token must not be."""
    tokens = _empty(4, length, dtype=torch.int64)
    maskable = _empty(4, length, dtype=torch.bool) if with_maskable else None
    return F.mask_sampling(
        tokens, mask_id=7, num_tokens=50258, maskable=maskable, backend="triton", **_DRAWS, **options
    )


_COINS = {"no_replace_prob": 0.15, "random_token_prob": 0.1}
# One for each way keys are kept: a warp, registers, registers with everything on, drawn again. Then other masks, and
# other things shown there. 16 divides strides.
_MASKS: dict[str, dict[str, Any]] = {
    "128": {"length": 128},
    "1024": {"length": 1024},
    "4096 gated": {"length": 4096, "schedule": "cosine", "stratified": True, **_COINS},
    "65536 gated": {"length": 65536, "mode": "bernoulli", "with_maskable": True, **_COINS},
    "1024 complement": {"length": 1024, "complement": True},
    "4096 complement gated": {
        "length": 4096,
        "schedule": "cosine",
        "stratified": True,
        "complement": True,
        "random_excludes": [0],
        **_COINS,
    },
    "1024 by token": {"length": 1024, "gate": "token", "random_excludes": [0], **_COINS},
    "65536 complement by token": {
        "length": 65536,
        "mode": "bernoulli",
        "with_maskable": True,
        "complement": True,
        "gate": "token",
        **_COINS,
    },
}


def _mask_sampling() -> dict[str, Program]:
    programs = {
        name: Program(functools.partial(_mask, **options), "_mask_sampling_kernel")
        for name, options in _MASKS.items()
    }
    two_launches = functools.partial(_mask, 1024, mode="bernoulli")
    return programs | {"row list": Program(two_launches, "_row_list_kernel")}


# Losses

# V of each launch plan on an H200, and of rows that are split.
_VOCABULARIES = {
    "eight rows": 63,
    "four rows": 255,
    "one warp": 1000,
    "two warps": 2047,
    "four programs an SM": 8191,
    "two programs an SM": 50259,
    "one program an SM": 128259,
    "split": 50257,
}
# What picks the column of the launch table.
_LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "special": {"exclude_id": 0, "with_correct": True},
    "costly": {"exclude_id": 0, "with_correct": True, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 30.0},
}


def _loss(
    shape: tuple[int, int, int],
    dtype: str,
    width: int | None = None,
    with_backward: bool = False,
    reduction: str = "mean",
    **options: Any,
) -> object:
    """With mask and weights, and its gradient."""
    logits = _empty(*shape, dtype=DTYPES[dtype], width=width).requires_grad_()
    out = F.masked_cross_entropy(
        logits,
        _empty(*shape[:2], dtype=torch.int64),
        _empty(*shape[:2], dtype=torch.bool),
        _empty(*shape[:2]),
        reduction=reduction,
        backend="triton",
        **options,
    )
    if with_backward:
        out.loss.backward()
    return out


def _masked_cross_entropy() -> dict[str, Program]:
    programs = {}
    for name, column, dtype in itertools.product(_VOCABULARIES, _LOSS_OPTIONS, ("bf16", "fp32")):
        if dtype == "fp32" and (column == "special" or name in ("four rows", "two warps", "two programs an SM")):
            continue  # as the others
        is_short = _VOCABULARIES[name] < 256
        num_sequences = 5 if name == "split" else 4301 if is_short else 103
        vocabulary = _VOCABULARIES[name]
        if name.endswith("an SM") and dtype == "fp32":  # which plan it is, the bytes of a row tell
            vocabulary //= 2
        shape = (num_sequences, 3, vocabulary)
        call = functools.partial(_loss, shape, dtype, **_LOSS_OPTIONS[column])
        programs[f"{name}, {column}, {dtype}"] = Program(call, "short_rows_kernel" if is_short else "_rows_kernel")
        if name == "split":
            programs[f"{name}, {column}, {dtype}, records"] = Program(call, "_records_kernel")
    # The gradient's rows lie at other places within 16 bytes than the logits'.
    twice = functools.partial(_loss, (103, 3, 50257), "bf16", width=50258, with_backward=True, reduction="sum")
    return programs | {"backward": Program(twice, "_rows_kernel", 1)}


# Samples


def _sample(
    num_tokens: int,
    dtype: str = "bf16",
    width: int | None = None,
    num_rows: int = 4,
    temperature: float = 0.7,
    in_place: bool = False,
    with_kept: bool = False,
    with_forbidden: bool = False,
    **options: Any,
) -> object:
    logits = _empty(2, num_rows // 2, num_tokens, dtype=DTYPES[dtype], width=width)
    shape = logits.shape[:2]
    if in_place:
        options["out"] = F.Sampled(_empty(*shape, dtype=torch.int64), _empty(*shape))
    return F.sample_tokens(
        logits,
        temperature=temperature,
        mask_id=7,
        kept_ids=_empty(*shape, dtype=torch.int64) if with_kept else None,
        forbidden=_empty(num_tokens, dtype=torch.bool) if with_forbidden else None,
        step=_STEP,
        backend="triton",
        **_DRAWS,
        **options,
    )


_ALL_FIGURES = {"with_margin": True, "with_entropy": True}
_EVERYTHING = {"with_forbidden": True, "top_k": 5000, **_ALL_FIGURES}
# Of each of two sequences its own.
_OWN: dict[str, Any] = {
    "temperature": torch.tensor([0.0, 0.7]),
    "top_k": torch.tensor([1, 5000]),
    "min_p": torch.tensor([0.0, 0.1]),
    "top_p": torch.tensor([0.9, 1.0]),
}
_TILES: dict[str, dict[str, Any]] = {
    "tiles": {"num_tokens": 50257, "temperature": 1.0},
    "tiles T": {"num_tokens": 50257},
    "tiles T small": {"num_tokens": 100},
    "tiles T sub-tiles": {"num_tokens": 50264},
    "tiles T filtered": {"num_tokens": 50257, "top_k": 5000},
    "tiles T margin": {"num_tokens": 50257, "with_margin": True},
    "tiles T entropy": {"num_tokens": 50257, "with_entropy": True},
    "tiles T margin entropy": {"num_tokens": 50257, **_ALL_FIGURES},
    "tiles T processed": {"num_tokens": 50257, "processed": True},
    "tiles T processed entropy": {"num_tokens": 50257, "processed": True, "with_entropy": True},
    "tiles T min_p": {"num_tokens": 50257, "min_p": 0.1},
    "tiles T forbidden": {"num_tokens": 50257, "with_forbidden": True},
    "tiles T everything": {"num_tokens": 50257, **_EVERYTHING},
    "tiles own sub-tiles": {"num_tokens": 50264, "processed": True, **_OWN},
    "tiles own everything": {"num_tokens": 50257, **_EVERYTHING, **_OWN},
}
_CHOICES: dict[str, dict[str, Any]] = {
    "choice plain": {"num_tokens": 50257, "width": 50264, "in_place": True},  # behind a head
    "choice sub-tiles": {"num_tokens": 50264, "in_place": True},
    "choice": {"num_tokens": 151944, "with_kept": True, **_EVERYTHING},
    "choice T 0": {"num_tokens": 151944, "temperature": 0.0, "with_kept": True, **_EVERYTHING},
    "choice misaligned": {"num_tokens": 151943, "with_kept": True, **_EVERYTHING},
    "choice small": {"num_tokens": 100, "width": 104, "with_kept": True, **_EVERYTHING, "top_k": 5},
    "choice own sub-tiles": {"num_tokens": 50264, "in_place": True, **_OWN},
    "choice own": {"num_tokens": 151944, "with_kept": True, "processed": True, **_EVERYTHING, **_OWN},
}
_SHORT_ROWS: dict[str, dict[str, Any]] = {
    "short rows": {"num_tokens": 33},
    "short rows everything": {"num_tokens": 50, "with_kept": True, **_EVERYTHING, "top_k": 5},
    "short rows own": {"num_tokens": 63, "with_kept": True, "processed": True, **_EVERYTHING, **_OWN},
}
# Of float32 the programs that hold most; of float64, which nobody samples for speed, that they compile.
_OTHER_SAMPLES: dict[str, tuple[str, ...]] = {
    "fp16": ("tiles T small",),
    "fp32": (
        "tiles T", "tiles T small", "tiles T everything", "choice", "choice sub-tiles", "choice T 0",
        "choice misaligned",
    ),
    "fp64": ("tiles T", "tiles T small", "choice"),
}  # fmt: skip


def _sample_tokens() -> dict[str, Program]:
    kernels = dict.fromkeys(_TILES, "_tiles_kernel") | dict.fromkeys(_CHOICES, "_choose_kernel")
    kernels |= dict.fromkeys(_SHORT_ROWS, "_short_samples_kernel")
    options = _TILES | _CHOICES | _SHORT_ROWS
    named = [(name, "bf16") for name in options]
    named += [(name, dtype) for dtype, names in _OTHER_SAMPLES.items() for name in names]
    return {
        _of_dtype(name, dtype): Program(functools.partial(_sample, dtype=dtype, **options[name]), kernels[name])
        for name, dtype in named
    }


def _of_dtype(name: str, dtype: str) -> str:
    return name if dtype == "bf16" else f"{name} {dtype}"


# V, and rows: two for each multiprocessor, also of an MI300X, are few, for which k takes more warps.
_FILTER_SIZES = {
    "": {"num_tokens": 8191, "num_rows": 612},
    " long": {"num_tokens": 2**20 - 1},  # of the largest sample
    " of 50257": {"num_tokens": 50257, "num_rows": 612},
}
_SHORT_FILTER_SIZES = {"": {"num_tokens": 2047}, " small": {"num_tokens": 127}}
# top_k: as a share of V. By both filters, the nucleus is of what the first leaves.
_FILTERS: dict[str, dict[str, Any]] = {
    "k": {"top_k": 0.5},
    "p": {"top_p": 0.9},
    "p forbidden": {"top_k": 0.5, "top_p": 0.9, "with_forbidden": True},
}
# Of float16 what differs in its registers.
_OTHER_FILTERS = {
    "fp16": ("thresholds p", "thresholds p of 50257"),
    "fp32": ("thresholds k long", "thresholds p forbidden long", "short thresholds p forbidden"),
    "fp64": ("thresholds k",),
}


def _vocabulary_filter() -> dict[str, Program]:
    programs = {}
    for dtype, filter in itertools.product(DTYPES, _FILTERS):
        for prefix, sizes in (("", _FILTER_SIZES), ("short ", _SHORT_FILTER_SIZES)):
            for size, shape in sizes.items():
                name = f"{prefix}thresholds {filter}{size}"
                if name == "thresholds p forbidden of 50257":
                    continue
                if dtype != "bf16" and name not in _OTHER_FILTERS[dtype]:
                    continue
                options = shape | _FILTERS[filter]
                if "top_k" in options:
                    share = 0.1 if size == " of 50257" else options["top_k"]  # as a rule
                    options["top_k"] = int(share * shape["num_tokens"])
                programs[_of_dtype(name, dtype)] = Program(
                    functools.partial(_sample, dtype=dtype, **options),
                    "_short_thresholds_kernel" if prefix else "_thresholds_kernel",
                )
    others: dict[str, dict[str, Any]] = {
        "own": {"processed": True, **_OWN},
        "min_p": {"min_p": 0.1},
        "k min_p": {"top_k": 4095, "min_p": 0.1},
    }
    for name, options in others.items():
        sample = functools.partial(_sample, **(options | _FILTER_SIZES[""]))
        programs[f"thresholds {name}"] = Program(sample, "_thresholds_kernel")
    return programs


# What is masked again


def _remask_keys(length: int) -> object:
    return F.confidence_remask_keys(_empty(4, length), choice_temperature=1.0, step=_STEP, backend="triton", **_DRAWS)


def _remask(length: int, noise_scale: float) -> None:
    ids, is_masked = _empty(4, length, dtype=torch.int64), _empty(4, length, dtype=torch.bool)
    row_indices, row_starts = torch.arange(4 * length), length * torch.arange(5)
    counts = torch.ones(4, dtype=torch.int64)
    F.remask_(
        ids, is_masked, row_indices, row_starts, _empty(4, length), counts, mask_id=7, noise_scale=noise_scale,
        min_remask_key=0.5, step=_STEP, backend="triton", **_DRAWS,
    )  # fmt: skip


# Keys that stay in registers, and those of longer sequences, whose noise is drawn before.
_SELECTIONS = {
    "selection 1024": (1023, 1.0),
    "selection 4096": (4095, 1.0),
    "selection by blocks": (8191, 0.0),
    "selection 1": (1, 1.0),
}


def _remasking() -> dict[str, Program]:
    programs = {
        name: Program(functools.partial(_remask, *options), "_selection_kernel")
        for name, options in _SELECTIONS.items()
    }
    return programs | {"noise": Program(functools.partial(_remask_keys, 1023), "_noise_kernel")}


# What is selected at random


def _select_at_random(dtype: str | None = None) -> object:
    """With one probability, or one of each position in a dtype."""
    probability = 0.5 if dtype is None else _empty(4, 1023, dtype=DTYPES[dtype])
    eligible = _empty(4, 1023, dtype=torch.bool)
    return F.select_at_random(eligible, probability, step=_STEP, backend="triton", **_DRAWS)


def _selecting_at_random() -> dict[str, Program]:
    dtypes = {"one probability": None, "of each position": "fp32"}
    dtypes |= {f"of each position {dtype}": dtype for dtype in ("bf16", "fp64")}
    return {
        name: Program(functools.partial(_select_at_random, dtype), "_selection_kernel")
        for name, dtype in dtypes.items()
    }


# Steps of decoding, by which of its parts they ask for.

STEPS: dict[str, dict[str, Any]] = {
    "counts": {"counts": 8},
    "commits": {"commits": 8},
    "greedy": {"counts": 8, "temperature": 0.0},
    "noise": {"counts": 8, "choice_temperature": 4.5},
    "margin": {"counts": 8, "score": "margin"},
    "entropy, processed": {"counts": 8, "score": "entropy", "processed": True},
    "random": {"counts": 8, "score": "random"},
    "order": {"counts": 8, "score": torch.zeros(2, 16)},
    "threshold": {"threshold": 0.9},
    "factor": {"factor": 1.0},
    "entropy_bound": {"score": "entropy", "entropy_bound": 0.1},
    "block": {"commits": 2, "threshold": 0.9, "block": torch.tensor([[0, 8], [4, 12]])},
    "editing": {"threshold": 0.7, "editing_threshold": 0.5, "editable": torch.zeros(2, 16, dtype=torch.bool)},
    "temperatures of sequences": {"counts": 8, "temperature": _OWN["temperature"]},
    "top_k": {"counts": 8, "top_k": 50},
    "min_p": {"counts": 8, "min_p": 0.1},
    "top_p": {"counts": 8, "top_p": 0.95},
    "all filters, of sequences": {"counts": 8, **_OWN},
}


def step(num_tokens: int = 50257, **options: Any) -> object:
    """A call of ``demask_step`` on bfloat16 logits."""
    ids, is_masked = _empty(2, 16, dtype=torch.int64), _empty(2, 16, dtype=torch.bool)
    logits = _empty(2, 16, num_tokens, dtype=torch.bfloat16)
    return F.demask_step(logits, ids, is_masked, mask_id=7, step=_STEP, backend="triton", **_DRAWS, **options)


PROGRAMS: dict[str, dict[str, Program]] = {
    "mask_sampling": _mask_sampling(),
    "masked_cross_entropy": _masked_cross_entropy(),
    "sample_tokens": _sample_tokens(),
    "vocabulary_filter": _vocabulary_filter(),
    "remask": _remasking(),
    "select_at_random": _selecting_at_random(),
}
