"""The training objective on the kernels, and the count that comes to the host while the network runs."""

from __future__ import annotations

import pytest
import torch
from training import CRITICS, build, clean, transformer

from fastmask import backbone, functional
from fastmask._host_count import HostCount
from fastmask.records import LinearLogits


def step(wrapper, x):
    """Losses and gradients of a step whose masks and temperature are always the same."""
    wrapper.zero_grad()
    torch.manual_seed(7)
    losses = wrapper(x)
    losses.loss.backward()
    return losses, [parameter.grad for parameter in wrapper.parameters()]


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize(("tied", "weighted"), [(True, False), (False, True)])
def test_a_step_on_the_kernels_is_that_of_the_reference(kernel, critic, tied, weighted, monkeypatch):
    net = transformer(tie_embedding=tied)
    wrapper = build(kernel.device, net=net, critic=critic, use_simple_mdlm_loss_weight=weighted)
    x = clean(kernel.device)
    monkeypatch.setenv("FASTMASK_BACKEND", "reference")
    expected = step(wrapper, x)
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    torch.testing.assert_close(step(wrapper, x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("critic", CRITICS)
def test_a_step_on_the_kernels_counts_no_rows_and_brings_no_logits_back(kernel, critic, monkeypatch):
    """The count came to the host while the network ran; head and sampler see that many rows and no more."""

    def refuse(*_):
        raise AssertionError("the host waits for the device")

    rows, sample = [], functional.sample_tokens

    def sample_few(logits, **options):
        assert isinstance(logits, LinearLogits), "there are logits of every position"
        rows.append(len(options["row_indices"]))
        return sample(logits, **options)

    monkeypatch.setattr(functional, "sample_tokens", sample_few)
    monkeypatch.setattr(functional, "masked_cross_entropy", refuse)
    wrapper, x = build(kernel.device, critic=critic), clean(kernel.device)
    counts, wait = [], HostCount.wait
    monkeypatch.setattr(HostCount, "wait", lambda self: counts.append(wait(self)) or counts[-1])
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    monkeypatch.setattr(torch.Tensor, "nonzero", refuse)
    step(wrapper, x)
    assert set(counts) == {counts[0]}
    assert 8 <= counts[0] <= x.numel()
    assert rows == ([] if critic == "none" else counts[:1])


def test_a_host_count_arrives(device):
    count = torch.arange(40, device=device).sum()
    assert HostCount(count).wait() == 780


def test_a_host_count_does_not_wait_while_it_is_traced(device):
    @torch.compile(backend="eager", fullgraph=True)
    def wait(count):
        return HostCount(count).wait()

    assert wait(torch.tensor(3, device=device)) is None


@pytest.mark.parametrize("method", ["forward", "nelbo"])
def test_the_loss_gets_the_rows_and_their_number(method, device, drawn, monkeypatch):
    """Not the mask, whose rows the kernel would have to find, nor a count that it would have to wait for."""
    given, loss = [], functional.linear_masked_cross_entropy
    monkeypatch.setattr(functional, "linear_masked_cross_entropy", lambda *a, **k: given.append(k) or loss(*a, **k))
    getattr(build(device), method)(clean(device))
    (options,), (masked,) = given, drawn
    assert options["row_indices"] is masked.row_indices
    assert options["num_masked"] == masked.num_masked
    assert isinstance(options["num_masked"], int)


@pytest.mark.parametrize("method", ["forward", "nelbo"])
def test_the_count_comes_to_the_host_while_the_network_runs(method, device, monkeypatch):
    events, start, wait, run = [], HostCount.__init__, HostCount.wait, backbone.run
    monkeypatch.setattr(HostCount, "__init__", lambda self, count: events.append("start") or start(self, count))
    monkeypatch.setattr(HostCount, "wait", lambda self: events.append("wait") or wait(self))
    monkeypatch.setattr(backbone, "run", lambda *a, **k: events.append("network") or run(*a, **k))
    getattr(build(device), method)(clean(device))
    assert events == ["start", "network", "wait"]


@pytest.mark.parametrize("critic", CRITICS)
def test_a_step_whose_count_cannot_be_waited_for_is_the_same(critic, device, monkeypatch):
    wrapper, x = build(device, critic=critic), clean(device)
    expected, bound = step(wrapper, x), wrapper.nelbo(x, generator=torch.Generator(device).manual_seed(3))
    monkeypatch.setattr(HostCount, "wait", lambda self: None)
    torch.testing.assert_close(step(wrapper, x), expected)
    torch.testing.assert_close(wrapper.nelbo(x, generator=torch.Generator(device).manual_seed(3)), bound)


def test_a_host_count_waits_for_its_arrival():
    """What arrives is seen by nobody before; on a GPU the copy is seldom late enough to show it."""
    count = HostCount(torch.tensor(0))

    class Arrival:
        def synchronize(self):
            count._host = torch.tensor(7)

    count._arrival = Arrival()
    assert count.wait() == 7
