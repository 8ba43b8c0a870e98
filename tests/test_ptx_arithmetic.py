"""The PTX machine (``tests/ptx/``) by itself: what its statements compute, on PTX written by hand."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from ptx.by_hand import each
from ptx.driver import packed

INTEGERS = np.array([0, 1, -1, 7, -8, 31, 32, 33, 2**31 - 1, -(2**31), 12345, -54321], np.int32)
FLOATS = np.array(
    [0.0, -0.0, 1.0, -1.5, 2.5, 3.5, 1e-40, 1e38, 3e38, np.inf, -np.inf, np.nan, 1 / 3, -2 / 3, 1e-7, 16777217.0],
    np.float32,
)


def pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some two of them in each thread."""
    first, second = zip(*itertools.product(values, values), strict=True)
    order = np.random.default_rng(0).permutation(len(first))[:32]
    return np.array(first)[order], np.array(second)[order]


def test_integers_wrap_shift_and_divide_as_in_c():
    a, b = pairs(INTEGERS)
    wide = a.astype(np.int64) * b
    assert (each("add.s32 %o, %a, %b;", a, b, out=np.int32) == (a.astype(np.int64) + b).astype(np.int32)).all()
    assert (each("mul.lo.s32 %o, %a, %b;", a, b, out=np.int32) == wide.astype(np.int32)).all()
    assert (each("mul.hi.s32 %o, %a, %b;", a, b, out=np.int32) == wide >> 32).all()
    assert (each("mul.wide.s32 %o, %a, %b;", a, b, out=np.int64) == wide).all()
    unsigned = a.view(np.uint32).astype(np.uint64) * b.view(np.uint32)
    assert (each("mul.hi.u32 %o, %a, %b;", a, b, out=np.uint32) == unsigned >> np.uint64(32)).all()
    high = [int(x) * int(y) >> 64 for x, y in zip(wide.tolist(), wide[::-1].tolist(), strict=True)]
    assert each("mul.hi.s64 %o, %a, %b;", wide, wide[::-1].copy(), out=np.int64).tolist() == high
    b = np.where(b == 0, 3, b).astype(np.int32)
    quotient = [int(Fraction(int(x), int(y))) for x, y in zip(a, b, strict=True)]  # toward zero
    assert (each("div.s32 %o, %a, %b;", a, b, out=np.int32) == np.array(quotient).astype(np.int32)).all()
    rest = [int(x) - q * int(y) for x, y, q in zip(a, b, quotient, strict=True)]
    assert each("rem.s32 %o, %a, %b;", a, b, out=np.int32).tolist() == rest
    amount = np.arange(32, dtype=np.uint32) * 3  # up to 93
    assert each("shl.b32 %o, %a, %b;", a, amount, out=np.uint32).tolist() == [
        (int(x) << int(s)) % 2**32 if s < 32 else 0 for x, s in zip(a, amount, strict=True)
    ]
    assert each("shr.s32 %o, %a, %b;", a, amount, out=np.int32).tolist() == [
        int(x) >> min(int(s), 31) for x, s in zip(a, amount, strict=True)
    ]
    assert each("shr.u32 %o, %a, %b;", a, amount, out=np.uint32).tolist() == [
        int(x) % 2**32 >> int(s) for x, s in zip(a, amount, strict=True)
    ]


def test_fields_and_bytes():
    a = np.array([0x0F1E2D3C, 0x81726354], np.uint32)
    assert each("bfe.u32 %o, %a, 4, 8;", a, out=np.uint32)[:2].tolist() == [0xD3, 0x35]
    assert each("bfe.s32 %o, %a, 24, 8;", a, out=np.int32)[:2].tolist() == [0x0F, 0x81 - 256]
    assert each("bfe.s32 %o, %a, 28, 8;", a, out=np.int32)[:2].tolist() == [0, -8]  # what there is of it
    assert each("bfe.s32 %o, %a, 23, 0;", a, out=np.int32)[:2].tolist() == [0, 0]
    assert each("prmt.b32 %o, %a, 0x11223344, 0x4770;", a, out=np.uint32)[0] == 0x4411113C
    assert each("prmt.b32 %o, %a, 0, 0xB888;", a, out=np.uint32)[1] == 0xFF000000
    assert each("popc.b32 %o, %a;", a, out=np.uint32)[:2].tolist() == [int(x).bit_count() for x in a]


def test_vectors_are_packed_low_bits_first():
    a = np.array([0x11112222], np.uint32)
    assert each("mov.b32 {%rs40, %rs41}, %a;\nmov.b32 %o, {%rs41, %rs40};", a, out=np.uint32)[0] == 0x22221111
    assert each("mov.b32 {_, %rs41}, %a;\ncvt.u32.u16 %o, %rs41;", a, out=np.uint32)[0] == 0x1111


def test_sums_and_products_round_once():
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal(32).astype(np.float32) for _ in range(3))
    c[:16] = -(a[:16] * b[:16])  # what remains is the product's own rounding error
    got = each("fma.rn.f32 %o, %a, %b, %c;", a, b, c, out=np.float32)
    for x, y, z, value in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        neighbours = [np.nextafter(value, np.float32(s)) for s in (-np.inf, np.inf)]
        assert all(abs(Fraction(float(value)) - exact) <= abs(Fraction(float(n)) - exact) for n in neighbours)


def test_a_fused_product_rounds_ties_by_what_float64_drops():
    a, b = np.float32([1 + 2**-12]), np.float32([1 + 2**-12])
    # a b = 1 + 2^-11 + 2^-24, a tie of float32 once 1 is added at 2^-48: below, at and above it.
    c = np.float32([-(2.0**-60), 0.0, 2.0**-60])
    got = each("fma.rn.f32 %o, %a, %b, %c;", np.repeat(a, 3), np.repeat(b, 3), c, out=np.float32)[:3]
    assert got.tolist() == [1 + 2**-11, 1 + 2**-11, 1 + 2**-11 + 2**-23]


def test_comparisons_and_extremes_of_nan():
    a, b = pairs(FLOATS)
    nan = np.isnan(a) | np.isnan(b)
    for name, is_so in (("lt", a < b), ("eq", a == b), ("ge", a >= b), ("ne", (a != b) & ~nan)):
        choose = "selp.b32 %o, 1, 0, %p1;"
        assert (each(f"setp.{name}.f32 %p1, %a, %b;\n{choose}", a, b, out=np.int32) == is_so).all()
        assert (each(f"setp.{name}u.f32 %p1, %a, %b;\n{choose}", a, b, out=np.int32) == (is_so | nan)).all()
    for name, is_so in (("num", ~nan), ("nan", nan)):
        assert (each(f"setp.{name}.f32 %p1, %a, %b;\n{choose}", a, b, out=np.int32) == is_so).all()
    zeros, others = np.float32([0, -0.0, 0, -0.0]), np.float32([0, 0, -0.0, -0.0])
    for name, signs, of_numbers, of_all in (
        ("min", [False, True, True, True], np.fmin, np.minimum),
        ("max", [False, False, False, True], np.fmax, np.maximum),
    ):
        for statement, expected in ((f"{name}.f32", of_numbers(a, b)), (f"{name}.NaN.f32", of_all(a, b))):
            assert np.array_equal(each(f"{statement} %o, %a, %b;", a, b, out=np.float32), expected, equal_nan=True)
            assert np.signbit(each(f"{statement} %o, %a, %b;", zeros, others, out=np.float32)[:4]).tolist() == signs
    unsigned = each(
        "setp.lt.u32 %p1, %a, %b;\nselp.b32 %o, 1, 0, %p1;", a.view(np.int32), b.view(np.int32), out=np.int32
    )
    assert (unsigned == (a.view(np.uint32) < b.view(np.uint32))).all()


def test_conversions():
    x = torch.from_numpy(FLOATS)
    for dtype in (torch.bfloat16, torch.float16):
        name = "bf16" if dtype == torch.bfloat16 else "f16"
        got = each(f"cvt.rn.{name}.f32 %o, %a;", FLOATS, out=np.uint16)[: len(FLOATS)]
        numbers = torch.from_numpy(got.view(np.int16)).view(dtype)
        assert torch.equal(numbers.nan_to_num(7.0), x.to(dtype).nan_to_num(7.0))
        back = each(f"cvt.f32.{name} %o, %a;", got, out=np.float32)[: len(FLOATS)]
        assert np.array_equal(back, x.to(dtype).float().numpy(), equal_nan=True)
        halves = each(f"cvt.rn.{name}x2.f32 %o, %a, 0f3F800000;", FLOATS, out=np.uint32)[: len(FLOATS)]
        assert (halves & 0xFFFF == {"bf16": 0x3F80, "f16": 0x3C00}[name]).all()
        assert (halves >> 16 == got).all()
    numbers = np.float32([1e20, -1e20, np.nan, 2.9, -2.9, np.inf])
    limits = np.iinfo(np.int64)
    assert each("cvt.rzi.s64.f32 %o, %a;", numbers, out=np.int64)[:6].tolist() == [
        limits.max, limits.min, limits.min, 2, -2, limits.max,
    ]  # fmt: skip
    assert each("cvt.rzi.s32.f32 %o, %a;", numbers, out=np.int32)[:4].tolist() == [2**31 - 1, -(2**31), 0, 2]
    assert each("cvt.rmi.f32.f32 %o, %a;", numbers, out=np.float32)[3:5].tolist() == [2.0, -3.0]
    assert each("cvt.u32.u64 %o, %a;", np.array([2**40 + 5], np.uint64), out=np.uint32)[0] == 5
    assert each("cvt.s64.s32 %o, %a;", np.array([-3], np.int32), out=np.int64)[0] == -3


def test_approximate_functions_err_but_no_further_than_the_manual_allows():
    x = np.random.default_rng(0).uniform(-20, 20, (64, 32)).astype(np.float32)
    for statement, exact in (
        ("ex2.approx.ftz.f32 %o, %a;", np.exp2(x.astype(np.float64))),
        ("rcp.approx.ftz.f32 %o, %a;", 1 / x.astype(np.float64)),
        ("div.full.f32 %o, 0f3F800000, %a;", 1 / x.astype(np.float64)),
        ("abs.f32 %r40, %a;\nlg2.approx.ftz.f32 %o, %r40;", np.log2(np.abs(x).astype(np.float64))),
        ("abs.f32 %r40, %a;\nsqrt.approx.ftz.f32 %o, %r40;", np.sqrt(np.abs(x).astype(np.float64))),
    ):
        got = np.stack([each(statement, row, out=np.float32) for row in x])
        units = np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32))
        assert 0.9 < units.max() < 2.0
        assert 0.2 < units.mean() < 0.6
    assert each("ex2.approx.ftz.f32 %o, %a;", np.float32([0, 3, -np.inf]), out=np.float32)[:3].tolist() == [1, 8, 0]
    assert each("ex2.approx.ftz.f32 %o, %a;", np.float32([-130]), out=np.float32)[0] == 0  # flushed
    extremes = np.float32([1e-39, 3e38])  # whose reciprocals overflow, or lose bits
    assert np.abs(each("div.full.f32 %o, %a, %a;", extremes, out=np.float32)[:2] - 1).max() < 2e-7


def test_arithmetic_gives_one_nan():
    a, b = np.float32([np.inf, -np.nan, 0.0]), np.float32([np.inf, 1.0, np.inf])
    for statement in ("sub.f32 %o, %a, %b;", "mul.f32 %o, %a, %b;"):
        bits = each(statement, a, b, out=np.float32)[:3].view(np.uint32)
        assert (bits[np.isnan(bits.view(np.float32))] == 0x7FFFFFFF).all()


def test_integers_compare_and_combine():
    a, b = pairs(INTEGERS)
    unsigned = a.view(np.uint32), b.view(np.uint32)
    choose = "selp.b32 %o, 1, 0, %p1;"
    for names, operator in (
        ("eq.s32", np.equal), ("ne.s32", np.not_equal), ("lt.s32", np.less), ("le.s32", np.less_equal),
        ("gt.s32", np.greater), ("ge.s32", np.greater_equal),
    ):  # fmt: skip
        b[:2] = a[:2]
        assert (each(f"setp.{names} %p1, %a, %b;\n{choose}", a, b, out=np.int32) == operator(a, b)).all()
    for name, operator in (("lt", np.less), ("le", np.less_equal), ("gt", np.greater), ("ge", np.greater_equal)):
        assert (each(f"setp.{name}.u32 %p1, %a, %b;\n{choose}", a, b, out=np.int32) == operator(*unsigned)).all()
    for name, expected in (
        ("sub.s32", a - b), ("and.b32", a & b), ("or.b32", a | b), ("xor.b32", a ^ b), ("min.s32", np.minimum(a, b)),
        ("max.s32", np.maximum(a, b)),
    ):  # fmt: skip
        assert (each(f"{name} %o, %a, %b;", a, b, out=np.int32) == expected).all()
    for name, expected in (("not.b32", ~a), ("neg.s32", -a), ("abs.s32", np.abs(a))):
        assert (each(f"{name} %o, %a;", a, out=np.int32) == expected).all()
    b = np.where(b == 0, 3, b).astype(np.int32)
    quotient = each("div.u32 %o, %a, %b;", a, b, out=np.uint32)
    assert (quotient == unsigned[0] // b.view(np.uint32)).all()


def test_numbers_of_64_bits_shift_by_up_to_63():
    a, amounts = np.array([-(2**62) - 12345], np.int64), [3 * i for i in range(32)]
    amount, number = np.array(amounts, np.uint32), int(a[0])
    assert each("shr.s64 %o, %a, %b;", a, amount, out=np.int64).tolist() == [number >> s for s in amounts]
    assert each("shr.u64 %o, %a, %b;", a, amount, out=np.uint64).tolist() == [number % 2**64 >> s for s in amounts]
    assert each("shl.b64 %o, %a, %b;", a, amount, out=np.uint64).tolist() == [number * 2**s % 2**64 for s in amounts]


def test_predicates_join_come_in_pairs_and_guard():
    a = np.arange(32, dtype=np.int32)
    low, even = a < 9, a % 2 == 0
    first = "setp.lt.s32 %p1, %a, 9;\nand.b32 %r40, %a, 1;\n"
    choose = "selp.b32 %o, 1, 0, %p2;"
    for name, expected in (("and", low & even), ("or", low | even), ("xor", low ^ even)):
        got = each(f"{first}setp.eq.{name}.s32 %p2, %r40, 0, %p1;\n{choose}", a, out=np.int32)
        assert (got == expected).all()
    assert (each(f"{first}mov.b32 %o, 5;\n@%p1 mov.b32 %o, 6;", a, out=np.int32) == np.where(low, 6, 5)).all()
    assert (each(f"{first}mov.b32 %o, 5;\n@!%p1 mov.b32 %o, 6;", a, out=np.int32) == np.where(low, 5, 6)).all()
    # bfloat16 in pairs: 1.0 < 2.0 in the low halves, -1.0 < -2.0 in the high ones.
    pair = "mov.b32 %r40, 0xBF803F80;\nmov.b32 %r41, 0xC0004000;\nsetp.lt.bf16x2 %p1|%p2, %r40, %r41;\n"
    for predicate, expected in (("%p1", 1), ("%p2", 0)):
        assert (each(f"{pair}selp.b32 %o, 1, 0, {predicate};", a, out=np.int32) == expected).all()
    negative = "mov.b32 {%rs40, %rs41}, 0xBF80C000;\nsetp.lt.bf16 %p2, %rs40, %rs41;\n"
    assert (each(negative + choose, a, out=np.int32) == 1).all()


def test_rounding_is_to_even_and_integers_of_floats_are_as_told():
    bits = [0x3F808000, 0x3F818000, 0xBF818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x7F800001, 0x7FFFFFFF]
    x = np.array(bits, np.uint32).view(np.float32)
    got = each("cvt.rn.bf16.f32 %o, %a;", x, out=np.uint16)[: len(x)]
    assert got.tolist() == [0x3F80, 0x3F82, 0xBF82, 0x3F80, 0x3F81, 0x7F80, 0x7FFF, 0x7FFF]
    numbers = np.float32([-2.5, -0.5, 0.5, 1.5, 2.5, 2.9, -2.9])
    for name, rounded in (("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil), ("rni", np.rint)):
        got = each(f"cvt.{name}.f32.f32 %o, %a;", numbers, out=np.float32)[: len(numbers)]
        assert got.tolist() == rounded(numbers).tolist()


def test_subnormal_numbers_are_flushed_where_told():
    tiny = np.float32([1e-40, -1e-40, 2.0**-126, 1.0])
    assert np.signbit(each("add.ftz.f32 %o, %a, 0f80000000;", tiny, out=np.float32)[:2]).tolist() == [False, True]
    assert each("add.f32 %o, %a, 0f80000000;", tiny, out=np.float32)[:4].tolist() == tiny.tolist()
    # What comes in, though the product would be normal; and what goes out.
    assert each("mul.ftz.f32 %o, %a, 0f7F000000;", tiny, out=np.float32)[:3].tolist() == [0.0, 0.0, 2.0]
    assert each("mul.ftz.f32 %o, %a, 0f3F000000;", tiny, out=np.float32)[:4].tolist() == [0.0, 0.0, 0.0, 0.5]
    assert each("cvt.rmi.ftz.f32.f32 %o, %a;", tiny, out=np.float32)[:2].tolist() == [0.0, 0.0]


def test_narrow_numbers_keep_their_sign_in_wide_registers():
    a = np.array([0x1FF, 0x17F, -2, 3], np.int32)
    assert each("cvt.s64.s8 %o, %a;", a, out=np.int64)[:4].tolist() == [-1, 127, -2, 3]
    assert each("cvt.s8.s32 %o, %a;", a, out=np.int32)[:4].tolist() == [-1, 127, -2, 3]
    assert each("cvt.u32.u8 %o, %a;", a, out=np.uint32)[:4].tolist() == [255, 127, 254, 3]


def test_extremes_of_bfloat16_are_of_numbers_not_of_bits():
    a, b = np.array([0x3F80, 0xC000], np.uint16), np.array([0x4040, 0x3F00], np.uint16)  # 1, -2; 3, 0.5
    assert each("min.bf16 %o, %a, %b;", a, b, out=np.uint16)[:2].tolist() == [0x3F80, 0xC000]
    assert each("max.bf16 %o, %a, %b;", a, b, out=np.uint16)[:2].tolist() == [0x4040, 0x3F00]


def test_constants_and_arguments_are_bits():
    assert each("mov.f64 %o, 0d3FF8000000000000;", out=np.float64)[0] == 1.5
    assert each("add.f32 %o, %a, 0fBFC00000;", np.float32([2.0]), out=np.float32)[0] == 0.5
    assert each("add.s32 %o, %a, -3;", np.int32([2]), out=np.int32)[0] == -1
    arguments = ("i32", -1), ("i64", -(2**63)), ("fp32", -1.5), ("*fp32", None), ("u1", True)
    bits = [packed(kind, value) for kind, value in arguments]
    assert bits == [2**32 - 1, 2**63, 0xBFC00000, 0, 1]
