"""The PTX machine (``tests/ptx/``) by itself: warps, barriers, memory and what it refuses, on PTX written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from ptx.by_hand import ORDERS, each, run
from ptx.cost import Cost, costs, programs_run


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
    cost, without = Cost("k"), Cost("k")
    run(body + statement, torch.zeros(64, dtype=torch.int32), cost=cost, **launch)
    run(body, torch.zeros(64, dtype=torch.int32), cost=without, **launch)
    assert (cost.read, cost.written) == (2 * read, 2 * written)
    assert (cost.statements, without.statements) == (4 * 8, 4 * 7)  # three before the body, one behind


@pytest.mark.parametrize("order", ORDERS)
def test_special_functions_barriers_and_distinct_sectors_are_told_apart(order):
    body = """
        mad.wide.u32 %rd3, %r1, 4, %rd1;
        ld.global.b32 {%r3}, [ %rd3 + 0 ];
        ex2.approx.ftz.f32 %r4, %r3;
        lg2.approx.ftz.f32 %r4, %r4;
        bar.sync 0;
        bar.warp.sync -1;
        st.global.b32 [ %rd3 + 0 ], {%r4};
    """
    cost = Cost("k")
    run(body, torch.ones(64), warps=2, programs=(3, 1, 1), order=order, cost=cost)
    assert (cost.special, cost.barriers) == (3 * 2 * 2, 3 * 2)
    assert (cost.read, cost.written, cost.distinct()) == (3 * 256, 3 * 256, 256 + 256)  # all programs', the same


LOAD, USE = "ld.global.b32 {%r3}, [ %rd3 + 0 ];", "add.s32 %r4, %r3, 1;"
STORE, NEXT = "st.shared.b32 [ %r5 + 0 ], {%r4};", "$L__next:"


@pytest.mark.parametrize(
    ("statements", "loads"),
    [
        ((LOAD,), 0),  # nobody waits
        ((LOAD, USE, STORE), 1),
        ((LOAD, "ld.global.b32 {%r6}, [ %rd3 + 4 ];", "add.s32 %r4, %r3, %r6;", STORE), 1),  # side by side
        ((LOAD, "mad.wide.u32 %rd3, %r3, 4, %rd3;", LOAD, USE, STORE), 2),  # one after the other
        ((LOAD, "bra.uni $L__next;", NEXT, USE, STORE), 1),
        ((LOAD, "setp.eq.s32 %p1, %r3, 0;", "@%p1 bra $L__next;", NEXT, LOAD, USE, STORE), 2),
    ],
)
def test_a_warp_waits_for_what_it_needs(statements, loads):
    """By loads, each of 600 cycles; all else takes few."""
    cost = Cost("k")
    body = "mad.wide.u32 %rd3, %r1, 0, %rd1;\nshl.b32 %r5, %r1, 2;\n" + "\n".join(statements)
    run(body, torch.zeros(64, dtype=torch.int32), shared=256, cost=cost)
    assert loads * 600 < cost.path.cycles < loads * 600 + 60
    assert cost.path.statements == cost.statements


def test_a_barrier_is_waited_for():
    without, with_barriers = Cost("k"), Cost("k")
    run("mov.b32 %r3, 0;", torch.zeros(1), warps=2, cost=without)
    run("mov.b32 %r3, 0;\nbar.sync 0;\nbar.sync 0;", torch.zeros(1), warps=2, cost=with_barriers)
    assert 60 <= with_barriers.path.cycles - without.path.cycles <= 64


def test_few_programs_count_for_a_grid():
    assert programs_run((3, 2, 2)).tolist() == [*range(12)]
    with costs(2):
        assert programs_run((3, 2, 2)).tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
        assert programs_run((1, 2, 1)).tolist() == [0, 1]
    assert programs_run((3, 1, 1)).tolist() == [0, 1, 2]


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
