"""The door to a network: when the short way through its head is taken, and that it changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from torch import nn
from x_transformers import Encoder, TransformerWrapper

from fastmask import NonAutoregressiveWrapper, backbone, heads
from fastmask.records import LinearLogits

V, N, D, MASK = 13, 6, 16, 12


def encoder(**options) -> Encoder:
    return Encoder(dim=D, depth=1, heads=2, attn_dim_head=8, **options)


def transformer(kind: type[TransformerWrapper] = TransformerWrapper, *, layers=None, **options) -> TransformerWrapper:
    torch.manual_seed(0)
    return kind(num_tokens=V, max_seq_len=N, attn_layers=layers or encoder(), **options)


def clean(device: torch.device, batch: int = 5) -> torch.Tensor:
    return torch.randint(0, V - 1, (batch, N), generator=torch.Generator().manual_seed(1)).to(device)


def refuse(net: nn.Module) -> nn.Module:
    """A copy that takes the logits path: a hook that does nothing is still a hook."""
    net = getattr(net, "_orig_mod", net)
    assert net.to_logits.__class__ is nn.Linear or net.to_logits.__closure__[0].cell_contents is net
    net.register_forward_hook(lambda module, arguments, output: None)
    assert heads.of_transformer(net).head is None
    return net


def assert_gradients(ours, theirs) -> None:
    """Equal to float32's accuracy, each tensor by its norm: an element may be what is left of large terms."""
    total = sum(gradient.norm() ** 2 for gradient in theirs if gradient is not None) ** 0.5
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 2**-19 * other.norm() + 2**-23 * total


@pytest.fixture
def uncompiled():
    """torch.compile's wrapping without its compilation, which takes seconds and is not what is tested."""
    with torch.compiler.set_stance("force_eager"):
        yield


# ---- networks whose head is linear ----


def custom_head() -> TransformerWrapper:
    torch.manual_seed(3)
    return transformer(to_logits=nn.Linear(D, V, bias=True))


def replaced_head() -> TransformerWrapper:
    net = transformer()
    torch.manual_seed(3)
    net.to_logits = nn.Linear(D, V)
    return net


def replaced_embedding() -> TransformerWrapper:
    net = transformer(tie_embedding=True)
    torch.manual_seed(3)
    net.token_emb.emb = nn.Embedding(V, D)
    return net


ACCEPTED = {
    "untied": transformer,
    "tied": lambda: transformer(tie_embedding=True),
    "tied, scale 1": lambda: transformer(tie_embedding=True, tie_embedding_scale=1.0),
    "tied, normalised": lambda: transformer(tie_embedding=True, l2norm_embed=True),
    "tied, another embedding": replaced_embedding,
    "linear with bias": custom_head,
    "head replaced": replaced_head,
    "narrow embedding": lambda: transformer(emb_dim=8),
    "memory tokens": lambda: transformer(num_memory_tokens=2),
    "compiled": lambda: torch.compile(transformer(), backend="eager"),
    "compiled, tied": lambda: torch.compile(transformer(tie_embedding=True), backend="eager"),
    "deep copy, untied": lambda: copy.deepcopy(transformer()),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_head_times_embeddings_are_the_networks_logits(name, device):
    net, ids = ACCEPTED[name]().to(device), clean(device)
    head = heads.of_transformer(net).head
    assert head is not None
    with torch.no_grad():
        logits, embeddings = net(ids, return_logits_and_embeddings=True)
    torch.testing.assert_close(F.linear(embeddings * head.scale, head.weight, head.bias), logits)
    torch.testing.assert_close(head.logits(embeddings).of_rows(embeddings), logits)
    out = backbone.run(net, heads.Heads(), ids)
    assert isinstance(out.logits, LinearLogits)
    assert out.num_tokens == V
    rows = torch.tensor([0, 7, 8, 29], device=device)
    torch.testing.assert_close(out.logits_of(rows), logits.flatten(0, 1)[rows])


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.usefixtures("uncompiled")
def test_loss_and_gradients_are_those_of_the_logits(name, weighted, device):
    losses, gradients = [], []
    for path in (lambda net: net, refuse):
        net = path(ACCEPTED[name]().to(device))
        wrapper = NonAutoregressiveWrapper(net, mask_id=MASK, use_simple_mdlm_loss_weight=weighted)
        torch.manual_seed(5)
        losses.append(wrapper(clean(device)).loss)
        losses[-1].backward()
        gradients.append([parameter.grad for parameter in wrapper.parameters()])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert_gradients(*gradients)


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("options", [{}, {"self_cond": True, "can_mask_prev_unmasked": True}], ids=str)
@pytest.mark.usefixtures("uncompiled")
def test_generation_is_that_of_the_logits(name, options, device, monkeypatch):
    """In float64 before the sampler's float32, summed in one order: of positions that are equally sure, as there are
    where ids tie, a rounding would decide which is masked again."""
    monkeypatch.setenv("FASTMASK_BACKEND", "reference")
    ids = []
    for path in (lambda net: net, refuse):
        net = path(ACCEPTED[name]().to(device))
        options = {**options, "self_cond": options.get("self_cond", False) and name != "narrow embedding"}
        torch.manual_seed(6)
        wrapper = NonAutoregressiveWrapper(net, mask_id=MASK, steps=4, **options).to(device, torch.float64)
        torch.manual_seed(7)
        ids.append(wrapper.generate(16))
    assert torch.equal(*ids)


# ---- networks whose head is not, or not provably ----


def copied_tied() -> TransformerWrapper:
    """The copy's lambda still multiplies with the original's weights, which training will not change."""
    net = copy.deepcopy(transformer(tie_embedding=True))
    with torch.no_grad():
        net.token_emb.emb.weight.mul_(2.0)
    return net


def borrowed_lambda() -> TransformerWrapper:
    net, other = transformer(), transformer(tie_embedding=True)
    net.to_logits = None  # forget the module, then take the other's function
    del net.to_logits
    net.to_logits = other.to_logits
    return net


def own_lambda() -> TransformerWrapper:
    net = transformer(tie_embedding=True)
    net.to_logits = lambda e: e @ net.token_emb.emb.weight.t() * 3.0
    return net


def sequential_head() -> TransformerWrapper:
    return transformer(to_logits=nn.Sequential(nn.Linear(D, V), nn.Tanh()))


def linear_subclass() -> TransformerWrapper:
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    return transformer(to_logits=Doubled(D, V))


def hooked(where: str, how: str):
    def build():
        net = transformer()
        module = net.to_logits if where == "head" else net
        getattr(module, f"register_{how}")(
            {
                "forward_hook": lambda module, arguments, output: 2 * output,
                "forward_pre_hook": lambda module, arguments: None,
                "full_backward_hook": lambda module, grad_input, grad_output: None,
                "full_backward_pre_hook": lambda module, grad_output: None,
            }[how]
        )
        return net

    return build


def weight_normed() -> TransformerWrapper:
    net = transformer()
    nn.utils.parametrizations.weight_norm(net.to_logits)
    return net


def weight_normed_embedding() -> TransformerWrapper:
    net = transformer(tie_embedding=True)
    nn.utils.parametrizations.weight_norm(net.token_emb.emb)
    return net


def pruned() -> TransformerWrapper:
    net = transformer()
    nn.utils.prune.l1_unstructured(net.to_logits, "weight", amount=0.5)
    return net


class Doubled(TransformerWrapper):
    """A network with a forward of its own, embeddings as ever."""

    def forward(self, *arguments, **options):
        out = super().forward(*arguments, **options)
        return out if options.get("return_embeddings") else 2 * out


def own_forward() -> TransformerWrapper:
    net = transformer()
    original = net.forward
    net.forward = lambda *a, **k: original(*a, **k) if k.get("return_embeddings") else 2 * original(*a, **k)
    return net


def own_head_forward() -> TransformerWrapper:
    net = transformer()
    original = net.to_logits.forward
    net.to_logits.forward = lambda e: 2 * original(e)
    return net


def compiled_then_hooked() -> nn.Module:
    net = torch.compile(transformer(), backend="eager")
    net.register_forward_hook(lambda module, arguments, output: 2 * output)
    return net


def compiled_head() -> TransformerWrapper:
    net = transformer()
    net.to_logits = torch.compile(net.to_logits, backend="eager")
    return net


# Each gives logits [B, N, V], so each must train, and as its logits say.
REFUSED = {
    "deep copy of a tied net": copied_tied,
    "another net's tied head": borrowed_lambda,
    "another function": own_lambda,
    "sequential": sequential_head,
    "subclass of Linear": linear_subclass,
    "sigsoftmax": lambda: transformer(sigsoftmax_logits=True),
    "squeeze_out_last_dim": lambda: transformer(squeeze_out_last_dim=True),
    "forward hook on the net": hooked("net", "forward_hook"),
    "pre-hook on the net": hooked("net", "forward_pre_hook"),
    "backward hook on the net": hooked("net", "full_backward_hook"),
    "backward pre-hook on the net": hooked("net", "full_backward_pre_hook"),
    "forward hook on the head": hooked("head", "forward_hook"),
    "pre-hook on the head": hooked("head", "forward_pre_hook"),
    "backward hook on the head": hooked("head", "full_backward_hook"),
    "backward pre-hook on the head": hooked("head", "full_backward_pre_hook"),
    "weight norm": weight_normed,
    "weight norm of the embedding": weight_normed_embedding,
    "pruning": pruned,
    "subclass with its own forward": lambda: transformer(Doubled),
    "instance with its own forward": own_forward,
    "head with its own forward": own_head_forward,
    "compiled, then hooked": compiled_then_hooked,
    "compiled head": compiled_head,
    "mixture of softmax": lambda: transformer(mixture_of_softmax=True),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("uncompiled")
def test_a_refused_network_trains_on_its_own_logits(name, device, monkeypatch):
    with device:  # a borrowed head lies there too
        net, tokens = REFUSED[name](), clean(device)
    assert heads.of_transformer(net).head is None
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK)
    drawn = []
    sampling = backbone.functional.mask_sampling
    monkeypatch.setattr(
        backbone.functional, "mask_sampling", lambda *a, **k: drawn.append(sampling(*a, **k)) or drawn[-1]
    )
    torch.manual_seed(5)
    loss = wrapper(tokens).loss
    (masked,) = drawn
    losses = F.cross_entropy(net(masked.masked_ids)[..., :MASK].transpose(1, 2), tokens, reduction="none")
    expected = (losses * masked.is_masked * masked.loss_weights[:, None]).sum() / tokens.numel()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    parameters = list(net.parameters())
    assert_gradients(
        torch.autograd.grad(loss, parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
    )
    generated = wrapper.generate(2, steps=2)
    assert (generated < V).all()
    assert (generated != MASK).all()


POOLED = {
    "average pool": {"average_pool_embed": True},
    "cls token": {"use_cls_token": True},
    "attention pool": {"attn_pool": True},
    "several heads": {"num_output_heads": 2},
    "embeddings only, several": {"return_only_embed": True, "num_output_heads": 2},
}


@pytest.mark.parametrize("name", POOLED)
def test_a_network_whose_output_is_not_one_row_a_token_is_refused_by_name(name, device):
    """The short way would train the unpooled rows in silence."""
    net = transformer(**POOLED[name]).to(device)
    assert heads.of_transformer(net).head is None
    if name == "embeddings only, several":
        return  # its "logits" are its embeddings: [B, N, D], of the right kind of shape
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK)
    with pytest.raises(ValueError, match=r"expected net\(ids \[5, 6\]\) to return logits \[B, N, V\], received"):
        wrapper(clean(device))


# ---- what the caller passes through ----


def test_arguments_that_change_the_logits_only_are_not_lost(device):
    """x-transformers cuts prepended embeddings off again only on its way to logits."""
    net, tokens = transformer().to(device), clean(device)
    prepended = torch.randn(5, 2, D, generator=torch.Generator().manual_seed(2)).to(device)
    options = {"prepend_embeds": prepended, "excise_prepend_embeds": True}
    losses = []
    for path in (lambda net: net, refuse):
        wrapper = NonAutoregressiveWrapper(path(net), mask_id=MASK)
        torch.manual_seed(5)
        losses.append(wrapper(tokens, **options).loss)
        torch.manual_seed(6)
        assert wrapper.generate(5, steps=2, **options).shape == tokens.shape
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("path", [lambda net: net, refuse], ids=["embeddings", "logits"])
@pytest.mark.parametrize("option", ["return_intermediates", "prepend_embeds"])
def test_output_of_another_shape_is_refused(path, option, device):
    wrapper = NonAutoregressiveWrapper(path(transformer().to(device)), mask_id=MASK)
    value = torch.zeros(5, 2, D, device=device) if option == "prepend_embeds" else True
    with pytest.raises(ValueError, match=r"expected net\(ids \[5, 6\]\) to return .* received (tuple|\[5, 8, 1)"):
        wrapper(clean(device), **{option: value})


class Recorder(nn.Module):
    """A network that writes down what it was called with."""

    def __init__(self, vocabulary: int = V, outputs: int = V) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = vocabulary, N, D
        self.embedding = nn.Embedding(vocabulary, outputs)
        self.calls: list[dict] = []

    def forward(self, ids, **kwargs):
        self.calls.append({"ids": ids.clone(), **kwargs})
        return self.embedding(ids)


def test_mask_reaches_network_and_critic(device):
    net, critic = Recorder().to(device), Recorder(outputs=1).to(device)
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK, token_critic=critic)
    mask = torch.ones(5, N, dtype=torch.bool, device=device)
    wrapper(clean(device), mask=mask, anything="else")
    wrapper.generate(5, steps=1, mask=mask, anything="else")
    for module in (net, critic):
        assert len(module.calls) == 2
        for call in module.calls:
            assert call["mask"] is mask
            assert call["anything"] == "else"
    wrapper.nelbo(clean(device), mask=mask)
    assert net.calls[-1]["mask"] is mask


def test_mask_changes_what_the_network_says(device):
    """A padding mask that reaches the attention: padded tokens have no influence."""
    net = transformer().to(device)
    wrapper, tokens = NonAutoregressiveWrapper(net, mask_id=MASK), clean(device)
    mask = torch.ones(5, N, dtype=torch.bool, device=device)
    mask[:, 4:] = False
    losses = []
    for padding in (0, 1):
        tokens[:, 4:] = padding
        torch.manual_seed(5)
        losses.append(wrapper(tokens, mask=mask, maskable=mask).loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("critic", ["self", "cross-attending", "without cross-attention"])
def test_context_reaches_whoever_can_attend_to_it(critic, device):
    net = transformer(layers=encoder(cross_attend=True)).to(device)
    options = {"self_token_critic": critic == "self"}
    if critic != "self":
        layers = encoder(cross_attend=critic == "cross-attending")
        options["token_critic"] = transformer(layers=layers, logits_dim=1).to(device)
    wrapper, tokens = NonAutoregressiveWrapper(net, mask_id=MASK, **options).to(device), clean(device)
    losses = []
    for seed in (0, 1):
        context = torch.randn(5, 3, D, generator=torch.Generator().manual_seed(seed)).to(device)
        kwargs = {"context": context, "context_mask": torch.ones(5, 3, dtype=torch.bool, device=device)}
        torch.manual_seed(5)
        losses.append(wrapper(tokens, generator_sample_temperature=1e-3, **kwargs))
        assert wrapper.generate(5, steps=2, **kwargs).shape == (5, N)
    assert losses[0].generator_loss != losses[1].generator_loss
    if critic == "cross-attending":
        assert losses[0].critic_loss != losses[1].critic_loss


def test_any_callable_will_do(device):
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(4)).to(device).requires_grad_()

    def net(ids):
        return table[ids]

    net.num_tokens, net.max_seq_len = V, N
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK)
    wrapper(clean(device)).loss.backward()
    assert table.grad is not None
    assert (table.grad[MASK] != 0).any()
    if device.type == "cpu":  # a function has no device of its own: generation takes torch's default
        out = wrapper.generate(4)
        assert out.shape == (4, N)
        assert (out != MASK).all()


def test_any_module_will_do_and_its_device_is_found(device):
    wrapper = NonAutoregressiveWrapper(Recorder().to(device), mask_id=MASK)
    wrapper(clean(device)).loss.backward()
    assert wrapper.generate(3).device.type == device.type
    assert backbone.device_of(nn.BatchNorm1d(3, affine=False).to("meta")) == torch.device("meta")
    assert backbone.device_of(lambda ids: ids) == torch.get_default_device()


def test_a_network_that_does_not_give_logits_is_named(device):
    class Wrong(Recorder):
        def forward(self, ids, **kwargs):
            return None

    with pytest.raises(ValueError, match=r"to return logits \[B, N, V\], received NoneType"):
        NonAutoregressiveWrapper(Wrong().to(device), mask_id=MASK)(clean(device))


def test_x_transformers_is_not_imported_on_its_account(device, monkeypatch):
    monkeypatch.delitem(heads.sys.modules, "x_transformers.x_transformers")
    assert heads.of_transformer(transformer()).head is None


def test_a_critic_is_spared_arguments_that_it_does_not_take(device):
    """``mask=`` and what else the network wants, for a critic whose forward names only some of them."""
    seen = []

    class Bare(Recorder):
        def forward(self, ids, mask=None):
            seen.append(mask)
            return self.embedding(ids)

    wrapper = NonAutoregressiveWrapper(Recorder(), mask_id=MASK, token_critic=Bare(outputs=1)).to(device)
    mask = torch.ones(5, N, dtype=torch.bool, device=device)
    wrapper(clean(device), mask=mask, anything="else")
    wrapper.generate(5, steps=1, mask=mask, anything="else")
    assert len(seen) == 2
    assert all(value is mask for value in seen)
