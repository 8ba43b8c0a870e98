"""What the demo learns: digits, or the characters of a text."""

from __future__ import annotations

import math
import pathlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fastmask import data
from fastmask.demo.refusals import Refused

SIDE = 8
GREY_LEVELS = 5
VALUE_RANGE = (0.0, 16.0)
HELD_OUT_DIGITS = 297
TEXT_LENGTH = 64
MAX_HELD_OUT = 512  # windows of text: a longer evaluation would take longer than the training


@dataclass(frozen=True)
class Task:
    """Clean sequences to learn, sequences held out, and the law of one token on its own (nats)."""

    train: Dataset[Tensor]
    held_out: Tensor
    num_tokens: int
    seq_len: int
    independent: float
    row_length: int | None
    characters: str = ""

    @property
    def mask_id(self) -> int:
        return self.num_tokens - 1


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1500, 64] and labels, held-out images [297, 64] and labels; float32 in [0, 16]."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float(), labels[order]
    cut = HELD_OUT_DIGITS
    return images[cut:], labels[cut:], images[:cut], labels[:cut]


def digit_ids(images: Tensor) -> data.TokenSequences:
    return data.from_images(images, levels=GREY_LEVELS, value_range=VALUE_RANGE)


def stack(dataset: Any) -> Tensor:
    """All items of a data set, [S, N] int64."""
    return torch.stack([dataset[i] for i in range(len(dataset))])


def digits_task() -> Task:
    """The digits as sequences of 64 grey levels."""
    train_images, _, held_out_images, _ = load_digits()
    train, held_out = digit_ids(train_images), digit_ids(held_out_images)
    train_ids, held_out_ids = stack(train), stack(held_out)
    one_hot = nn.functional.one_hot(train_ids, GREY_LEVELS)
    frequencies = (one_hot.sum(dim=0) + 1.0) / (len(train_ids) + GREY_LEVELS)  # of each level at each pixel
    independent = -frequencies.log().expand(len(held_out_ids), -1, -1).gather(-1, held_out_ids[..., None])
    return Task(train, held_out_ids, GREY_LEVELS + 1, SIDE * SIDE, float(independent.mean()), SIDE)


def text_task(path: pathlib.Path) -> Task:
    """The characters of a text, in windows; the last tenth of the windows is held out."""
    text = read_text(path)
    if len(text) < 20 * TEXT_LENGTH:
        raise Refused(
            f"expected a text of at least {20 * TEXT_LENGTH} characters, received {path} with {len(text)}; "
            "give a longer one"
        )
    characters = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(characters)}
    windows = data.TokenWindows(
        [index[character] for character in text],
        TEXT_LENGTH,
        num_tokens=len(characters) + 1,
        mask_id=len(characters),
        tail="drop",
    )
    cut = len(windows) - len(windows) // 10
    train = Subset(windows, range(cut))
    held_out = stack(Subset(windows, range(cut, min(len(windows), cut + MAX_HELD_OUT))))
    counts = Counter(stack(train).flatten().tolist())
    total = sum(counts.values()) + len(characters)
    log_frequency = torch.tensor([math.log((counts[i] + 1) / total) for i in range(len(characters))])
    independent = float(-log_frequency[held_out].mean())
    return Task(train, held_out, len(characters) + 1, TEXT_LENGTH, independent, None, characters)


def read_text(path: pathlib.Path) -> str:
    """A text, line ends as they are."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
    except OSError as error:
        raise Refused(
            f"expected --text to name a text file, received {path} ({error.strerror}); give another"
        ) from error
    except UnicodeDecodeError as error:
        raise Refused(f"expected UTF-8 in {path}, received {error}; convert the file") from error
    if "\0" in text:
        raise Refused(f"expected text in {path}, received a NUL at character {text.index(chr(0))}; it is binary")
    return text
