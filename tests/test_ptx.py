"""What stands in for a GPU (``tests/ptx.py``) by itself, on PTX written by hand: what the kernels' tests rest on it
under ``--ptx``."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

ptx = pytest.importorskip("ptx")

ORDERS = ("first", "last", "both")


def run(body: str, *tensors: torch.Tensor, warps=1, programs=(1, 1, 1), shared=0, order="first", cost=None):
    """Runs statements, before which %rd1, %rd2, ... are the tensors' addresses, %r1 the thread, %r2 the program."""
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_param_{i}];" for i in range(len(tensors)))
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(len(tensors)))
    text = f""".visible .entry k(\n{parameters}\n)\n.reqntid {32 * warps}\n{{\n{loads}
        mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\n{body}\nret;\n}}\n"""
    addresses = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)
    regions = [ptx.Region(tensor) for tensor in tensors]
    ptx.Machine(
        ptx.Program(text), np.arange(np.prod(programs)), programs, warps, shared, addresses, regions, order, cost
    ).run()


def each(statements: str, *inputs: np.ndarray, out: type) -> np.ndarray:
    """%a, %b, ... are elements of the inputs, one for each of 32 threads; what the statements leave in %o."""
    inputs = [np.resize(np.asarray(x), 32) for x in inputs]
    result = np.zeros(32, out)
    registers = {8: "rd", 4: "r", 2: "rs"}

    def register(letter: str, size: int) -> str:
        return f"%{registers[size]}{10 + 'abcdo'.index(letter)}"

    lines = []
    for i, x in enumerate(inputs):
        lines += [f"mad.wide.u32 %rd30, %r1, {x.itemsize}, %rd{i + 1};"]
        lines += [f"ld.global.b{8 * x.itemsize} {{ {register('abcd'[i], x.itemsize)} }}, [ %rd30 + 0 ];"]
        statements = statements.replace(f"%{'abcd'[i]}", register("abcd"[i], x.itemsize))
    statements = statements.replace("%o", register("o", result.itemsize))
    lines += [statements, f"mad.wide.u32 %rd30, %r1, {result.itemsize}, %rd{len(inputs) + 1};"]
    lines += [f"st.global.b{8 * result.itemsize} [ %rd30 + 0 ], {{ {register('o', result.itemsize)} }};"]
    tensors = [torch.from_numpy(x.view(f"i{x.itemsize}")) for x in (*inputs, result)]
    run("\n".join(lines), *tensors)
    return result


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


@pytest.mark.parametrize(
    ("mode", "operand", "clamp", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 3, 31, lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("idx", 9, 31, lambda lane: 9),
        ("bfly", 2, 0x1C03, lambda lane: lane ^ 2),  # segments of four threads
        ("idx", 1, 0x1C03, lambda lane: lane // 4 * 4 + 1),
        ("idx", 41, 31, lambda lane: 9),  # of the lane five bits count
        ("up", 1, 0x1C00, lambda lane: lane - 1 if lane % 4 else lane),
    ],
)
def test_shuffles(mode, operand, clamp, source):
    a = np.arange(32, dtype=np.int32) * 10
    got = each(f"shfl.sync.{mode}.b32 %o, %a, {operand}, {clamp}, -1;", a, out=np.int32)
    assert got.tolist() == [10 * source(lane) for lane in range(32)]
    choose = "selp.b32 %o, 1, 0, %p1;"
    inside = each(f"shfl.sync.{mode}.b32 %r40|%p1, %a, {operand}, {clamp}, -1;\n{choose}", a, out=np.int32)
    assert inside.tolist() == [int(mode in ("bfly", "idx") or source(lane) != lane) for lane in range(32)]


def test_reductions_of_a_warp():
    a = np.random.default_rng(0).integers(-99, 99, 32).astype(np.int32)
    for name, value in (("add", a.sum()), ("max", a.max()), ("min", a.min())):
        assert (each(f"redux.sync.{name}.s32 %o, %a, -1;", a, out=np.int32) == value).all()


MATRICES = """
    shl.b32 %r3, %r1, 4;
    mad.lo.s32 %r4, %r1, 4, 1;
    mad.lo.s32 %r5, %r1, 4, 2;
    mad.lo.s32 %r6, %r1, 4, 3;
    shl.b32 %r7, %r1, 2;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {%r7, %r4, %r5, %r6};
    bar.sync 0;
"""


def test_matrices_in_shared_memory():
    out = torch.zeros(2, 32, 4, dtype=torch.int32)
    move = """
        ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r3];
        st.global.v4.b32 [ %rd9 + {} ], {{ %r10, %r11, %r12, %r13 }};
    """
    address = "mad.wide.u32 %rd9, %r1, 16, %rd1;"
    run(address + MATRICES + move.format("", 0) + move.format(".trans", 512), out, shared=512)
    assert out[0].tolist() == [[4 * lane + i for i in range(4)] for lane in range(32)]
    halves = out.numpy().view(np.int16).reshape(2, 32, 4, 2)
    for i in range(4):  # thread t holds row t // 4, columns 2 (t % 4) and the next
        plain, transposed = (m.reshape(8, 4, 2).reshape(8, 8) for m in (halves[0, :, i], halves[1, :, i]))
        assert (transposed == plain.T).all()


# Each thread gives its number to the thread opposite, in the other warp.
EXCHANGE = """
    shl.b32 %r3, %r1, 2;
    st.shared.b32 [ %r3 + 0 ], {{ %r1 }};
    {barrier}
    xor.b32 %r4, %r1, 32;
    shl.b32 %r5, %r4, 2;
    ld.shared.b32 %r6, [ %r5 + 0 ];
    mad.wide.u32 %rd3, %r2, 256, %rd1;
    mad.wide.u32 %rd4, %r1, 4, %rd3;
    st.global.b32 [ %rd4 + 0 ], {{ %r6 }};
"""


@pytest.mark.parametrize("order", ORDERS)
def test_warps_meet_at_a_barrier(order):
    out = torch.zeros(3, 64, dtype=torch.int32)
    run(EXCHANGE.format(barrier="bar.sync 0;"), out, warps=2, programs=(3, 1, 1), shared=256, order=order)
    assert out.tolist() == 3 * [[lane ^ 32 for lane in range(64)]]


@pytest.mark.parametrize(("order", "ahead"), [("first", [0, 0, 0]), ("last", [1, 1, 1]), ("both", [0, 1, 0])])
def test_a_missing_barrier_shows(order, ahead):
    """The warp that goes ahead reads what the other has not written yet: poison."""
    out = torch.zeros(3, 2, 32, dtype=torch.int32)
    run(EXCHANGE.format(barrier=""), out, warps=2, programs=(3, 1, 1), shared=256, order=order)
    assert [[(warp == -1).all().item() for warp in program] for program in out] == [[w == 0, w == 1] for w in ahead]
    assert (out != -1).sum() == 96


@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_part_meet_again(order):
    """A loop of as many rounds as the thread's number, the sum of which each ends with."""
    body = """
        mov.b32 %r3, 0;
        mov.b32 %r4, 0;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 bra $L__end;
        $L__loop:
        add.s32 %r4, %r4, 1;
        add.s32 %r3, %r3, %r4;
        setp.lt.s32 %p2, %r4, %r1;
        @%p2 bra $L__loop;
        $L__end:
        bar.sync 0;
        shfl.sync.idx.b32 %r5, %r3, 31, 31, -1;
        mad.wide.u32 %rd3, %r1, 8, %rd1;
        st.global.v2.b32 [ %rd3 + 0 ], { %r3, %r5 };
    """
    out = torch.zeros(64, 2, dtype=torch.int32)
    run(body, out, warps=2, order=order)
    sums = [n * (n + 1) // 2 for n in range(64)]
    assert out.tolist() == [[s, sums[31] if n < 32 else sums[63]] for n, s in enumerate(sums)]


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        ("ld.global.b32 {%r3}, [ %rd1 + 64 ];", "outside of what the launch was given"),
        ("st.global.b32 [ %rd1 + -4 ], {%r3};", "outside of what the launch was given"),
        ("ld.global.b8 {%rs3}, [ %rd1 + 64 ];", "outside of what the launch was given"),
        ("ld.global.b8 {%rs3}, [ %rd1 + -1 ];", "outside of what the launch was given"),
        ("mov.b32 %r3, 0;\nld.shared.b32 %r4, [ %r3 + -4 ];", "outside of 128 bytes of shared memory"),
        ("ld.global.b32 {%r3}, [ %rd1 + 2 ];", "not divisible by 4"),
        ("ld.global.v2.b32 {%r3, %r4}, [ %rd1 + 4 ];", "not divisible by 8"),
        ("ld.shared.b32 %r3, [ %r1 + 128 ];", "not divisible by 4"),
        (
            "shl.b32 %r3, %r1, 3;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r3];",
            "not divisible by 16",
        ),
        ("mov.b32 %r3, 128;\nld.shared.b32 %r4, [ %r3 + 0 ];", "outside of 128 bytes of shared memory"),
        ("setp.lt.s32 %p1, %r1, 7;\n@%p1 bra $L__a;\nbar.sync 0;\n$L__a:\nmov.b32 %r3, 0;", "wait at a barrier"),
        ("setp.lt.s32 %p1, %r1, 7;\n@%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", "not every thread of a warp"),
    ],
)
def test_what_a_gpu_would_not_show_is_refused(statements, message):
    with pytest.raises(RuntimeError, match=message):
        run(statements, torch.zeros(16, dtype=torch.int32), shared=128)


@pytest.mark.parametrize(
    "statement",
    ["wgmma.fence.sync.aligned;", "ld.local.b32 %r3, [ %r1 + 0 ];", "add.rz.f32 %r3, %r1, %r1;",
     "{ mov.b32 %r3, 0; }", "add.bf16x2 %r3, %r1, %r1;", "bar.arrive 0, 64;", "cvt.rni.sat.s32.f32 %r3, %r1;"],
)  # fmt: skip
def test_what_is_not_known_is_refused(statement):
    with pytest.raises(NotImplementedError, match=statement.split()[0]):
        run(statement, torch.zeros(1))


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


@pytest.mark.parametrize("order", ORDERS)
def test_each_warp_reduces_its_own(order):
    """Of two programs, each of two warps."""
    out = torch.zeros(4, 32, 4, dtype=torch.int32)
    names = ("min.s32", "max.u32", "and.b32", "or.b32")
    reductions = "\n".join(f"redux.sync.{name} %r{10 + i}, %r4, -1;" for i, name in enumerate(names))
    body = f"""
        mad.lo.s32 %r3, %r2, 64, %r1;
        sub.s32 %r4, %r3, 40;
        {reductions}
        mad.wide.u32 %rd3, %r3, 16, %rd1;
        st.global.v4.b32 [ %rd3 + 0 ], {{ %r10, %r11, %r12, %r13 }};
    """
    run(body, out, warps=2, programs=(2, 1, 1), order=order)
    for warp in range(4):
        own = np.arange(32 * warp, 32 * warp + 32, dtype=np.int32) - 40
        largest = own.view(np.uint32).max().view(np.int32)
        expected = [own.min(), largest, np.bitwise_and.reduce(own), np.bitwise_or.reduce(own)]
        assert (out[warp].numpy() == expected).all()


def test_registers_hold_poison_until_written():
    assert (each("mov.b32 %o, %r50;", out=np.int32) == -1).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_of_a_warp_waits_for_no_other(order):
    body = """
        setp.ge.s32 %p1, %r1, 32;
        @%p1 bra $L__end;
        bar.warp.sync -1;
        mad.wide.u32 %rd3, %r1, 4, %rd1;
        st.global.b32 [ %rd3 + 0 ], { %r1 };
        $L__end:
    """
    out = torch.zeros(32, dtype=torch.int32)
    run(body, out, warps=2, order=order)
    assert out.tolist() == [*range(32)]


@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_part_meet_at_the_next_label(order):
    """Without a barrier: a shuffle takes the whole warp."""
    body = """
        mov.b32 %r3, 0;
        $L__loop:
        add.s32 %r3, %r3, 1;
        setp.le.s32 %p1, %r3, %r1;
        @%p1 bra $L__loop;
        shfl.sync.idx.b32 %r3, %r3, 31, 31, -1;
        setp.lt.s32 %p2, %r1, 7;
        @%p2 bra $L__end;
        add.s32 %r3, %r3, 1;
        $L__end:
        shfl.sync.idx.b32 %r5, %r3, 31, 31, -1;
        mad.wide.u32 %rd3, %r1, 4, %rd1;
        st.global.b32 [ %rd3 + 0 ], { %r5 };
    """
    out = torch.zeros(64, dtype=torch.int32)
    run(body, out, warps=2, order=order)
    assert out.tolist() == 32 * [33] + 32 * [65]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("statement", "read", "written"),
    [
        ("ld.global.b32 {%r3}, [ %rd3 + 0 ];", 2 * 128, 0),
        ("st.global.b32 [ %rd3 + 0 ], {%r1};", 0, 2 * 128),
        ("ld.global.b32 {%r3}, [ %rd1 + 0 ];", 2 * 32, 0),  # one sector, for each warp
        ("@%p1 ld.global.b32 {%r3}, [ %rd3 + 0 ];", 96, 0),  # seventeen threads, of the first warp
        ("ld.shared.b32 %r3, [ %r4 + 0 ];", 0, 0),
    ],
)
def test_costs_are_whole_sectors_and_the_statements_of_each_warp(statement, read, written, order):
    """Of two programs, each of two warps."""
    body = "setp.lt.s32 %p1, %r1, 17;\nmad.wide.u32 %rd3, %r1, 4, %rd1;\nshl.b32 %r4, %r1, 2;\n"
    launch = {"warps": 2, "programs": (2, 1, 1), "shared": 256, "order": order}
    cost, without = ptx.Cost("k"), ptx.Cost("k")
    run(body + statement, torch.zeros(64, dtype=torch.int32), cost=cost, **launch)
    run(body, torch.zeros(64, dtype=torch.int32), cost=without, **launch)
    assert (cost.read, cost.written) == (2 * read, 2 * written)
    assert (cost.statements, without.statements) == (4 * 8, 4 * 7)  # three before the body, one behind


@pytest.mark.parametrize("order", ORDERS)
def test_programs_have_shared_memory_and_places_of_their_own(order):
    """Each thread reads what the thread opposite wrote in its own program, and where in the grid it is."""
    body = """
        mov.u32 %r10, %ctaid.y;
        mov.u32 %r11, %nctaid.x;
        mov.u32 %r12, %laneid;
        mad.lo.s32 %r13, %r10, %r11, %r2;
        mad.lo.s32 %r14, %r13, 100, %r1;
        shl.b32 %r3, %r1, 2;
        st.shared.b32 [ %r3 + 0 ], { %r14 };
        bar.sync 0;
        xor.b32 %r4, %r3, 128;
        ld.shared.b32 %r6, [ %r4 + 0 ];
        mad.wide.u32 %rd3, %r13, 512, %rd1;
        mad.wide.u32 %rd4, %r1, 8, %rd3;
        st.global.v2.b32 [ %rd4 + 0 ], { %r6, %r12 };
    """
    out = torch.zeros(6, 64, 2, dtype=torch.int32)
    run(body, out, warps=2, programs=(3, 2, 1), shared=256, order=order)
    assert out[..., 0].tolist() == [[100 * program + (thread ^ 32) for thread in range(64)] for program in range(6)]
    assert (out[..., 1] == torch.arange(64) % 32).all()


def test_constants_and_arguments_are_bits():
    assert each("mov.f64 %o, 0d3FF8000000000000;", out=np.float64)[0] == 1.5
    assert each("add.f32 %o, %a, 0fBFC00000;", np.float32([2.0]), out=np.float32)[0] == 0.5
    assert each("add.s32 %o, %a, -3;", np.int32([2]), out=np.int32)[0] == -1
    arguments = ("i32", -1), ("i64", -(2**63)), ("fp32", -1.5), ("*fp32", None), ("u1", True)
    packed = [ptx._packed(kind, value) for kind, value in arguments]
    assert packed == [2**32 - 1, 2**63, 0xBFC00000, 0, 1]
