"""Graphs of whole generations: one shape for many prompts, captured once, replayed with everything fresh.

Without a GPU a recorder of operations stands in for CUDA's graph. As that does, it runs the same operations on the
same memory again, whatever Python would do now, and no value may reach the host while it records.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import itertools
import pickle
import threading
import time
import traceback
import warnings
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from block_causal import BlockCausal, BothSides, wrapped
from graph_recorder import WAITS, OnCuda, Recorder, without_numpy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from x_transformers import Encoder, TransformerWrapper

from fastmask import NonAutoregressiveWrapper, _cuda_graph, planning

V, N, MASK = 11, 16, 4

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: nothing else captures CUDA graphs")


class Net(nn.Module):
    """Embeddings and logits that depend on every id, and on what is passed along."""

    def __init__(self, length: int = N) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = V, length, 4
        self.attn_layers = SimpleNamespace(dim=4)
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(length, V, length, 4, generator=generator))
        self.head = nn.Parameter(2.0 * torch.randn(4, V, generator=generator))

    def forward(
        self, ids, sum_embeds=0.0, shift=0.0, scale=1.0, mems=(), return_embeddings=False,
        return_logits_and_embeddings=False,
    ):  # fmt: skip
        place = torch.arange(ids.shape[1], device=ids.device)
        embeddings = (
            self.table[place, ids][:, :, : ids.shape[1]].sum(dim=1).tanh() + sum_embeds + sum(x.mean() for x in mems)
        )
        if return_embeddings:
            return embeddings
        logits = (embeddings[..., None] * self.head).sum(dim=-2) * scale + shift
        return (logits, embeddings) if return_logits_and_embeddings else logits


class Critic(nn.Module):
    def forward(self, ids):
        return torch.sin(7.0 * ids + torch.arange(ids.shape[1], device=ids.device))


class Optional(Net):
    """Takes None for what it need not apply."""

    def forward(self, ids, shift=None, scale=None, **options):
        return super().forward(ids, 0.0, 0.0 if shift is None else shift, 1.0 if scale is None else scale, **options)


class Branching(Net):
    """Cannot be captured: Python looks at a value."""

    def forward(self, ids, **options):
        return super().forward(ids, **options) * (2.0 if (ids == MASK).any() else 1.0)


class Flipping(Net):
    """Waits for nothing, and cannot be captured."""

    def forward(self, ids, **options):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return super().forward(ids.flip(-1), **options)


def wrap(net=None, device="cpu", **options) -> NonAutoregressiveWrapper:
    torch.manual_seed(0)
    options = {"steps": 4, **options}
    if options.get("token_critic") == "own":
        options["token_critic"] = Critic()
    return NonAutoregressiveWrapper(net or Net(), mask_id=MASK, **options).to(device)


def prompts(num_open, seed=0, device="cpu") -> dict[str, torch.Tensor]:
    """A prompt for each of num_open [B], with so many open positions."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(num_open), N
    rank = torch.rand(shape, generator=generator).argsort(dim=-1).argsort(dim=-1)
    prompt = torch.randint(0, V, shape, generator=generator)
    return {"prompt": prompt.to(device), "prompt_mask": (rank >= torch.tensor(num_open)[:, None]).to(device)}


def drawn(wrapper, seed: int, **options) -> torch.Tensor:
    return wrapper.generate(generator=torch.Generator().manual_seed(seed), **options)


# ---- without a GPU ----


class SyncDebugMode(TorchDispatchMode):
    """torch.cuda.set_sync_debug_mode's likeness: warns, and gives values all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = 0

    def set(self, mode) -> None:
        if bool(mode) != bool(self.mode):
            self.__enter__() if mode else self.__exit__(None, None, None)
        self.mode = mode
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITS:
            if self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            frame = next(frame for frame in traceback.extract_stack()[-2::-1] if frame.filename == __file__)
            message = "called a synchronizing CUDA operation (Triggered internally)"
            warnings.warn_explicit(message, UserWarning, frame.filename, frame.lineno)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def graphs(monkeypatch) -> list[Recorder]:
    """All graphs captured, oldest first: _cuda_graph believes that it is on a GPU."""
    captured, replay = [], _cuda_graph.replay

    def capture(graph, **options):
        captured.append(graph)
        return graph

    def replay_on_cuda(module, key, function, inputs):
        return replay(module, key, function, [inputs[0].as_subclass(OnCuda), *inputs[1:]])

    monkeypatch.setattr(_cuda_graph, "replay", replay_on_cuda)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())
    for name in ("Event", "current_stream", "set_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    stream = mock.MagicMock(device=torch.device("cpu"))
    monkeypatch.setattr(_cuda_graph, "_streams", lambda device: (stream, stream))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool", "_cuda_clearCublasWorkspaces"):
        monkeypatch.setattr(torch._C, name, mock.MagicMock(), raising=False)
    monkeypatch.setattr(_cuda_graph, "_failed", [])
    sync_debug = SyncDebugMode()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", sync_debug.set)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: sync_debug.mode)
    without_numpy(monkeypatch)
    monkeypatch.setenv("FASTMASK_BACKEND", "reference")
    return captured


OPTIONS = {
    "plain": ({}, {}),
    "filters": ({}, {"filter_thres": 0.3, "top_p": 0.9, "forbidden": [1, 2], "choice_temperature": 2.0}),
    "forbidden": ({}, {"forbidden": torch.arange(V) % 5 == 0, "filter_thres": None}),
    "threshold": ({}, {"threshold": 0.4, "choice_temperature": 1.0}),
    "self_cond": ({"self_cond": True}, {"choice_temperature": 2.0}),
    "critic": ({"token_critic": "own"}, {"noise_level_scale": 0.5}),
    "self_critic": ({"self_token_critic": True}, {}),
    "threshold_critic": ({"token_critic": "own"}, {"threshold": 0.4}),
    "remask": ({"can_mask_prev_unmasked": True, "self_cond": True}, {}),
    "blocks": ({}, {"block_length": 7, "choice_temperature": 1.0}),
    "blocks_by_rule": ({}, {"block_length": 5, "steps": 3, "threshold": 0.4, "commits": 1}),
    "end": ({}, {"eos_id": [2, 3]}),
    "guidance": ({}, {"cfg_scale": 1.5, "unconditional": {"scale": 0.5}}),
    "editing": ({}, {"threshold": 0.3, "editing_threshold": 0.2, "editing_steps": 3, "eos_id": 3}),
    "editing_blocks": ({"self_cond": True}, {"block_length": 6, "editing_threshold": 0.1, "editing_steps": 2}),
    "order": ({}, {"score": "random", "end_temperature": 1.0}),
    "of_each_sequence": (
        {},
        {
            "start_temperature": torch.tensor([0.0, 0.5, 2.0]),
            "filter_thres": torch.tensor([0.0, 0.5, 0.9]),
            "min_p": torch.tensor([0.1, 0.0, 0.2]),
            "top_p": torch.tensor([1.0, 0.5, 0.9]),
        },
    ),
    "remask_critic": ({"can_mask_prev_unmasked": True, "token_critic": "own"}, {"sample_offset": 5}),
    "many_steps": ({"steps": 18}, {"choice_temperature": 4.5}),
    "cosine": ({"schedule": "cosine", "steps": 7}, {"start_temperature": 2.0}),
}


def assert_graph_is_loop(case: str, device="cpu") -> None:
    """For three seeds and prompts, and without a prompt."""
    of_wrapper, options = OPTIONS[case]
    wrapper = wrap(device=device, **of_wrapper)
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    for given in (lambda seed: {"batch_size": 3}, lambda seed: prompts([10, 9 - seed, 3 * seed], seed, device)):
        outs = []
        for seed in range(3):
            shared = {"seed": seed, **options, **given(seed)}
            outs.append(drawn(wrapper, cuda_graph=True, **shared))
            assert torch.equal(outs[-1], drawn(wrapper, **shared))
        assert len({tuple(ids.flatten().tolist()) for ids in outs}) == 3


@pytest.mark.parametrize("case", OPTIONS)
def test_a_graph_gives_what_the_loop_gives(case, graphs):
    """With places for more open positions than there are, other prompts and other seeds than at the capture."""
    assert_graph_is_loop(case)
    replays = [graph.num_replays for graph in graphs]
    assert replays == [3, 3] if "blocks" not in case else sum(replays) == 6  # each number of blocks has its own


def assert_graph_beside_a_cache(device="cpu") -> None:
    """With other prompts, guidance, and both caches."""
    for net, cache in ((BlockCausal(N), True), (BothSides(N), "prefix")):
        wrapper = wrapped(net).to(device)
        for seed, lengths in enumerate(([3, 5, 0], [5, 5, 0])):
            is_given = torch.arange(5) < torch.tensor(lengths)[:, None]
            prompt = {"prompt": torch.randint(0, MASK, (3, 5), device=device), "prompt_mask": is_given.to(device)}
            options = {**prompt, "block_length": 6, "steps": 2, "cache": cache, "cfg_scale": 0.5}
            ids = drawn(wrapper, seed, cuda_graph=True, **options)
            assert torch.equal(ids, drawn(wrapper, seed, **options))


def test_a_graph_beside_a_cache(graphs):
    """Prompts whose longest is as long, and whose shortest, share a graph; each network has its own."""
    assert_graph_beside_a_cache()
    assert [graph.num_replays for graph in graphs] == [2, 2]


def test_a_graph_has_places_for_whatever_a_step_commits(graphs):
    """Of 7 open positions with places for 8, the third of 5 steps commits 2, where of 8 it would commit 1."""
    wrapper = wrap(steps=5)
    given = {**prompts([7, 7, 7]), "score": "random"}
    assert torch.equal(drawn(wrapper, 1, cuda_graph=True, **given), drawn(wrapper, 1, **given))
    assert [graph.num_replays for graph in graphs] == [1]


@pytest.mark.parametrize("by_rule", [False, True])
@pytest.mark.parametrize("options", [{}, {"can_mask_prev_unmasked": True}, {"self_cond": True}], ids=str)
def test_the_plans_shape_depends_on_the_rounded_largest_number_of_open_positions(options, by_rule):
    wrapper = wrap(**options)

    def plan(*num_open):
        blocks = planning.Blocks(None, torch.tensor([num_open]))
        pace = wrapper._pace(4, None, by_rule, len(num_open), N, None)
        return planning.plan(pace, blocks, torch.device("cpu"), planning.places_for_any_prompt(blocks, N))

    def steps(*num_open):
        return plan(*num_open).parts

    for eighth in range(8):
        low, high = 2 * eighth + 1, 2 * eighth + 2
        assert len({steps(low, 0, 0), steps(high, 0, 0), steps(1, low, low), steps(0, 0, high)}) == 1
    assert len({steps(2 * eighth, 0, 0) for eighth in range(9)}) == 9
    assert steps(3, 3) != steps(3, 3, 3)
    assert not torch.equal(plan(3).counts, plan(4).counts)  # but not what it does


def test_prompts_of_one_eighth_share_a_graph(graphs):
    wrapper = wrap()
    for num_open in ([1, 0], [2, 2], [0, 1], [2, 1]):
        drawn(wrapper, 0, cuda_graph=True, **prompts(num_open))
    assert len(graphs) == 1
    drawn(wrapper, 0, cuda_graph=True, **prompts([3, 1]))
    assert len(graphs) == 2
    ids = drawn(wrapper, 0, cuda_graph=True, **prompts([0, 0]))
    assert torch.equal(ids, prompts([0, 0])["prompt"])


def test_each_length_has_a_graph_of_its_own(graphs):
    wrapper, prefix = wrap(), torch.tensor([[1, 2]])
    for number, length in enumerate((4, N, 5, 6), start=1):
        for given in ({"batch_size": 1, "seq_len": length}, {"prompt": prefix, "seq_len": length}):
            ids = drawn(wrapper, 0, cuda_graph=True, **given)
            assert ids.shape == (1, length)
            assert torch.equal(ids, drawn(wrapper, 0, **given))
        assert len(graphs) == 2 * number


def assert_randomness_is_fresh(wrapper) -> None:
    torch.manual_seed(3)
    ids = [wrapper.generate(2, 3.0, cuda_graph=True) for _ in range(3)]
    assert len({tuple(x.flatten().tolist()) for x in ids}) == 3
    torch.manual_seed(3)
    for cuda_graph, expected in zip((True, False, True), ids, strict=True):
        assert torch.equal(wrapper.generate(2, 3.0, cuda_graph=cuda_graph), expected)


def test_each_replay_draws_afresh(graphs):
    assert_randomness_is_fresh(wrap())
    assert len(graphs) == 1


def test_a_result_is_its_callers_own(graphs):
    """A later replay does not change it, nor what was passed."""
    wrapper, given = wrap(), prompts([9, 8, 7, 9])
    before = copy.deepcopy(given)
    first = drawn(wrapper, 0, cuda_graph=True, **given)
    kept = first.clone()
    second = drawn(wrapper, 2, cuda_graph=True, **given)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    first.zero_()
    assert torch.equal(drawn(wrapper, 0, cuda_graph=True, **given), kept)
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_shapes(graphs):
    wrapper, given = wrap(), prompts([5])
    assert wrapper.generate(cuda_graph=True).shape == (N,)
    assert wrapper.generate(2, cuda_graph=True).shape == (2, N)
    assert wrapper.generate(0, cuda_graph=True).shape == (0, N)
    one = {name: value[0] for name, value in given.items()}
    assert wrapper.generate(cuda_graph=True, **one).shape == (N,)
    assert wrapper.generate(3, cuda_graph=True, **one).shape == (3, N)


DIFFERENT = {
    "batch": {"batch_size": 3},
    "steps": {"steps": 5},
    "start_temperature": {"start_temperature": 0.5},
    "filter_thres": {"filter_thres": 0.5},
    "top_p": {"top_p": 0.5},
    "noise": {"noise_level_scale": 0.5},
    "choice": {"choice_temperature": 0.5},
    "threshold": {"threshold": 0.5},
    "forbidden": {"forbidden": [1]},
    "sample_offset": {"sample_offset": 2},
    "keyword": {"scale": 0.5},
    "another_value": {"scale": 2.0},
    "tensor": {"shift": torch.linspace(0, 3, V)},
    "another_name": {"scale": torch.linspace(0, 3, V)},
    "shape": {"shift": torch.ones(N, V)},
    "dtype": {"shift": torch.ones(V, dtype=torch.float64)},
    "another_tensor": {"sum_embeds": torch.ones(4)},
}


def test_each_set_of_options_has_a_graph_of_its_own(graphs, monkeypatch):
    monkeypatch.setattr(_cuda_graph, "_KEPT", 100)
    wrapper = wrap()
    for number, options in enumerate([{}, *DIFFERENT.values()], start=1):
        shared = {"seed": 1, "batch_size": 2, **options}
        first = drawn(wrapper, cuda_graph=True, **shared)
        assert len(graphs) == number, options
        assert torch.equal(first, drawn(wrapper, **shared))
        assert torch.equal(first, drawn(wrapper, cuda_graph=True, **shared))
        assert len(graphs) == number, options


def test_forbidden_ids_are_read_at_each_replay(graphs):
    wrapper = wrap()
    for forbidden in ([1], [2, 3], [5, 6, 7, 8, 9, 10]):
        assert not torch.isin(
            wrapper.generate(4, cuda_graph=True, forbidden=forbidden), torch.tensor(forbidden)
        ).any()
    assert len(graphs) == 1


def test_what_the_network_is_passed_is_read_at_each_replay(graphs):
    wrapper = wrap()
    for seed in range(3):
        shared = {"batch_size": 2, "shift": 3.0 * torch.randn(V, generator=torch.Generator().manual_seed(seed))}
        assert torch.equal(drawn(wrapper, 0, cuda_graph=True, **shared), drawn(wrapper, 0, **shared))
    assert len(graphs) == 1


def test_which_argument_is_a_tensor_and_which_none_is_seen(graphs):
    wrapper, tensor = wrap(Optional()), torch.linspace(0, 3, V)
    for shared in ({"shift": tensor, "scale": None}, {"shift": None, "scale": tensor}):
        shared = {"batch_size": 4, **shared}
        assert torch.equal(drawn(wrapper, 0, cuda_graph=True, **shared), drawn(wrapper, 0, **shared))
    assert len(graphs) == 2


def test_tensors_inside_what_the_network_is_passed_are_not_forgotten(graphs):
    """However the graphs see to it; these are told apart by a look at all values only."""
    wrapper = wrap()
    for value in (0.0, 3.0):
        inner = torch.zeros(3000)
        inner[1500] = 3000 * value
        shared = {"batch_size": 2, "mems": [inner]}
        assert torch.equal(drawn(wrapper, 0, cuda_graph=True, **shared), drawn(wrapper, 0, **shared))


def test_parameters_are_read_at_each_replay_and_replaced_ones_are_seen(graphs):
    wrapper = wrap()
    before = drawn(wrapper, 0, batch_size=2, cuda_graph=True)
    with torch.no_grad():
        wrapper.net.head.neg_()
    after = drawn(wrapper, 0, batch_size=2, cuda_graph=True)
    assert len(graphs) == 1
    assert not torch.equal(after, before)
    assert torch.equal(after, drawn(wrapper, 0, batch_size=2))
    old = wrapper.net.head
    wrapper.net.head = nn.Parameter(-old.detach())
    assert torch.equal(drawn(wrapper, 0, batch_size=2, cuda_graph=True), before)
    assert len(graphs) == 2
    wrapper.net.head = old
    assert torch.equal(drawn(wrapper, 0, batch_size=2, cuda_graph=True), after)
    assert len(graphs) == 2


class OtherCritic(nn.Module):
    def forward(self, ids):
        return (ids % 3).float()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("can_mask_prev_unmasked", True), ("schedule_fn", "cosine"), ("self_cond", False), ("mask_id", 5),
        ("steps", 6), ("token_critic", OtherCritic()),
    ],
)  # fmt: skip
def test_a_changed_wrapper_is_seen(name, value, graphs):
    """Where the graph of old would give something else."""
    wrapper = wrap(self_cond=True, token_critic="own")
    shared = {"batch_size": 8, "noise_level_scale": 1.0}
    assert torch.equal(drawn(wrapper, 0, cuda_graph=True, **shared), drawn(wrapper, 0, **shared))
    before = drawn(wrapper, 0, **shared)
    setattr(wrapper, name, value)
    assert not torch.equal(drawn(wrapper, 0, **shared), before)
    assert torch.equal(drawn(wrapper, 0, cuda_graph=True, **shared), drawn(wrapper, 0, **shared))


def test_at_most_eight_graphs_are_kept(graphs):
    wrapper = wrap()
    for steps in range(1, 10):
        wrapper.generate(1, steps=steps, cuda_graph=True)
    assert len(graphs) == 9
    assert len(_cuda_graph._graphs[wrapper]) == 8
    wrapper.generate(1, steps=2, cuda_graph=True)
    assert len(graphs) == 9
    wrapper.generate(1, steps=1, cuda_graph=True)  # the oldest had to go
    assert len(graphs) == 10
    assert len(_cuda_graph._graphs[wrapper]) == 8


def assert_not_captured(wrapper, message) -> None:
    """Step by step instead, and the warning comes once."""
    message = (
        rf"cuda_graph=True has no effect: the network cannot be captured \({message}\); the steps run one by one"
    )
    with pytest.warns(UserWarning, match=message) as record:
        ids = drawn(wrapper, 0, batch_size=2, cuda_graph=True)
    assert len(record) == 1
    assert torch.equal(ids, drawn(wrapper, 0, batch_size=2))
    for seed in range(2):  # and is not tried again, nor spoken of
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ids = drawn(wrapper, seed, batch_size=2, cuda_graph=True)
        assert torch.equal(ids, drawn(wrapper, seed, batch_size=2))


def test_a_network_that_waits_for_the_gpu_runs_step_by_step(graphs):
    """It is not captured at all, and is told where it waits."""
    line = inspect.getsourcelines(Branching.forward)[1] + 1
    assert_not_captured(wrap(Branching()), rf"RuntimeError: it waits for the GPU at .*test_cuda_graph.py:{line}")
    assert graphs == []
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.parametrize(("mode", "told"), [("warn", "it waits for the GPU at"), ("error", "called a synchronizing")])
def test_the_users_own_look_for_waits_stays(mode, told, graphs):
    given = [torch.ones(1).as_subclass(OnCuda)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)
    try:
        with (
            pytest.warns(UserWarning, match=rf"cannot be captured \(RuntimeError: {told}"),
            contextlib.suppress(RuntimeError),
        ):
            _cuda_graph.replay(wrap(), None, lambda inputs: [inputs[0] * bool(inputs[0])], given)
    finally:
        now = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(0)
    assert now == mode


def test_another_thread_may_wait_for_the_gpu(graphs):
    def function(inputs):
        thread = threading.Thread(target=warnings.warn, args=("called a synchronizing CUDA operation",))
        thread.start()
        thread.join()
        return [2.0 * inputs[0]]

    with pytest.warns(UserWarning, match="synchronizing") as record:
        (out,) = _cuda_graph.replay(wrap(), None, function, [torch.ones(2).as_subclass(OnCuda)])
    assert out.tolist() == [2.0, 2.0]
    assert len(graphs) == 1
    assert not any("no effect" in str(warning.message) for warning in record)


def test_four_threads_share_a_graph(graphs, monkeypatch):
    """Which has one memory for what they all give it; they capture it once, and each gets what is its own."""
    replay = Recorder.replay

    def slow_replay(graph):
        time.sleep(0.02)  # another thread's turn
        replay(graph)

    monkeypatch.setattr(Recorder, "replay", slow_replay)
    wrapper, together = wrap().eval(), {}
    alone = [drawn(wrapper, seed, **prompts([9, 10], seed)) for seed in range(4)]

    def generate(seed):
        together[seed] = drawn(wrapper, seed, cuda_graph=True, **prompts([9, 10], seed))

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(graphs) == 1
    assert all(torch.equal(together[seed], alone[seed]) for seed in range(4))
    assert len({tuple(ids.flatten().tolist()) for ids in alone}) == 4


def test_nothing_to_do_is_no_graph(graphs):
    assert wrap().generate(0, cuda_graph=True).shape == (0, N)
    given = prompts([0, 0])
    assert torch.equal(wrap().generate(2, cuda_graph=True, **given), given["prompt"])
    assert graphs == []


def test_a_replay_waits_for_what_another_stream_reads(graphs):
    wrapper, stream, event = wrap(), torch.cuda.current_stream(), torch.cuda.Event()
    for number in range(1, 3):
        drawn(wrapper, 0, batch_size=2, cuda_graph=True)
        assert stream.wait_event.mock_calls == [mock.call(event)] * number
        assert event.record.mock_calls == [mock.call(stream)] * number


def test_a_network_that_no_capture_permits_runs_step_by_step(graphs):
    """What PyTorch leaves in the midst of the capture is ended, and the graph that it still asks is kept."""
    wrapper = wrap(Flipping())
    assert_not_captured(wrapper, "RuntimeError: operation not permitted when stream is capturing")
    assert graphs == _cuda_graph._failed
    assert len(graphs) == 1
    torch._C._cuda_endAllocateToPool.assert_called_once_with(None, torch.cuda.graph_pool_handle())
    torch._C._cuda_releasePool.assert_called_once_with(None, torch.cuda.graph_pool_handle())
    torch._C._cuda_clearCublasWorkspaces.assert_called_once_with()


@pytest.mark.parametrize("error", [AssertionError(), NotImplementedError(""), ValueError("one\ntwo")], ids=repr)
def test_any_failure_to_capture_is_told(error, graphs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", mock.Mock(side_effect=error))
    with pytest.warns(UserWarning, match=rf"cannot be captured \({type(error).__name__}"):
        assert wrap().generate(2, cuda_graph=True).shape == (2, N)


def test_what_a_network_raises_by_itself_is_raised(graphs):
    with pytest.warns(UserWarning, match="TypeError"), pytest.raises(TypeError, match="unknown"):
        wrap().generate(2, cuda_graph=True, unknown=1)


def test_graphs_do_not_keep_the_wrapper_alive(graphs):
    wrapper = wrap(self_token_critic=True)
    wrapper.generate(1, cuda_graph=True)
    alive, kept = (
        weakref.ref(wrapper),
        weakref.ref(_cuda_graph._graphs[wrapper][next(iter(_cuda_graph._graphs[wrapper]))]),
    )
    graphs.clear()
    del wrapper
    gc.collect()
    assert alive() is None
    assert kept() is None


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_a_wrapper_with_graphs_can_be_copied(duplicate, graphs):
    net = nn.Embedding(V, V)
    net.num_tokens, net.max_seq_len = V, N
    wrapper = wrap(net)
    expected = drawn(wrapper, 0, batch_size=2, cuda_graph=True)
    other = duplicate(wrapper)
    assert torch.equal(drawn(other, 0, batch_size=2, cuda_graph=True), expected)
    assert len(graphs) == 2
    with torch.no_grad():
        other.net.weight.neg_()
    assert not torch.equal(drawn(other, 0, batch_size=2, cuda_graph=True), expected)
    assert torch.equal(drawn(wrapper, 0, batch_size=2, cuda_graph=True), expected)
    assert len(graphs) == 2


def test_the_modes_are_restored(graphs):
    seen = []

    class Watched(Net):
        def forward(self, ids, **options):
            seen.append(self.training)
            return super().forward(ids, **options)

    wrapper = wrap(Watched()).train()
    for _ in range(2):
        wrapper.generate(1, cuda_graph=True)
        assert wrapper.training
        assert wrapper.net.training
    assert seen == [False] * 12  # two rounds to warm up and the capture


def test_on_a_cpu_the_steps_run_one_by_one():
    wrapper, given = wrap(), prompts([7, 3])
    message = "cuda_graph=True has no effect: the network is on cpu; the steps run one by one"
    for seed in range(2):
        with pytest.warns(UserWarning, match=message):
            ids = drawn(wrapper, seed, cuda_graph=True, **given)
        assert torch.equal(ids, drawn(wrapper, seed, **given))


def test_the_warning_points_at_the_caller():
    with pytest.warns(UserWarning, match="no effect") as record:
        wrap().generate(1, cuda_graph=True)
    assert record[0].filename == __file__


@pytest.mark.parametrize(
    "options",
    [{"progress": True}, {"progress": print}, {"return_trajectory": True}],
    ids=["bar", "call", "trajectory"],
)
def test_nothing_can_be_told_step_by_step(options):
    message = (
        "expected cuda_graph=True without progress= and return_trajectory=: a graph runs all steps at once; leave"
    )
    with pytest.raises(ValueError, match=message):
        wrap().generate(1, cuda_graph=True, **options)


def test_the_recorder_is_like_a_graph():
    """It sees new inputs in the old memory, in place and through views, and no new Python."""
    x, factor, graph = torch.arange(4.0), 2.0, Recorder()
    with graph:
        y = factor * x
        y[1:].add_(torch.ones(3))
    factor = 5.0
    x.copy_(torch.tensor([1.0, 1.0, 1.0, 4.0]))
    graph.replay()
    assert y.tolist() == [2.0, 3.0, 3.0, 9.0]
    with pytest.raises(RuntimeError, match="not permitted"), Recorder():
        x.sum().item()


# ---- on a GPU ----


@needs_gpu
@pytest.mark.parametrize("backend_of_loop", ["triton", "reference"])
@pytest.mark.parametrize("case", OPTIONS)
def test_a_real_graph_gives_what_the_loop_gives(case, backend_of_loop, monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", backend_of_loop)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is a graph
        assert_graph_is_loop(case, "cuda")


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"self_token_critic": True}, {"self_cond": True}], ids=str)
def test_a_real_graph_of_a_transformer(options):
    layers = Encoder(dim=32, depth=2, heads=2, attn_dim_head=16)
    net = TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=layers)
    wrapper = wrap(net, "cuda", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_randomness_is_fresh(wrapper)
        for seed, num_open in itertools.product(range(2), ([9, 3], [10, 10])):
            given = prompts(num_open, seed, "cuda")
            ids = drawn(wrapper, seed, cuda_graph=True, **given)
            assert torch.equal(ids[given["prompt_mask"]], given["prompt"][given["prompt_mask"]])
            assert torch.equal(ids == MASK, (given["prompt"] == MASK) & given["prompt_mask"])
            assert torch.equal(ids, drawn(wrapper, seed, **given))
    assert len(_cuda_graph._graphs[wrapper]) == 2


@needs_gpu
def test_a_real_graph_waits_for_nothing_but_the_prompt():
    wrapper = wrap(device="cuda")
    wrapper.generate(2, cuda_graph=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        wrapper.generate(2, cuda_graph=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("net", [Branching, Flipping])
def test_a_real_capture_that_fails_leaves_the_gpu_usable(net):
    good, wrapper = wrap(device="cuda"), wrap(net(), "cuda")
    expected = drawn(good, 0, batch_size=2, cuda_graph=True)
    with pytest.warns(UserWarning, match="cannot be captured"):
        ids = drawn(wrapper, 0, batch_size=2, cuda_graph=True)
    assert torch.equal(ids, drawn(wrapper, 0, batch_size=2, cuda_graph=True))
    assert torch.equal(ids, drawn(wrapper, 0, batch_size=2))
    torch.rand(2, device="cuda")
    torch.cuda.empty_cache()
    assert torch.equal(drawn(good, 0, batch_size=2, cuda_graph=True), expected)
    assert_randomness_is_fresh(wrap(device="cuda"))


@needs_gpu
def test_real_graphs_do_not_keep_the_wrapper_nor_its_memory():
    gc.collect()
    before = torch.cuda.memory_allocated()
    wrapper = wrap(device="cuda")
    wrapper.generate(2, cuda_graph=True)
    assert torch.cuda.memory_allocated() > before
    alive = weakref.ref(wrapper)
    del wrapper
    gc.collect()
    assert alive() is None
    assert torch.cuda.memory_allocated() <= before


@needs_gpu
def test_a_real_graph_beside_a_cache():
    assert_graph_beside_a_cache("cuda")


@needs_gpu
def test_a_real_graph_of_an_empty_batch():
    assert wrap(device="cuda").generate(0, cuda_graph=True).shape == (0, N)
