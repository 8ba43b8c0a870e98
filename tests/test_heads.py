"""Which way is taken through a network's head: declared, named, proved or neither; and how wide it may be."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from x_transformers import Decoder, Encoder, TransformerWrapper

from fastmask import Head, NonAutoregressiveWrapper, functional
from fastmask.heads import Heads, Way, is_plain

V, N, D, MASK = 11, 6, 8, 10


class Trunk(nn.Module):
    """Embeddings, each mixed with the others' mean; noise in training."""

    def __init__(self, columns: int = V, width: int = D) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_tokens, self.max_seq_len, self.emb_dim = V, N, width
        self.embed = nn.Embedding(V, width)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(width, columns)
        self.asked: list[bool] = []

    def embeddings(self, ids):
        x = self.embed(ids)
        return self.dropout(torch.tanh(x + x.mean(dim=1, keepdim=True)))

    def forward(self, ids, return_embeddings=False):
        self.asked.append(return_embeddings)
        x = self.embeddings(ids)
        return x if return_embeddings else self.logits(x)

    def logits(self, x):
        return self.out(x)


class Declares(Trunk):
    def linear_head(self):
        return Head(self.out.weight, self.out.bias)


class Capped(Trunk):
    """c tanh((scale e W + b) / c), declared."""

    def linear_head(self):
        return Head(self.out.weight, self.out.bias, scale=0.5, softcap=2.0)

    def logits(self, x):
        return 2.0 * torch.tanh(self.out(0.5 * x) / 2.0)


class Bare(Trunk):
    """An nn.Linear called to_logits."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.to_logits = self.out
        del self.out

    def logits(self, x):
        return self.to_logits(x)


class Doubles(Bare):
    """Whose logits are not those of to_logits."""

    def logits(self, x):
        return 2.0 * self.to_logits(x)


class Normalises(Bare):
    """Whose embeddings are not what to_logits takes."""

    def forward(self, ids, return_embeddings=False):
        x = self.embeddings(ids)
        return F.normalize(x, dim=-1) if return_embeddings else self.to_logits(x)


class Logits(Trunk):
    """The same network that declares nothing."""

    def forward(self, ids):
        return self.logits(self.embeddings(ids))


class LogitsOnly(Heads):
    def way(self, net):
        return Way(None, "")

    def prove(self, net, ids, arguments):
        pass


def clean(device, batch: int = 5) -> torch.Tensor:
    return torch.randint(0, MASK, (batch, N), generator=torch.Generator().manual_seed(1)).to(device)


def wrap(net: nn.Module, device, **options) -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(net, mask_id=MASK, steps=3, **options).to(device)


def named(net: Trunk) -> dict:
    return {"head": net.out}


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (Declares, lambda net: {}, "net.linear_head()"),
        (Capped, lambda net: {}, "net.linear_head()"),
        (Trunk, named, "head= of the wrapper"),
        (Bare, lambda net: {}, "net.to_logits, as a run has shown"),
    ],
)
def test_a_linear_head_gives_what_the_logits_give(kind, options, reason, device):
    """Loss, gradients, bound and generation; the network is asked for embeddings only."""
    net = kind()
    model, plain = wrap(net, device, **options(net)), wrap(copy.deepcopy(net), device)
    assert model.has_linear_head
    assert f"linear_head=True ({reason})" in repr(model)
    plain._heads = LogitsOnly()
    results = []
    for wrapper in (model.eval(), plain.eval()):
        wrapper.net.asked.clear()
        torch.manual_seed(3)
        loss = wrapper(clean(device)).loss
        loss.backward()
        assert set(wrapper.net.asked) == {wrapper is model}
        bound = wrapper.nelbo(clean(device), seed=2, num_samples=2)
        torch.manual_seed(4)
        ids = wrapper.generate(4, filter_thres=None)
        results.append((loss, bound, [p.grad for p in wrapper.parameters()], ids))
    torch.testing.assert_close(results[0][:3], results[1][:3])
    assert torch.equal(results[0][3], results[1][3])


@pytest.mark.parametrize("kind", [Doubles, Normalises])
def test_a_bare_head_that_is_not_all_gives_logits_and_a_warning(kind, device):
    model, declared_nothing = wrap(kind(), device).eval(), wrap(Logits(), device).eval()
    torch.manual_seed(3)
    with pytest.warns(
        UserWarning, match=f"the logits of {kind.__name__}, although .*: its logits are not to_logits'"
    ):
        loss = model(clean(device)).loss
    assert not model.has_linear_head
    assert "linear_head=False (its logits are not to_logits' of its embeddings)" in repr(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        model(clean(device))
    if kind is Normalises:
        declared_nothing.load_state_dict({k.replace("to_logits", "out"): v for k, v in model.state_dict().items()})
        torch.manual_seed(3)
        assert loss == declared_nothing(clean(device)).loss


def test_the_proof_leaves_random_numbers_and_modes_alone(device):
    model = wrap(Bare(), device).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert model.has_linear_head
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_two_threads_prove_a_head_once():
    class Slow(Bare):
        def forward(self, ids, return_embeddings=False):
            time.sleep(0.02)  # the other thread's turn
            return super().forward(ids, return_embeddings)

    net, heads, ids = Slow().train(), Heads(), clean("cpu")
    before, ways = torch.get_rng_state(), []

    def find():
        heads.prove(net, ids, {})
        ways.append(heads.way(net).reason)

    threads = [threading.Thread(target=find) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert net.asked == [False, True]
    assert ways == ["net.to_logits, as a run has shown"] * 2
    assert torch.equal(torch.get_rng_state(), before)


def test_a_disproved_head_is_at_no_time_believed():
    """Whenever another thread may look."""
    believed = []

    class Watched(Heads):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if hasattr(self, "_has_warned"):
                believed.append(self.way(net).head is not None)

    net = Doubles()
    heads = Watched()
    with pytest.warns(UserWarning, match="although it has to_logits"):
        heads.prove(net, clean("cpu"), {})
    assert len(believed) >= 2
    assert not any(believed)


def test_the_proof_takes_a_row_of_the_arguments(device):
    class Conditioned(Bare):
        def forward(self, ids, shift, return_embeddings=False):
            x = self.embeddings(ids) + shift[:, None]
            return x if return_embeddings else self.to_logits(x)

    model = wrap(Conditioned(), device)
    model(clean(device), shift=torch.ones(5, D, device=device))
    assert "as a run has shown" in repr(model)


def test_weights_are_those_of_the_call(device):
    """After load_state_dict, in a deep copy, after pickling."""
    for kind, options in ((Declares, {}), (Trunk, None), (Bare, {})):
        net = kind()
        model = wrap(net, device, **(named(net) if options is None else options)).eval()
        model.nelbo(clean(device), seed=0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.has_linear_head
            assert set(other.state_dict()) == {f"net.{name}" for name in net.state_dict()}
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.zero_()
            torch.testing.assert_close(other.nelbo(clean(device), seed=0).item(), math.log(MASK))
        assert abs(model.nelbo(clean(device), seed=0).item() - math.log(MASK)) > 1e-3


def test_a_head_that_is_no_plain_tensor_gives_logits(device):
    class Split(torch.Tensor):
        """As a DTensor is: a subclass."""

    net = Declares()
    net.out.weight = nn.Parameter(net.out.weight.detach().as_subclass(Split))
    assert not is_plain(net.out.weight)
    assert Heads().way(net) == (None, "the head's weight is a Split, no plain tensor")


def test_a_network_may_declare_that_it_has_no_head(device):
    net = Declares()
    net.linear_head = lambda: None
    assert Heads().way(net) == (None, "Declares.linear_head() is None")
    net.head_reason = "an adapter on the head"
    model = wrap(net, device)
    assert not model.has_linear_head
    assert "linear_head=False (an adapter on the head)" in repr(model)
    model(clean(device)).loss.backward()
    assert net.asked == [False]


def test_a_declared_head_of_another_kind_is_refused(device):
    net = Declares()
    net.linear_head = lambda: net.out
    with pytest.raises(
        TypeError, match=r"expected net.linear_head\(\) to return fastmask.Head\(weight, bias\), or None, rec.*Lin"
    ):
        wrap(net, device)(clean(device))
    with pytest.raises(TypeError, match=r"expected head to be an nn\.Linear of the network, received Embedding"):
        wrap(net, device, head=net.embed)
    with pytest.raises(ValueError, match="expected head to be a module of net, received another"):
        wrap(net, device, head=nn.Linear(D, V))


# ---- widths ----


class Constant(nn.Module):
    """Logits that do not depend on the ids."""

    def __init__(self, columns: int, mask_column: float = 5.0, **attributes) -> None:
        super().__init__()
        row = torch.zeros(columns)
        row[MASK:] = mask_column  # the mask's, and padding
        self.row = nn.Parameter(row)
        self.num_tokens, self.max_seq_len = V, N
        vars(self).update(attributes)

    def forward(self, ids):
        return self.row.expand(*ids.shape, -1)


@pytest.mark.parametrize("columns", [MASK, V, V + 1, 64])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_mask_and_padding_are_no_predictions(columns, weighted, device):
    """A uniform model over ten ids costs ln 10, whatever it says of the mask; those columns get no gradient."""
    model = wrap(Constant(columns), device, use_simple_mdlm_loss_weight=weighted, no_replace_prob=0.0)
    assert model.nelbo(clean(device), 8).item() == pytest.approx(math.log(MASK), abs=1e-5)
    loss = model(clean(device).fill_(3)).loss  # an id that is a tenth of what is masked has no gradient
    if not weighted:
        assert loss.item() == pytest.approx(math.log(MASK), abs=1e-5)
    loss.backward()
    assert (model.net.row.grad[:MASK] != 0).all()
    assert (model.net.row.grad[MASK:] == 0).all()
    assert model.generate(64, filter_thres=None).max() < MASK


@pytest.mark.parametrize("kind", [Declares, Trunk])
def test_a_padded_head_is_cut(kind, device):
    """Rows of the weight past num_tokens: gradients reach the others, as in float64 by formula."""
    net = kind(columns=32)
    model = wrap(net, device, **({} if kind is Declares else named(net))).double().eval()
    masked = functional.mask_sampling(clean(device), mask_id=MASK, num_tokens=V, seed=1, no_replace_prob=0.0)
    out = model._run(model._formulas, masked.masked_ids)
    assert out.num_tokens == V
    loss = out.loss(clean(device), masked, None, masked.num_masked, None).loss
    embeddings = net.embeddings(masked.masked_ids)
    logits = F.linear(embeddings, net.out.weight[:MASK], net.out.bias[:MASK])
    expected = F.cross_entropy(logits[masked.is_masked], clean(device)[masked.is_masked])
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, [net.out.weight, net.out.bias]),
        torch.autograd.grad(expected, [net.out.weight, net.out.bias]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
        assert (ours[MASK:] == 0).all()


@pytest.mark.parametrize("method", ["forward", "nelbo", "generate"])
def test_other_widths_are_refused_with_both(method, device):
    """Embeddings returned for logits, by whatever tells their width; a head that lacks more than the mask."""
    by_attribute = Constant(4, emb_dim=4)
    by_module = Constant(4)
    by_module.embed = nn.Embedding(V, 4)
    for net in (by_attribute, by_module):
        arguments = (2,) if method == "generate" else (clean(device),)
        with pytest.raises(
            ValueError, match=r"expected logits of net.num_tokens = 11 columns .*, received 4; return log"
        ):
            getattr(wrap(net, device), method)(*arguments)
    lacks = wrap(Constant(10), device)
    lacks.mask_id = 9
    with pytest.raises(ValueError, match=r"the last may lack from mask_id 9 on.*, received 10"):
        lacks.nelbo(clean(device).clamp(max=8))


def test_compat_keeps_every_column(device):
    model = wrap(Constant(V), device, compat=True, use_simple_mdlm_loss_weight=False)
    expected = math.log(MASK + math.exp(5.0))
    assert model(clean(device)).loss.item() == pytest.approx(expected, abs=1e-5)
    assert (model.generate(64) == MASK).any()


# ---- what is looked at once ----


def test_ids_are_looked_at_in_the_first_batch(device):
    tokens = clean(device)
    dirty = tokens.clone()
    dirty[1, 2] = MASK
    maskable = dirty != MASK
    for method in ("forward", "nelbo"):
        model = wrap(Logits(), device)
        message = r"expected .* other than 10, received 10 at \[1, 2\] and 0 more; clean the data, or give mask"
        with pytest.raises(ValueError, match=message):
            getattr(model, method)(dirty)
        strange = dirty + torch.where(maskable, 0, V)  # no id at all, if not maskable
        with pytest.raises(ValueError, match=r"received 21 at \[1, 2\] and 0 more"):
            getattr(model, method)(strange, maskable=maskable)
        getattr(model, method)(dirty, maskable=maskable)
        assert model.nelbo(dirty, num_samples=4).isinf()  # not looked at again, and it costs infinity
    with pytest.raises(ValueError, match="received 11 at"):
        wrap(Constant(V), device)(tokens + 1 + (tokens == 9))
    model = wrap(Logits(), device, check="always")
    model(tokens)
    with pytest.raises(ValueError, match="received 10 at"):
        model(dirty)
    assert wrap(Logits(), device, check="never").nelbo(dirty, 4).isinf()
    wrap(Logits(), device, compat=True)(dirty)
    with pytest.raises(ValueError, match="expected check to be one of 'first', 'always', 'never'; received 'once'"):
        wrap(Logits(), device, check="once")


# ---- networks of others ----


def test_a_hugging_face_model_is_refused_with_the_remedy_and_then_fits(device):
    class Config:
        vocab_size, max_position_embeddings = V, N

    class Output(dict):
        @property
        def logits(self):
            return self["logits"]

    class MaskedLM(Logits):
        def __init__(self):
            super().__init__()
            self.config = Config()
            del self.num_tokens, self.max_seq_len

        def forward(self, input_ids):
            return Output(logits=super().forward(input_ids))

    net = MaskedLM()
    with pytest.raises(
        TypeError, match=r"received MaskedLM, a Hugging Face model; wrap it in fastmask.hf.Backbone, or set net.num_t"
    ):
        wrap(net, device)
    net.num_tokens, net.max_seq_len = net.config.vocab_size, net.config.max_position_embeddings
    model = wrap(net, device)
    model(clean(device)).loss.backward()
    assert net.out.weight.grad is not None
    assert model.generate(2).shape == (2, N)


def test_a_causal_network_warns():
    layers = {"dim": D, "depth": 1, "heads": 2, "attn_dim_head": 4}
    with pytest.warns(
        UserWarning, match=r"the attention of TransformerWrapper is causal: .*build the network over an Enc"
    ):
        wrap(TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=Decoder(**layers)), "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=Encoder(**layers)), "cpu")


def test_a_self_critic_on_a_network_of_ones_own(device):
    for net in (Trunk(), Declares()):
        if isinstance(net, Declares):
            del net.emb_dim
        model = wrap(net, device, self_token_critic=True)
        losses = model(clean(device))
        losses.loss.backward()
        assert model.token_critic.to_logits.weight.grad is not None
        assert model.generate(2).shape == (2, N)
