"""Head and cross-entropy in one: which products are taken, how much memory, and what the host waits for."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from linear_losses import draw_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmask import functional

OPERATION = "linear_masked_cross_entropy"


@pytest.fixture
def small_chunks(backend, monkeypatch):
    """Sets how many masked rows a chunk holds: few, where rows cost 10 ms each in the interpreter."""
    return partial(monkeypatch.setattr, backend.module(OPERATION), "CHUNK_ROWS")


aten = torch.ops.aten


PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm}


# What makes the host wait for the device; an index that is a mask is as good as nonzero.
WAITS = {aten.nonzero, aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.masked_select, aten.equal}

BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Recorder(TorchDispatchMode):
    """The operations that run, and the largest floating-point tensor that any of them
    returns, in elements."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket)
        for value in tensors_of(out):
            if value.is_floating_point():
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        if any(index.dtype == torch.bool for index in tensors_of(args[1:]) if func in BY_INDEX):
            self.operations.append(torch.ops.aten.nonzero)  # it is called where no mode sees it
        return out

    def count(self, operations) -> int:
        return sum(operation in operations for operation in self.operations)


def tensors_of(tree) -> list[torch.Tensor]:
    return [value for value in tree_leaves(tree) if isinstance(value, torch.Tensor)]


@pytest.fixture
def watch(backend, monkeypatch):
    """A dispatch mode on all of an operation: what is around it, and inside, where modes are off in a kernel."""

    def start(mode: TorchDispatchMode) -> TorchDispatchMode:
        if backend.is_kernel:
            module = backend.module(OPERATION)
            monkeypatch.setattr(module, "_chunked", under(mode, module._chunked))
        return mode

    return start


def under(mode: TorchDispatchMode, function: Callable) -> Callable:
    def watched(*arguments):
        with mode:
            return function(*arguments)

    return watched


# ---- what is computed, and what is not ----


@pytest.fixture
def run_recorded(backend, small_chunks, watch):
    """Forward and backward of 8 masked rows in two chunks, under the recorder."""

    def run(*, reduction, needs=(True, True, True), grad=True, rows=8, chunk_rows=4, dtype=torch.float32):
        small_chunks(chunk_rows)
        recorder = watch(Recorder())
        leaves, targets, _ = draw_case(rows, width=2, vocabulary=600, dtype=dtype)
        x, w, b = (value.detach().requires_grad_(need) for value, need in zip(leaves, needs, strict=True))
        with recorder, torch.set_grad_enabled(grad):
            out = backend.run(functional.linear_masked_cross_entropy, x, w, targets, bias=b, reduction=reduction)
            if out.loss.requires_grad:
                out.loss.sum().backward()
        return recorder, (x, w, b)

    return run


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_wanted_gradients_are_formed(run_recorded, needs, reduction):
    """One product for the logits of each of two chunks, again where backward recomputes them, one each for
    the gradients of embeddings and weight."""
    recorder, leaves = run_recorded(reduction=reduction, needs=needs)
    assert [leaf.grad is not None for leaf in leaves] == list(needs)
    recomputed = reduction == "none" and any(needs)
    assert recorder.count(PRODUCTS) == 2 * (1 + recomputed + needs[0] + needs[1])


def test_no_grad_forms_no_gradient_and_no_graph(run_recorded):
    recorder, _ = run_recorded(reduction="mean", grad=False)
    assert recorder.count(PRODUCTS) == 2


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_of_all_rows_never_exist(run_recorded, dtype, reduction):
    recorder, _ = run_recorded(reduction=reduction, dtype=dtype, rows=32)
    assert recorder.largest == 4 * 600


def test_unmasked_rows_never_reach_the_head(backend, watch):
    (x, w, _), targets, _ = draw_case(4, 512, width=2, vocabulary=600)
    is_masked = torch.zeros(4, 512, dtype=torch.bool)
    is_masked[1, 3:13] = True
    with watch(Recorder()) as recorder:
        backend.run(functional.linear_masked_cross_entropy, x, w, targets, is_masked)
    assert recorder.largest <= 10 * 600


@pytest.mark.parametrize("knows", ["nothing", "a bound", "a capture"])
@pytest.mark.parametrize("is_list", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_host_waits_for_the_count_only(kernel, monkeypatch, reduction, is_list, knows):
    """Once in a forward without a bound, never in one that has it or is captured; a recomputing backward likewise."""
    recorder, module = Recorder(), kernel.module(OPERATION)
    if knows == "a capture":
        monkeypatch.setattr(module, "_is_captured", lambda x: True)
    monkeypatch.setattr(module, "_chunked", under(recorder, module._chunked))
    leaves, targets, is_masked = draw_case(2, 3)
    leaves = [leaf.detach().to(kernel.device).requires_grad_() for leaf in leaves]
    targets, is_masked = targets.to(kernel.device), is_masked.to(kernel.device)
    rows = is_masked.flatten().nonzero().squeeze(-1)
    x, w, b = leaves
    options = {"row_indices": rows} if is_list else {"is_masked": is_masked}
    with recorder:
        functional.linear_masked_cross_entropy(
            x, w, targets, weights=torch.ones_like(targets, dtype=torch.float32), bias=b, reduction=reduction,
            num_masked=5 if knows == "a bound" else None, backend="triton", **options
        ).loss.sum().backward()  # fmt: skip
    passes = 2 if reduction == "none" else 1
    assert recorder.count(PRODUCTS) == passes + 2
    assert recorder.count(WAITS) == (passes if knows == "nothing" else 0)


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 8, 9, 13])
def test_chunks_are_of_one_size(kernel, monkeypatch, rows):
    module = kernel.module(OPERATION)
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    sizes = module.chunk_sizes(rows)
    assert sum(sizes) == rows
    assert len(sizes) == -(-rows // 4)
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_rows_of_logits_begin_at_16_bytes(kernel, monkeypatch):
    """Whatever V is: the products and the stores are faster so."""
    module, given = kernel.module(OPERATION), []
    losses = module.losses_and_gradient
    monkeypatch.setattr(module, "losses_and_gradient", lambda *a, **k: given.append(a[0]) or losses(*a, **k))
    for dtype in (torch.float32, torch.bfloat16):
        (x, w, _), targets, _ = draw_case(3, vocabulary=11, dtype=dtype)
        kernel.run(functional.linear_masked_cross_entropy, x, w, targets)
        assert given[-1].stride(0) * dtype.itemsize % 16 == 0
        assert given[-1].data_ptr() % 16 == 0


# ---- memory ----


class Memory(TorchDispatchMode):
    """Bytes of the storages that were made under it and are alive, and the most that there ever were."""

    def __init__(self):
        super().__init__()
        self.bytes, self.most, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [value.untyped_storage() for value in tensors_of((args, kwargs))]
        out = func(*args, **(kwargs or {}))
        for storage in (value.untyped_storage() for value in tensors_of(out)):
            if storage not in self.known and all(storage is not other for other in given):
                self.known.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        if self.bytes > self.most:
            gc.collect()  # Triton's interpreter leaves cycles behind that hold tensors
            self.most = max(self.most, self.bytes)
        return out

    def free(self, nbytes):
        self.bytes -= nbytes

    def __enter__(self):
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # what there is need not be looked through each time
        return super().__enter__()


def extra_bytes(function: Callable, device: torch.device) -> Callable:
    """The function, and where it returns, what it took at its peak beyond its outputs and its arguments."""

    def measured(*arguments):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            out = function(*arguments)
            measured.extra = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
            return out
        with Memory() as memory:
            out = function(*arguments)
            gc.collect()
        measured.extra = memory.most - memory.bytes
        return out

    return measured


@pytest.fixture
def measure(kernel, monkeypatch):
    """Extra memory of one forward with gradients, or of the backward that forms them (reduction none)."""
    module = kernel.module(OPERATION)
    # The allocator of a GPU gives 512 bytes at least, and a chunk has to be large beside that.
    chunk_rows = 1024 if kernel.device.type == "cuda" else 6

    def measure(width, vocabulary, dtype, *, chunks=2, unmasked=0, reduction="sum", bound=False):
        monkeypatch.setattr(module, "CHUNK_ROWS", chunk_rows)
        rows = chunks * chunk_rows
        leaves, targets, _ = draw_case(rows + unmasked, width=width, vocabulary=vocabulary, dtype=dtype)
        x, w, b = (value.detach().to(kernel.device).requires_grad_() for value in leaves)
        is_masked = torch.arange(rows + unmasked, device=kernel.device) < rows
        options = {"reduction": reduction, "num_masked": rows if bound else None, "backend": "triton"}
        measured = extra_bytes(module._chunked, kernel.device)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_chunked", measured)
            for _ in range(2 if kernel.device.type == "cuda" else 1):  # cuBLAS takes a workspace once
                loss = functional.linear_masked_cross_entropy(
                    x, w, targets.to(kernel.device), is_masked, bias=b, **options
                ).loss
                loss.backward(torch.ones_like(loss))
        logits = chunk_rows * -(-vocabulary // 8) * 8 * dtype.itemsize
        chunk_embeddings = chunk_rows * width * dtype.itemsize
        is_sum = chunks > 1 and dtype != torch.float32  # else dW is what is returned
        weight = vocabulary * width
        allowed = logits + 2 * chunk_embeddings + 4 * weight * is_sum
        # What is not of the design's order: the bias's gradient in float32 (of two chunks, and the sum); by row the
        # list, the mask and its like; a chunk's records.
        allowed += 3 * 4 * vocabulary + 40 * (rows + unmasked) + 128 * chunk_rows
        if kernel.device.type == "cuda":
            allowed += 32 * 512
        return measured.extra, allowed, logits

    measure.chunk_rows = chunk_rows
    return measure


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "vocabulary"), [(16, 600), (64, 1000), (8, 4001), (128, 515)])
@pytest.mark.slow_interpreted
def test_memory_is_a_chunk_of_logits_and_of_embeddings_and_the_weights_gradient(
    measure, width, vocabulary, dtype, bound
):
    """Beyond inputs and outputs: a chunk's logits, X and dX; dW in float32 where it is a sum."""
    extra, allowed, logits = measure(width, vocabulary, dtype, bound=bound)
    assert extra <= allowed
    assert allowed - extra < logits  # a second chunk of logits would be seen


def test_memory_of_a_backward_that_recomputes(measure):
    extra, allowed, logits = measure(16, 600, torch.float16, reduction="none")
    assert extra <= allowed
    assert allowed - extra < logits


def test_memory_grows_with_neither_rows_nor_chunks(measure):
    """But for the list and the mask of the rows."""
    few, _, _ = measure(128, 600, torch.float32, chunks=3)  # from the third on all chunks find the same
    more_chunks, _, _ = measure(128, 600, torch.float32, chunks=5)
    more_rows, _, _ = measure(128, 600, torch.float32, chunks=3, unmasked=512)
    assert more_chunks - few <= 40 * (measure.chunk_rows * 2)
    assert more_rows - few <= 40 * 512
