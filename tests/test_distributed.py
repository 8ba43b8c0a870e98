"""Several processes with a part of the batch each, as one process on the whole: training, nelbo, generation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import report_of_ranks
from rank_cases import USES
from training import MASK, N, Recorder, build, clean

from fastmask import NonAutoregressiveWrapper
from fastmask.distributed import Ranks

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# What tests/rank_cases.py does, by the beginning of its names. Ids are equal; sums of nelbo are float32 at the end.
TRAINING = [
    "weighted", "mean", "token gate", "bernoulli", "stratified", "self-conditioned", "own critic", "self critic",
    "everything", "compat", "compat mean",
]  # fmt: skip
LIMITS = {
    **{f"{name}, {dtype}": limit for name in TRAINING for dtype, limit in (("float64", 1e-12), ("float32", 1e-5))},
    "masks of one's own": 1e-12,
    "accumulation": 1e-12,
    **{f"FSDP2 {name}": 1e-12 for name in ("weighted", "mean", "self-conditioned", "own critic", "self critic")},
    **{f"FSDP2 {name}": 1e-12 for name in ("bernoulli", "stratified")},
    "FSDP2 in float32": 1e-5,
    **{f"FSDP2's weights after {use}": 1.5e-7 for use in USES},
    "FSDP2's nelbo and generate": 1.5e-7,
    "checkpoint": 0.0,
    "generation": 0.0,
    **{f"nelbo of {kind}": 1.5e-7 for kind in ("tensor", "data set", "batches", "sequences")},
}
del LIMITS["compat, float32"], LIMITS["compat mean, float32"]


# ---- two and four processes ----


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, float]:
    """By how much ranks differ from one process, by case."""
    return report_of_ranks("tests/rank_cases.py", tmp_path_factory.mktemp("ranks"), timeout=500)


def of(name: str, report: dict[str, float]) -> dict[str, float]:
    return {case: figure for case, figure in report.items() if case.startswith(f"{name}, ")}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITS)
def test_ranks_are_one_process(name, report):
    found = of(name, report)
    fewer = {"masks of one's own": 2, "accumulation": 2, "checkpoint": 1, "FSDP2's nelbo and generate": 1}
    fewer |= {f"FSDP2 {each}": 1 for each in ("bernoulli", "stratified", "in float32")}
    fewer |= {f"FSDP2's weights after {use}": 2 if "steps" in use else 1 for use in USES}
    few = 2 if name.startswith("FSDP2 ") or "float32" in name else 6
    assert len(found) == fewer.get(name, few)
    assert {case: figure for case, figure in found.items() if not figure <= LIMITS[name]} == {}


@pytest.mark.slow
def test_every_case_has_a_limit(report):
    assert {case for name in LIMITS for case in of(name, report)} == set(report)


# ---- one process, a group of its own ----


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    rendezvous = f"file://{tmp_path_factory.mktemp('group')}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("options", [{}, {"use_simple_mdlm_loss_weight": False}], ids=["weighted", "mean"])
def test_one_all_reduce_that_is_waited_for_at_the_loss(options, group, monkeypatch):
    """Two counts of 8 bytes, under way while the network runs."""
    events, all_reduce = [], dist.all_reduce

    def recorded(values, **kwargs):
        work = all_reduce(values, **kwargs)
        events.append((values.shape, values.dtype, kwargs["async_op"]))
        return SimpleNamespace(wait=lambda: events.append("wait") or work.wait())

    monkeypatch.setattr(dist, "all_reduce", recorded)
    model = NonAutoregressiveWrapper(Recorder(), mask_id=MASK, **options)
    model.net.register_forward_hook(lambda *_: events.append("network"))
    loss = model(clean(CPU), process_group=group, generator=seeded()).loss
    assert events == [((2,), torch.int64, True), "network", "wait"]
    assert torch.equal(loss, model(clean(CPU), generator=seeded()).loss)


def test_default_place_of_a_rank():
    """All ranks have batches of one size, unless they say where theirs lies."""
    ranks = Ranks(None)
    assert ranks.place(8, None, None) == (0, None)
    assert ranks.place(8, 16, None) == (16, None)
    ranks.rank, ranks.size, ranks._group = 3, 4, object()
    assert ranks.place(8, None, None) == (24, 32)
    assert ranks.place(0, None, None) == (0, 0)
    assert ranks.place(8, 5, 20) == (5, 20)
    for given, missing in (((5, None), "global_batch_size="), ((None, 20), "sample_offset=")):
        with pytest.raises(ValueError, match=f"give {missing} too"):
            ranks.place(8, *given)


@pytest.mark.parametrize("value", ["world", True, -100], ids=str)
def test_what_is_no_group(value):
    model = build(CPU)
    for run in (model, model.nelbo):
        with pytest.raises(TypeError, match=r"torch\.distributed\.group\.WORLD is that of all ranks"):
            run(clean(CPU), process_group=value)


@pytest.mark.parametrize("name", ["num_tokens", "num_masked"])
def test_the_whole_is_counted_once(name, group):
    model = build(CPU, use_simple_mdlm_loss_weight=False)
    with pytest.raises(ValueError, match=f"leave {name}= out, or, to accumulate gradients"):
        model(clean(CPU), process_group=group, generator=seeded(), **{name: 48})


class OfAGPU(torch.Generator):
    """What says so, on machines without one."""

    device = torch.device("cuda")


def test_a_generator_in_common(group):
    x = clean(CPU)
    with pytest.raises(ValueError, match=r"of one seed on all ranks: torch\.Generator\(\)\.manual_seed\(0\)"):
        build(CPU)(x, process_group=group)
    options = {"use_simple_mdlm_loss_weight": False}
    is_masked = torch.ones_like(x, dtype=torch.bool)
    assert build(CPU, **options)(x, is_masked=is_masked, process_group=group).loss.isfinite()  # draws nothing
    for draws in ({"self_cond": True}, {"critic": "self"}):
        model = build(CPU, **options, **draws)
        with pytest.raises(ValueError, match="expected generator="):
            model(x, is_masked=is_masked, process_group=group)
        with pytest.raises(ValueError, match="a generator of the CPU"):
            model(x, process_group=group, generator=OfAGPU())
        with pytest.raises(TypeError, match=r"torch\.Generator, received int"):
            model(x, process_group=group, generator=0)


def test_the_critic_of_compat_is_refused(group):
    model = build(CPU, compat=True, critic="self")
    with pytest.raises(ValueError, match="give only_train_generator=True, or leave compat out"):
        model(clean(CPU), process_group=group, generator=seeded())
    losses = model(clean(CPU), only_train_generator=True, process_group=group, generator=seeded())
    assert torch.equal(losses.loss, model(clean(CPU), only_train_generator=True, generator=seeded()).loss)


def test_a_rank_without_tokens(group):
    model = build(CPU)
    assert model.nelbo(iter([]), process_group=group) == 0.0
    assert model.nelbo(torch.zeros(0, N, dtype=torch.int64), process_group=group) == 0.0
