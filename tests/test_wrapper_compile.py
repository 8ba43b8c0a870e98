"""torch.compile over a step of training, with a critic and without: which compile whole, and which in parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend

from fastmask import NonAutoregressiveWrapper

V, N, D, MASK = 12, 2, 4, 11
BATCHES = 5, 3, 7, 4, 6  # none is N, which torch would take for the same number


class Net(nn.Module):
    """Embeddings that are mixed along the sequence, and a linear head."""

    def __init__(self, outputs: int = V) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = V, N, D
        self.embedding, self.out = nn.Embedding(V, D), nn.Linear(D, outputs)

    def forward(self, ids, return_embeddings=False, sum_embeds=0.0):
        x = self.embedding(ids) + sum_embeds
        x = (x + x.mean(dim=1, keepdim=True)).tanh()
        return x if return_embeddings else self.out(x)


def wrap(backend, critic, by_logits=False, **options):
    torch.manual_seed(0)
    net = Net()
    if critic == "own":
        options["token_critic"] = Net(1)
    return NonAutoregressiveWrapper(
        net, mask_id=MASK, head=None if by_logits else net.out, self_token_critic=critic == "self", **options
    ).to(backend.device)


def step(model, temperature=None):
    """Losses and gradients as a function of tokens alone."""

    def run(tokens):
        return model(tokens, generator_sample_temperature=temperature)

    return run


def results(model, run, batch, device):
    tokens = (torch.arange(batch * N).view(batch, N) * 7 % MASK).to(device)
    torch.manual_seed(batch)
    losses = run(tokens)
    return *(loss for loss in losses if loss is not None), *torch.autograd.grad(
        losses.loss, list(model.parameters()), allow_unused=True
    )


def assert_as_without(model, compiled, run, batch, device):
    for ours, theirs in zip(*(results(model, each, batch, device) for each in (compiled, run)), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("critic", "by_logits", "dynamic"),
    [("none", False, None), ("none", True, None), ("self", False, None), ("own", True, None), ("self", False, True)],
)
def test_a_step_of_training_is_compiled_whole(kernel, critic, by_logits, dynamic, monkeypatch):
    """With a temperature for the critic's sample, in two graphs for five batch sizes."""
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    torch._dynamo.reset()
    model, counter = wrap(kernel, critic, by_logits), CompileCounterWithBackend("eager")
    run = step(model, 0.7)
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in BATCHES if critic == "self" else BATCHES[:3]:
        assert_as_without(model, compiled, run, batch, kernel.device)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("options", [{"critic": "self"}, {"critic": "none", "self_cond": True}], ids=str)
@pytest.mark.slow
def test_what_the_host_draws_or_the_reference_counts_splits_the_graph(kernel, name, options, monkeypatch):
    """A temperature for the critic's sample, the coin of self-conditioning, the number of masked rows."""
    monkeypatch.setenv("FASTMASK_BACKEND", name)
    torch._dynamo.reset()
    model = wrap(kernel, **options)
    run = step(model)
    compiled = torch.compile(run, backend="eager")
    for batch in BATCHES[:2]:
        assert_as_without(model, compiled, run, batch, kernel.device)


@pytest.mark.parametrize("by_logits", [False, True])
def test_the_references_loss_is_refused_whole(reference, by_logits, monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", "reference")
    torch._dynamo.reset()
    model = wrap(reference, "none", by_logits)
    with pytest.raises(TorchDynamoException):
        torch.compile(step(model), fullgraph=True, backend="eager")(torch.zeros(2, N, dtype=torch.int64))
