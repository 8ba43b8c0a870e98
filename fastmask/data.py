"""Data sets of clean token ids, every item exactly `seq_len` long, for `torch.utils.data.DataLoader`.

An item is read and checked when it is asked for: an id outside [0, num_tokens) or equal to mask_id is
refused with its position and value. Nothing is padded, truncated or dropped unless asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmask import _check_data as check
from fastmask._progress import Progress, track

if TYPE_CHECKING:  # at run time numpy is needed only by those who bring an array or open a file
    import numpy as np

__all__ = ["TokenSequences", "TokenWindows", "dequantise", "from_images", "from_text", "open_ids", "validate"]


class _TokenDataset(Dataset[Tensor]):
    """What both data sets share: how an item is counted, checked and pickled."""

    ids: Any

    def __init__(self, seq_len: int, num_tokens: int, mask_id: int) -> None:
        self.seq_len = check.integer("seq_len", seq_len, at_least=1)
        self.num_tokens, self.mask_id = check.vocabulary(num_tokens, mask_id)

    def __len__(self) -> int:
        raise NotImplementedError

    def _read(self, index: int) -> tuple[Any, str, int]:
        """The raw ids of an item; for errors, where they lie and the position of the first."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Tensor:
        """The ids of one item: a new tensor [seq_len] int64. Negative indices count from the end."""
        index, size = check.integer("index", index), len(self)
        if not -size <= index < size:
            raise IndexError(f"expected an index in [{-size}, {size}), received {index}; use len(dataset)")
        raw, where, first = self._read(index % size)
        return check.clean_ids(raw, self.num_tokens, self.mask_id, where, first)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked gets a pickle: the name of a mapped file must travel, not its contents.
        return {**self.__dict__, "ids": _place_in_file(self.ids) or self.ids}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.ids, _Mapped):
            self.ids = self.ids.open()


class TokenWindows(_TokenDataset):
    """Windows of `seq_len` ids out of one run of ids; item i is ids[i * stride : i * stride + seq_len].

    Opening reads no id, and an item reads its own only. With stride < seq_len windows overlap; with
    stride > seq_len the stride - seq_len ids after each window are skipped, as asked. The tail is what
    lies after the last window (and its gap): too few ids for one more.

    Args:
        ids: [T], any integer dtype: array, memory map or tensor (none is copied), or list of int.
        seq_len: ids in a window, the network's max_seq_len.
        num_tokens: size of the vocabulary, the mask included.
        mask_id: id of the mask, in [0, num_tokens); no clean id may equal it.
        stride: ids from one window's start to the next's; seq_len by default.
        tail: "error" refuses ids with a tail; "drop" leaves the tail out.

    Raises:
        TypeError: ids are not integers; a size or an index is not an int.
        ValueError: ids not [T] or fewer than seq_len; a tail, under "error"; a size or mask_id out of range.
            From an item: an id out of range or equal to mask_id.
        IndexError: from an item, past either end.

    Example:
        >>> windows = TokenWindows([5, 3, 0, 1, 2, 4, 4], 3, num_tokens=8, mask_id=7, tail="drop")
        >>> [window.tolist() for window in windows]
        [[5, 3, 0], [1, 2, 4]]
    """

    def __init__(
        self,
        ids: Any,
        seq_len: int,
        *,
        num_tokens: int,
        mask_id: int,
        stride: int | None = None,
        tail: Literal["error", "drop"] = "error",
    ) -> None:
        super().__init__(seq_len, num_tokens, mask_id)
        self.ids = check.integers("ids", ids, ndim=1)
        self.stride = self.seq_len if stride is None else check.integer("stride", stride, at_least=1)
        if not isinstance(tail, str) or tail not in ("error", "drop"):
            raise ValueError(f'expected tail "error" or "drop", received {tail!r}; give one of the two')
        total = len(self.ids)
        if total < self.seq_len:
            raise ValueError(
                f"expected at least seq_len = {seq_len} ids, received {total}; give more, or shorten seq_len"
            )
        self._size = (total - self.seq_len) // self.stride + 1
        used = max((self._size - 1) * self.stride + self.seq_len, self._size * self.stride)
        if tail == "error" and total > used:
            raise ValueError(
                f"expected ids that end with a window of {seq_len} at stride {self.stride}, received {total} "
                f'ids, of which the last {total - used} fill none; tail="drop" leaves them out, or pad or '
                "cut the ids"
            )

    def __len__(self) -> int:
        return self._size

    def _read(self, index: int) -> tuple[Any, str, int]:
        start = index * self.stride
        return self.ids[start : start + self.seq_len], "", start


class TokenSequences(_TokenDataset):
    """Sequences already cut, each exactly `seq_len` long; item i is sequences[i].

    Args:
        sequences: [S, seq_len], any integer dtype: array, memory map or tensor (none is copied), or an
            iterable of S sequences (lists; a Hugging Face column), read into a tensor at once. S may be 0.
        seq_len, num_tokens, mask_id: as for TokenWindows.

    Raises:
        TypeError, ValueError, IndexError: as TokenWindows; and ValueError for a sequence of another length.

    Example:
        >>> TokenSequences([[5, 3, 0], [1, 2, 4]], 3, num_tokens=8, mask_id=7)[-1]
        tensor([1, 2, 4])
    """

    def __init__(self, sequences: Any, seq_len: int, *, num_tokens: int, mask_id: int) -> None:
        super().__init__(seq_len, num_tokens, mask_id)
        if hasattr(sequences, "dtype"):
            self.ids = check.integers("sequences", sequences, ndim=2)
            self._refuse_length(self.ids.shape[1], "every sequence")
            return
        rows = []
        for i, sequence in enumerate(sequences):
            row = check.integers(f"sequence {i}", sequence, ndim=1)
            self._refuse_length(len(row), f"sequence {i}")
            check.refuse_wrapping(row, f"sequence {i}, ")
            rows.append(check.int64(row))
        self.ids = torch.stack(rows) if rows else torch.empty(0, self.seq_len, dtype=torch.int64)

    def _refuse_length(self, length: int, name: str) -> None:
        if length != self.seq_len:
            raise ValueError(
                f"expected {name} to hold seq_len = {self.seq_len} ids, received {length}; pad or cut the "
                "sequences, or join them for TokenWindows"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def _read(self, index: int) -> tuple[Any, str, int]:
        return self.ids[index], f"sequence {index}, ", 0


def open_ids(path: str | os.PathLike[str], dtype: Any = None) -> np.ndarray[Any, Any]:
    """A file of ids as a read-only memory map, which opens at once whatever its size (needs numpy).

    Args:
        path: .npy as numpy.save writes it, or a bare file: one id after the other and nothing else.
        dtype: of a bare file, such as "uint16". A .npy holds its own.

    Returns:
        numpy array in the file's shape, for TokenWindows [T] or TokenSequences [S, N]; a bare file is [T].

    Raises:
        ImportError: no numpy. OSError: the file cannot be read. TypeError: dtype is not an integer's.
        ValueError: dtype missing, or given for .npy; the size is 0 or no multiple of the dtype's.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "train.bin")
        ...     _ = path.write_bytes(bytes([1, 0, 2, 0, 3, 0, 4, 0]))
        ...     TokenWindows(open_ids(path, "<u2"), 4, num_tokens=10, mask_id=9)[0]
        tensor([1, 2, 3, 4])
    """
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError("expected numpy, which maps files, received none; pip install numpy") from error
    if os.fspath(path).endswith(".npy"):
        if dtype is not None:
            raise ValueError(f"expected no dtype for {path}, received {dtype}; a .npy holds its own")
        mapped: np.ndarray[Any, Any] = np.load(path, mmap_mode="r")
        return mapped
    if dtype is None:
        raise ValueError(f'expected the dtype of the ids in {path}, received None; give it, such as "uint16"')
    if np.dtype(dtype).kind not in ("i", "u"):  # the bytes of a file are no Python objects: to read one is a crash
        raise TypeError(
            f'expected an integer dtype for {path}, received {np.dtype(dtype)}; give it, such as "uint16"'
        )
    size, width = os.path.getsize(path), np.dtype(dtype).itemsize
    if size == 0 or size % width:
        raise ValueError(
            f"expected {path} to hold ids of {width} bytes, one at least, received {size} bytes; give the "
            "dtype it was written with, or write it again"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def from_text(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: Any,
    seq_len: int,
    *,
    num_tokens: int,
    mask_id: int,
    stride: int | None = None,
    tail: Literal["error", "drop"] = "error",
) -> TokenWindows:
    """Windows of the ids of one or more text files, joined in the order given.

    The tokenizer is called once a file, with the whole text (UTF-8, line ends untouched), so no token is
    cut and a Hugging Face tokenizer puts its special tokens around each file, once; without any:
    `functools.partial(tokenizer, add_special_tokens=False)`. Windows run on across files. A file must fit
    in memory; tokenise a larger corpus once, into a file for `open_ids`.

    Args:
        paths: one file or several.
        tokenizer: of transformers or tokenizers; or a function from str to ids; or an object with encode.
        seq_len, num_tokens, mask_id, stride, tail: as for TokenWindows.

    Raises:
        TypeError: not a path; not a tokenizer, or its result is not integers. OSError: a file cannot be read.
        ValueError: not UTF-8; an id out of range or equal to mask_id, anywhere; and as TokenWindows.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "hamlet.txt")
        ...     _ = path.write_text("to be or not")
        ...     data = from_text(path, str.encode, 6, num_tokens=257, mask_id=256)  # bytes as ids
        >>> bytes(data[1].tolist())
        b'or not'
    """
    num_tokens, mask_id = check.vocabulary(num_tokens, mask_id)
    dtype = torch.int32 if num_tokens <= 2**31 else torch.int64
    parts = [torch.empty(0, dtype=dtype)]
    if isinstance(paths, (bytes, int)) or not isinstance(paths, (str, os.PathLike, Iterable)):
        raise TypeError(f"expected paths as a path or several, received {type(paths).__name__}; give a str or a Path")
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        if not isinstance(path, (str, os.PathLike)):  # to open() an int is a file that is open already
            raise TypeError(f"expected paths to name files, received {path!r} among them; give a str or a Path")
        try:
            with open(path, encoding="utf-8", newline="") as file:
                text = file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"expected UTF-8 in {path}, received {error}; convert the file") from error
        ids = check.integers(f"ids of {path}", _encode(tokenizer, text), ndim=1)
        parts.append(check.clean_ids(ids, num_tokens, mask_id, f"{path}, ", 0).to(dtype))
    joined = torch.cat(parts)
    return TokenWindows(joined, seq_len, num_tokens=num_tokens, mask_id=mask_id, stride=stride, tail=tail)


def from_images(images: Any, *, levels: int, value_range: tuple[float, float]) -> TokenSequences:
    r"""Images as sequences of levels, the values of each in C order; the mask is the first free id.

    .. math::
        \mathrm{id} = \mathrm{round}\left(\frac{\mathrm{value} - \mathrm{low}}{\mathrm{high} - \mathrm{low}}
        (\mathrm{levels} - 1)\right)

    halves to the even id, so the levels are evenly spaced and both ends are levels: the integers 0 to 16 are
    kept exactly by levels=17 and value_range=(0, 16), bytes by 256 and (0, 255). `dequantise` is the inverse.

    Args:
        images: [S, ...] any real dtype, S >= 1: array, tensor, or sequence of images of one shape.
        levels: >= 2.
        value_range: (low, high), finite, low < high.

    Returns:
        TokenSequences with mask_id = levels, num_tokens = levels + 1 and seq_len = values in an image; held
        in memory in one byte a value (four above 256 levels).

    Raises:
        TypeError: values not real, or levels not an int.
        ValueError: no image; images of several shapes; a value outside value_range, infinite or NaN; integers past
            2**53, which float64 rounds; a bad argument, levels above 2**31 among them.

    Example:
        >>> data = from_images(torch.tensor([[[0.0, 1.0], [0.5, 0.2]]]), levels=3, value_range=(0, 1))
        >>> data[0], data.seq_len, data.num_tokens, data.mask_id
        (tensor([0, 2, 1, 0]), 4, 4, 3)
    """
    levels, low, high = check.scale(levels, value_range)
    if not hasattr(images, "__len__") or isinstance(images, (str, bytes, Mapping)):
        raise TypeError(
            f"expected images as an array, tensor or sequence, received {type(images).__name__}; give a list of them"
        )
    if isinstance(images, Tensor):
        check.refuse_sparse("images", images)
    if getattr(images, "ndim", 1) == 0:
        raise ValueError("expected images of shape [S, ...], received a single value; give a batch of images")
    if len(images) == 0:
        raise ValueError("expected at least one image, received none; their shape gives the sequence length")
    shape = check.image(images[0], 0).shape
    if shape.numel() == 0:
        raise ValueError(f"expected images that hold values, received shape {tuple(shape)} as image 0; leave it out")
    ids = torch.empty(len(images), shape.numel(), dtype=torch.uint8 if levels <= 256 else torch.int32)
    for i in range(len(images)):  # one by one: the float64 copy of a whole set could be too large
        image = check.image(images[i], i)
        if image.shape != shape:
            raise ValueError(
                f"expected images of one shape, {tuple(shape)} as image 0, received {tuple(image.shape)} as "
                f"image {i}; resize or crop the images"
            )
        # Floats are compared in their own dtype: float32(0.1), a little above 0.1, lies in (0, 0.1). An end past what
        # the dtype holds is infinite there, and the values are finite all the same.
        values = image if image.is_floating_point() else image.double()
        outside = ~((values >= low) & (values <= high) & values.isfinite())
        remedy = "give the value_range of the data, or clamp the values"
        check.refuse(outside, image, f"values in [{low:g}, {high:g}]", remedy, f"image {i}, ")
        if not image.is_floating_point():
            rounded = values.abs() >= 2**53
            check.refuse(
                rounded, image, "integers below 2**53, which float64 holds", "scale them down", f"image {i}, "
            )
        scaled = (values.double() - low) / (high - low) * (levels - 1)
        # An end rounded to a coarse dtype may lie past it: 100.4 is 100.5 in bfloat16.
        ids[i] = scaled.round().clamp(0, levels - 1).flatten()
    return TokenSequences(ids, ids.shape[1], num_tokens=levels + 1, mask_id=levels)


def dequantise(ids: Tensor, *, levels: int, value_range: tuple[float, float]) -> Tensor:
    r"""The values of levels, to draw the images of `from_images` again, right to half a level.

    .. math::
        \mathrm{value} = \mathrm{low} + \mathrm{id} \, \frac{\mathrm{high} - \mathrm{low}}{\mathrm{levels} - 1}

    Args:
        ids: any shape, any integer dtype, in [0, levels).
        levels, value_range: those of `from_images`.

    Returns:
        float32, the shape and device of ids; reshape it to the shape of the images.

    Raises:
        TypeError: ids are not integers. ValueError: an id outside [0, levels), such as the mask; a value_range past
            float32's.

    Example:
        >>> dequantise(torch.tensor([0, 1, 2]), levels=3, value_range=(0, 1))
        tensor([0.0000, 0.5000, 1.0000])
    """
    levels, low, high = check.scale(levels, value_range)
    if max(-low, high) > torch.finfo(torch.float32).max:
        raise ValueError(f"expected value_range that float32 holds, received {value_range}; scale the values down")
    raw = check.integers("ids", ids)
    ids = check.int64(raw)
    remedy = "give the levels the images were quantised to, and no masked ids"
    check.refuse((ids < 0) | (ids >= levels), raw, f"ids in [0, {levels})", remedy)
    steps = torch.arange(levels, dtype=torch.float64)  # on the CPU: MPS has no float64
    return (low + steps * (high - low) / (levels - 1)).float().to(ids.device)[ids]


def validate(dataset: _TokenDataset, *, progress: Progress = True) -> None:
    """Reads every item of a data set once, so that a bad id is found before training, not during it.

    Args:
        dataset: TokenWindows or TokenSequences.
        progress: True for a tqdm bar where tqdm is installed, False for nothing, or a function of (items
            done, items in all), called about a hundred times.

    Raises:
        TypeError: another kind of data set, whose items check nothing.
        ValueError: the first bad id, with its position and value.

    Example:
        >>> validate(TokenWindows(torch.arange(6), 3, num_tokens=8, mask_id=7), progress=print)
        1 2
        2 2
    """
    if not isinstance(dataset, _TokenDataset):
        raise TypeError(
            f"expected TokenWindows or TokenSequences, received {type(dataset).__name__}; validate the whole "
            "set before it is split, joined or wrapped"
        )
    for item in track(len(dataset), progress, "validate"):
        _ = dataset[item]


@dataclass(frozen=True)
class _Mapped:
    """The place in a file of a view of a memory map: what is pickled instead of the ids."""

    path: str
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def open(self) -> np.ndarray[Any, Any]:
        import numpy as np

        file = np.memmap(self.path, dtype=np.uint8, mode="r")
        ids: np.ndarray[Any, Any] = np.ndarray(self.shape, self.dtype, file, self.offset, self.strides)
        return ids


def _place_in_file(ids: Any) -> _Mapped | None:
    """The place of `ids` in its file; None where `ids` is not, or not only, a file's contents."""
    if isinstance(ids, Tensor):
        return None
    import numpy as np

    root = ids
    while isinstance(getattr(root, "base", None), np.ndarray):
        root = root.base
    # Mode "c" keeps what was written out of the file; a map of an open file object may have no name.
    if not isinstance(root, np.memmap) or root.filename is None or root.mode == "c":
        return None
    offset = root.offset + ids.ctypes.data - root.ctypes.data  # ids.offset is its parent's, in a slice
    return _Mapped(str(root.filename), offset, ids.dtype, ids.shape, ids.strides)


def _encode(tokenizer: Any, text: str) -> Any:
    encode = tokenizer if callable(tokenizer) else getattr(tokenizer, "encode", None)
    if encode is None:
        raise TypeError(
            f"expected a tokenizer that can be called or has encode, received {type(tokenizer).__name__}; "
            "give a function from str to ids"
        )
    encoded = encode(text)
    if isinstance(encoded, Mapping):  # BatchEncoding of transformers
        encoded = encoded.get("input_ids")
    return getattr(encoded, "ids", encoded)  # Encoding of tokenizers
