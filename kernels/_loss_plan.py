"""How rows of a loss are spread over the programs of a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastmask.kernels._launch import Hardware, cdiv, next_power_of_2
from fastmask.kernels._logit_rows import VECTOR_BYTES
from fastmask.records import LossOptions

# Columns that a warp has of a tile: as many as its registers hold beside those of the next tile, which is asked for
# before; and where every element costs more (softcap, label smoothing), where what is computed takes the registers.
_COLUMNS, _COSTLY_COLUMNS = 1024, 256
# As many threads as a multiprocessor's registers hold, in at most so many programs, of which some load while some
# reduce; in fewer where the rows in flight would not fit the L2, from which the gradient reads them again.
_THREADS, _MOST_PROGRAMS = 512, 4
# Of each of these threads, on NVIDIA's: unless told, the compiler takes up to a fourth more.
_MOST_REGISTERS = 65536 // _THREADS
# Rows for each multiprocessor below which some would be idle. Of those, rows longer than this are spread over several
# programs, by a launch more, in smaller tiles, the longest of which takes less time.
_FEW_ROWS, _SPLIT_FROM = 1, 8192
_SPLIT_WARPS, _SPLIT_COLUMNS = 8, 512
# Up to so many columns a program, one warp, does several rows: at most so many, since each thread holds some facts of
# all of them, and as many columns as above.
_SHORT, _SHORT_ROWS = 256, 8


class Plan(NamedTuple):
    """How rows are spread over programs.

    block_v: columns of a tile. rows: that a program does, each of one tile; None where it does one row, or one of
    num_pieces pieces of a row, tiles_per_piece tiles each. arguments: what its kernels are launched with.
    """

    block_v: int
    num_warps: int
    rows: int | None
    num_pieces: int
    tiles_per_piece: int
    arguments: dict[str, int]


def pieces_of_a_row(
    num_rows: int, vocabulary: int, dtype: torch.dtype, options: LossOptions, hardware: Hardware
) -> int:
    """Of the plan; of short rows told without a question about their number, which torch.compile would guard."""
    return 0 if vocabulary <= _SHORT else plan(num_rows, vocabulary, dtype, options, hardware).num_pieces


def plan(num_rows: int, vocabulary: int, dtype: torch.dtype, options: LossOptions, hardware: Hardware) -> Plan:
    """The launch plan of logits [num_rows, vocabulary]; the pieces are the same with and without the argmax."""
    is_costly = options.softcap is not None or options.label_smoothing != 0.0
    columns = _COSTLY_COLUMNS if is_costly else _COLUMNS
    if vocabulary <= _SHORT:
        return _of_short_rows(num_rows, vocabulary, columns, hardware)
    num_multiprocessors, warp_size = hardware.num_multiprocessors, hardware.warp_size
    vector = VECTOR_BYTES // dtype.itemsize
    if num_rows < _FEW_ROWS * num_multiprocessors and vocabulary > _SPLIT_FROM:
        block_v, num_warps = _SPLIT_WARPS * min(columns, _SPLIT_COLUMNS), _SPLIT_WARPS
        num_tiles = cdiv(vocabulary, block_v)
        tiles_per_piece = cdiv(num_tiles, cdiv(_MOST_PROGRAMS * num_multiprocessors, max(1, num_rows)))
        num_pieces = cdiv(num_tiles, tiles_per_piece)
    else:
        # 2^k + 1 columns, of codes and a mask, take a tile of 2^k: the others are a row's edges wherever it begins.
        tile = next_power_of_2(max(vocabulary - vector + 1, warp_size))
        rows_in_l2 = hardware.l2_bytes // (num_multiprocessors * vocabulary * dtype.itemsize)
        num_programs = next(programs for programs in (_MOST_PROGRAMS, 2, 1) if programs <= max(1, rows_in_l2))
        num_warps = min(cdiv(tile, columns), _THREADS // (warp_size * num_programs))
        block_v = min(tile, num_warps * columns)
        num_pieces, tiles_per_piece = 1, cdiv(vocabulary, block_v)
    arguments = {
        "BLOCK_V": block_v,
        "num_warps": num_warps,
        "tiles_per_piece": tiles_per_piece,
        "LANES": num_warps * warp_size,
        "VECTOR": vector,
    }
    if hardware.vendor == "nvidia" and num_pieces == 1:
        arguments["maxnreg"] = _MOST_REGISTERS
    return Plan(block_v, num_warps, None, num_pieces, tiles_per_piece, arguments)


def _of_short_rows(num_rows: int, vocabulary: int, columns: int, hardware: Hardware) -> Plan:
    block_v = next_power_of_2(vocabulary)
    rows = min(_SHORT_ROWS, columns // block_v)
    while rows > 1 and num_rows < _FEW_ROWS * hardware.num_multiprocessors * rows:
        rows //= 2
    return Plan(block_v, 1, rows, 0, 0, {"BLOCK_V": block_v, "ROWS": rows, "num_warps": 1})
