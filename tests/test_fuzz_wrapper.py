"""Random option sets of the wrapper: its step of training, evaluation and generation keep what is promised.

Some 100 in the plain suite, the same each time; a long run: ``FASTMASK_FUZZ_EXAMPLES=10000 pytest -n 0 -s
tests/test_fuzz_wrapper.py``, which draws new ones.
"""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from x_transformers import Encoder, TransformerWrapper

from fastmask import Head, NonAutoregressiveWrapper, Schedule

EXAMPLES = int(os.environ.get("FASTMASK_FUZZ_EXAMPLES", 0))
PROFILE = settings(
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    print_blob=True,
    phases=(Phase.generate, Phase.shrink) if EXAMPLES else (Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
WIDTH, MAX_LENGTH = 4, 9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


# Networks


class Net(nn.Module):
    """A network of which everything is known; nothing is multiplied as a matrix but by fastmask itself, so that a
    sequence gets the same bits in every batch.

    head: how its logits are had, see ``Setting``.
    """

    def __init__(self, vocabulary: int, head: str, writes: bool, dropout: float) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = vocabulary, MAX_LENGTH, WIDTH
        self.attn_layers = SimpleNamespace(dim=WIDTH)
        self.head, self.writes = head, writes
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Parameter(torch.randn(MAX_LENGTH, WIDTH))
        self.out = nn.Linear(WIDTH, vocabulary + 3 * (head == "padded"))
        self.dropout = nn.Dropout(dropout)
        self.modes: set[bool] = set()
        if head == "to_logits":
            self.to_logits = self.out
        if head == "declared":
            self.linear_head = lambda: Head(self.out.weight, self.out.bias)

    def forward(
        self, ids: Tensor, return_embeddings: bool = False, return_logits_and_embeddings: bool = False,
        sum_embeds: Tensor | float = 0.0, shift: Tensor | float = 0.0,
    ) -> Any:  # fmt: skip
        self.modes.add(self.training)
        e = self.embedding(ids.long().clone()) + self.places[: ids.shape[1]]
        e = self.dropout(torch.tanh(e + 0.5 * e.sum(dim=1, keepdim=True))) + sum_embeds + shift
        if self.writes:
            ids.zero_()
        if return_embeddings:
            return e
        logits = (e[..., None, :] * self.out.weight).sum(dim=-1) + self.out.bias
        if self.head == "output":
            return SimpleNamespace(logits=logits)
        return (logits, e) if return_logits_and_embeddings else logits


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * torch.sin(7.0 * ids + torch.arange(ids.shape[1]))


# Settings


class Setting(NamedTuple):
    """An option set.

    network: "own" or "transformer". head: of an own network, "logits", "padded" (more columns than ids), "output"
    (an object with .logits), "declared" (linear_head()), "to_logits" (an nn.Linear of that name), "given" (head=).
    """

    network: str
    head: str
    writes: bool
    dropout: float
    dtype: str
    vocabulary: int
    mask_id: int
    batch: int
    length: int
    ids_dtype: torch.dtype
    seed: int
    critic: str
    is_training: bool
    wrapper: dict[str, Any]
    own_masks: str | None
    maskable: bool
    complement: bool
    with_metrics: bool
    only: str | None
    part: str | None
    shift: bool
    generation: dict[str, Any]
    prompt: str | None
    forbids: bool


SCHEDULES: dict[str, Any] = {
    "linear": "linear",
    "cosine": "cosine",
    "number": 0.15,
    "one": 1.0,
    "callable": lambda t: 1 - t**2,
    "Schedule": Schedule(lambda t: (1 - t) ** 1.5, lambda t: -1.5 * (1 - t) ** 0.5),
}
RATIOS = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: math.cos(math.pi / 2 * t),
    "number": lambda t: 1 - t,
    "one": lambda t: 1 - t,
    "callable": lambda t: 1 - t**2,
    "Schedule": lambda t: (1 - t) ** 1.5,
}


@st.composite
def settings_of_all(draw: Any) -> Setting:
    """Option sets that the wrapper accepts."""

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    compat = one(False, False, False, True)
    is_own = one(True, True, True, False)
    self_cond = one(False, False, True)
    heads = ["logits", "logits", "to_logits", "declared", "given"]
    if not compat:
        heads += ["padded"]
    if not self_cond:
        heads += ["output"]
    head = one(*heads) if is_own else "own"
    vocabulary = one(2, 3, 7, 12)
    schedule = one(*SCHEDULES)
    is_number = schedule in ("number", "one")
    weighted = one(None, False) if is_number else one(None, None, True, False)
    is_mean = weighted is False or (weighted is None and is_number)
    critic = one("none", "none", "own", "self")
    gate = "batch" if compat else one("batch", "batch", "token")
    wrapper: dict[str, Any] = {
        "schedule": schedule,
        "steps": one(1, 2, 3, 5),
        "self_cond": self_cond,
        "self_cond_train_prob": one(0.0, 0.75, 1.0),
        "no_replace_prob": one(0.0, 0.15, 0.1),
        "random_token_prob": one(0.0, 0.1, 0.5),
        "can_mask_prev_unmasked": one(False, False, True),
        "critic_loss_weight": one(1.0, 0.3, 0.0),
        "use_simple_mdlm_loss_weight": weighted,
        "mask_mode": one("exact", "exact", "bernoulli"),
        "stratified_times": one(False, True),
        "compat": compat,
    }
    if gate == "token":
        wrapper["gate"] = gate
    if not compat and vocabulary > 3 and one(False, True):
        wrapper["random_excludes"] = [0, 1]
    own_masks = one(None, None, "masks", "ids") if is_mean else None
    only = one(None, None, None, "generator")
    if critic != "none" and only is None:
        only = one(None, None, "critic")
    start_temperature = one(1.0, 1.0, 0.0, 0.5)
    generation: dict[str, Any] = {"start_temperature": start_temperature, "filter_thres": one(0.7, None, 0.0, 0.95)}
    if one(False, True):
        generation["noise_level_scale"] = one(0.0, 1.0, 3.0)
    if one(False, True):
        generation["choice_temperature"] = one(0.0, 4.5, 1)
    if not compat:
        if one(False, False, True):
            generation["top_p"] = one(0.0, 0.5, 0.9, 1.0)
        if one(False, False, True):
            generation["threshold"] = one(0.0, 0.3, 0.9, 1.0)
        if one(False, False, True):
            generation |= {"block_length": one(1, 2, 3, 50), "block_origin": one("prompt", "zero")}
        if one(False, False, True) and not wrapper["can_mask_prev_unmasked"]:
            generation["commits"] = one(0, 1, 3)
        is_free = "block_length" not in generation and not wrapper["can_mask_prev_unmasked"]
        if is_free and one(False, False, True):  # of one block, where the steps that only edit are the last
            generation |= {"editing_threshold": one(0.0, 0.3, 1.0), "editing_steps": one(1, 3)}
        if one(False, False, True):
            generation |= {"cfg_scale": one(0.0, 1.0, 4.0), "unconditional": {}}
    if one(False, True):
        generation["steps"] = one(1, 2, 4, MAX_LENGTH)
    return Setting(
        network="own" if is_own else "transformer",
        head=head,
        writes=is_own and not compat and one(False, True),
        dropout=one(0.0, 0.0, 0.3),
        dtype=one("float32", "float32", "bfloat16", "float64"),
        vocabulary=vocabulary,
        mask_id=one(0, vocabulary - 1, vocabulary // 2),
        batch=one(1, 2, 3, 0),
        length=one(MAX_LENGTH, MAX_LENGTH, 1, 4),
        ids_dtype=one(torch.int64, torch.int32),
        seed=draw(st.integers(0, 2**31)),
        critic=critic,
        is_training=one(True, False),
        wrapper=wrapper,
        own_masks=own_masks,
        maskable=own_masks is None and one(False, True),
        complement=own_masks is None and not compat and one(False, False, True),
        with_metrics=one(False, True),
        only=only,
        part=one(None, None, "num_tokens", "num_masked" if is_mean else "num_tokens"),
        shift=is_own and one(False, False, True),
        generation=generation,
        prompt=one(None, None, "rows", "row", "short"),
        forbids=not compat and vocabulary > 3 and one(False, False, True),
    )


class Built(NamedTuple):
    """A setting come true. x: [B, N] clean ids; some: [B, N] bool, random."""

    setting: Setting
    wrapper: NonAutoregressiveWrapper
    x: Tensor
    some: Tensor
    arguments: dict[str, Any]


def build(setting: Setting) -> Built:
    torch.manual_seed(setting.seed)
    vocabulary = setting.vocabulary
    if setting.network == "own":
        net: nn.Module = Net(vocabulary, setting.head, setting.writes, setting.dropout)
    else:
        layers = Encoder(dim=8, depth=1, heads=1, attn_dim_head=8, layer_dropout=0.0, ff_dropout=setting.dropout)
        net = TransformerWrapper(num_tokens=vocabulary, max_seq_len=MAX_LENGTH, attn_layers=layers)
    options = {**setting.wrapper, "schedule": SCHEDULES[setting.wrapper["schedule"]]}
    if setting.critic == "own":
        options["token_critic"] = Critic()
    options["self_token_critic"] = setting.critic == "self"
    if setting.head == "given":
        options["head"] = net.out
    wrapper = NonAutoregressiveWrapper(net, mask_id=setting.mask_id, **options).to(DTYPES[setting.dtype])
    wrapper.train(setting.is_training)
    if setting.dropout and setting.network == "own":  # a module whose mode differs from its parent's
        net.dropout.train(not setting.is_training)
    shape = setting.batch, setting.length
    x = torch.randint(0, vocabulary - 1, shape)
    x = (x + (x >= setting.mask_id)).to(setting.ids_dtype)
    arguments: dict[str, Any] = {}
    if setting.shift:
        arguments["shift"] = torch.randn(setting.batch, 1, WIDTH, dtype=DTYPES[setting.dtype])
    return Built(setting, wrapper, x, torch.rand(shape) < 0.6, arguments)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def nothing_else_changes(built: Built, *tensors: Tensor):
    """Modes, parameters and gradients stay as they are, and so do what was given and, without dropout, torch's own
    random numbers."""
    wrapper = built.wrapper
    modes = [module.training for module in wrapper.modules()]
    state = {name: value.clone() for name, value in wrapper.state_dict().items()}
    gradients = [parameter.grad for parameter in wrapper.parameters()]
    given = [(tensor, tensor.clone()) for tensor in (built.x, *tensors)]
    random = torch.get_rng_state()
    is_grad = torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled() == is_grad
    assert [module.training for module in wrapper.modules()] == modes, "modes"
    after = wrapper.state_dict()
    assert list(after) == list(state), "the names of the state"
    assert all(torch.equal(after[name], value) for name, value in state.items()), "parameters"
    assert [parameter.grad for parameter in wrapper.parameters()] == gradients, "gradients"
    assert all(torch.equal(tensor, before) for tensor, before in given), "what was given"
    if not built.setting.dropout:
        assert torch.equal(torch.get_rng_state(), random), "torch's random numbers"


# Training


def training_arguments(built: Built) -> dict[str, Any]:
    setting = built.setting
    options: dict[str, Any] = dict(built.arguments)
    if setting.maskable:
        options["maskable"] = built.some
    if setting.own_masks:
        options["is_masked"] = built.some
        if setting.own_masks == "ids":
            options["masked_ids"] = built.x.masked_fill(built.some, setting.mask_id).roll(1, -1)
    if setting.complement:
        options["complement"] = True
    if setting.with_metrics:
        options["with_metrics"] = True
    if setting.only:
        options[f"only_train_{setting.only}"] = True
    if setting.part:
        options[setting.part] = 50
    return options


def is_compat_weighted(setting: Setting) -> bool:
    """Upstream's weight, which is negative and may be anything."""
    is_number = setting.wrapper["schedule"] in ("number", "one")
    weighted = setting.wrapper["use_simple_mdlm_loss_weight"]
    return setting.wrapper["compat"] and (not is_number if weighted is None else weighted)


def check_training(built: Built) -> None:
    setting, wrapper = built.setting, built.wrapper
    options = training_arguments(built)
    with nothing_else_changes(built, *(value for value in options.values() if isinstance(value, Tensor))):
        out = wrapper(built.x, generator=generator(setting.seed), **options)
    metrics = None
    if setting.with_metrics:
        out, metrics = out
        assert 0 <= int(metrics.num_masked) <= built.x.numel()
        if int(metrics.num_masked):
            assert 0.0 <= float(metrics.accuracy) <= 1.0
            assert float(metrics.nll) >= 0.0
        if setting.own_masks:
            assert int(metrics.num_masked) == int(built.some.sum())
    loss, generator_loss, critic_loss = out
    has_critic = setting.critic != "none" and setting.only != "generator"
    assert (generator_loss is None) == (setting.only == "critic")
    assert (critic_loss is None) == (not has_critic)
    assert loss.shape == ()
    assert loss.dtype in (torch.float32, torch.float64)
    if not is_compat_weighted(setting):
        assert bool(loss.isfinite()), loss
        assert float(loss.detach()) >= 0.0, loss
    expected = 0.0 if generator_loss is None else float(generator_loss.detach())
    if has_critic:
        scale = 1.0 if setting.only == "critic" else setting.wrapper["critic_loss_weight"]
        expected += scale * float(critic_loss.detach())
    if math.isfinite(expected):
        assert math.isclose(float(loss.detach()), expected, rel_tol=1e-6, abs_tol=1e-9), "the sum of its parts"
    check_gradients(built, loss)
    if setting.writes and not setting.dropout:  # the network's own copy of the ids
        tame = build(setting._replace(writes=False))
        other = tame.wrapper(tame.x, generator=generator(setting.seed), **options)
        other = other[0] if setting.with_metrics else other
        assert torch.equal(other.loss, loss), "a network that writes into its ids"
    if not setting.dropout:
        again = wrapper(built.x, generator=generator(setting.seed), **options)
        again = again[0] if setting.with_metrics else again
        assert torch.equal(torch.nan_to_num(again.loss), torch.nan_to_num(loss)), "the same generator, another loss"
        check_shares(built, generator_loss)


def check_shares(built: Built, generator_loss: Tensor | None) -> None:
    """A part's share of the whole, and that a mask and its complement are everything."""
    setting, wrapper = built.setting, built.wrapper
    options = {**training_arguments(built), "with_metrics": True}
    options.pop(setting.part, None)
    plain, metrics = wrapper(built.x, generator=generator(setting.seed), **options)
    num_masked = int(metrics.num_masked)
    num_maskable = int(built.some.sum()) if setting.maskable else built.x.numel()
    if setting.part and generator_loss is not None and bool(plain.generator_loss.isfinite()):
        share = max(1, num_masked if setting.part == "num_masked" else num_maskable) / 50
        expected = share * float(plain.generator_loss.detach())
        assert math.isclose(float(generator_loss.detach()), expected, rel_tol=1e-5, abs_tol=1e-7), "its share"
    if setting.complement:
        options["complement"] = False
        _, other = wrapper(built.x, generator=generator(setting.seed), **options)
        assert int(other.num_masked) + num_masked == num_maskable, "complement"


def check_gradients(built: Built, loss: Tensor) -> None:
    """They are finite, and none reaches what is not trained."""
    setting, wrapper = built.setting, built.wrapper
    names, parameters = zip(*wrapper.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
    if not is_compat_weighted(setting):
        for name, gradient in gradients.items():
            assert gradient is None or bool(gradient.isfinite().all()), name
    own_critic = [
        name for name in names if name.startswith("token_critic.") and not name.startswith("token_critic.net.")
    ]
    if setting.only == "generator":
        assert all(gradients[name] is None or not gradients[name].any() for name in own_critic), "the critic's"
    if setting.only == "critic":
        assert gradients[own_critic[0]] is not None
        if setting.critic == "own":
            others = [name for name in names if not name.startswith("token_critic.")]
            assert all(gradients[name] is None or not gradients[name].any() for name in others), "the generator's"
        return
    if setting.network == "own" and not setting.wrapper["compat"]:  # SUBS: no one trains the mask's column
        for name in ("net.out.weight", "net.out.bias"):
            gradient = gradients[name]
            assert gradient is not None, name
            assert not gradient[setting.mask_id].any(), "the mask's column"
            assert not gradient[setting.vocabulary :].any(), "columns that are no ids"
    if setting.wrapper["self_cond"]:
        assert gradients["null_embed"] is not None, "data parallelism expects a gradient of each parameter"


def check_parts(built: Built) -> None:
    """The losses of parts of a batch add up to the whole's."""
    setting = built.setting
    is_plain = setting.critic == "none" and not setting.dropout and not setting.wrapper["compat"] and not setting.part
    if setting.batch < 2 or not is_plain or setting.dtype == "bfloat16":
        return
    options = {**training_arguments(built), "with_metrics": True}
    per_row = [name for name, value in options.items() if isinstance(value, Tensor)]
    whole, metrics = built.wrapper(built.x, generator=generator(7), **options)
    is_mean = not built.wrapper.use_simple_mdlm_loss_weight
    if is_mean:
        share = {"num_masked": max(1, int(metrics.num_masked))}
    else:
        share = {"num_tokens": max(1, int(built.some.sum()) if setting.maskable else built.x.numel())}
    total = 0.0
    for rows in (slice(0, 1), slice(1, None)):
        part = {**options, **{name: options[name][rows] for name in per_row}}
        if setting.maskable and not part["maskable"].any() and not is_mean:
            continue  # no token, no share
        out, _ = built.wrapper(
            built.x[rows],
            generator=generator(7),
            sample_offset=rows.start,
            global_batch_size=setting.batch,
            **share,
            **part,
        )
        total += float(out.loss.detach())
    assert math.isclose(total, float(whole.loss.detach()), rel_tol=1e-4, abs_tol=1e-6), ("parts", total, whole.loss)


# Evaluation


def check_nelbo(built: Built) -> None:
    setting, wrapper = built.setting, built.wrapper
    options: dict[str, Any] = dict(built.arguments)
    if setting.maskable:
        options["maskable"] = built.some
    if setting.wrapper["schedule"] in ("number", "one"):
        with pytest.raises(ValueError, match="falls from 1 to 0"):
            wrapper.nelbo(built.x, **options)
        return
    with nothing_else_changes(built, built.some):
        bound = wrapper.nelbo(built.x, 2, seed=setting.seed, **options)
    assert bound.shape == ()
    assert bound.dtype == torch.float32
    assert not bound.requires_grad
    assert bool(bound.isfinite())
    assert float(bound) >= 0.0
    rows = wrapper.nelbo(built.x, 2, seed=setting.seed, reduction="none", **options)
    assert rows.shape == (setting.batch,)
    num_tokens = int(built.some.sum()) if setting.maskable else built.x.numel()
    near = {"rel_tol": 1e-5, "abs_tol": 1e-6}
    assert math.isclose(float(rows.double().sum()) / max(1, num_tokens), float(bound), **near), (
        "mean of the sequences"
    )
    if setting.batch and setting.dtype != "bfloat16":
        parts = wrapper.nelbo(built.x, 2, seed=setting.seed, chunk_size=1, **options)
        assert math.isclose(float(parts), float(bound), rel_tol=1e-4, abs_tol=1e-6), ("chunks", parts, bound)
    if setting.network == "own":
        assert False in wrapper.net.modes


# Generation


def expected_counts(setting: Setting, steps: int, size: int) -> list[int]:
    """How many of so many positions stay masked after each step at most, in double precision."""
    ratio = RATIOS[setting.wrapper["schedule"]]
    counts = [ratio((step + 1) / steps) * size for step in range(steps)]
    counts = [min(size, max(0, math.floor(count + max(1e-4, 2.0**-20 * size)))) for count in counts]
    return [*counts[:-1], 0]


class Prompt(NamedTuple):
    """ids: [B, N] as it was given. is_given: [B, N] bool."""

    arguments: dict[str, Any]
    ids: Tensor
    is_given: Tensor


def prompt_of(built: Built) -> Prompt:
    setting = built.setting
    shape = setting.batch, setting.length
    ids = torch.randint(0, setting.vocabulary, shape, generator=generator(setting.seed))
    is_given = built.some
    lengths = {} if setting.length == MAX_LENGTH else {"seq_len": setting.length}
    if setting.prompt is None:
        return Prompt({"batch_size": setting.batch, **lengths}, ids, torch.zeros_like(is_given))
    if setting.prompt == "row" and setting.batch:
        rows = {"prompt": ids[0].to(setting.ids_dtype), "prompt_mask": is_given[0]}
        return Prompt(
            {"batch_size": setting.batch, **rows, **lengths}, ids[:1].expand(shape), is_given[:1].expand(shape)
        )
    if setting.prompt == "short" and setting.length > 1:
        short = setting.length // 2
        rows = {"prompt": ids[:, :short].to(setting.ids_dtype), "prompt_mask": is_given[:, :short]}
        is_given = is_given & (torch.arange(setting.length) < short)
        return Prompt({**rows, "seq_len": setting.length}, ids, is_given)
    return Prompt({"prompt": ids.to(setting.ids_dtype), "prompt_mask": is_given, **lengths}, ids, is_given)


def check_generation(built: Built) -> None:
    setting, wrapper = built.setting, built.wrapper
    compat = setting.wrapper["compat"]
    prompt = prompt_of(built)
    forbidden = [0, 1] if setting.forbids else None
    options = {**setting.generation, **built.arguments, **prompt.arguments}
    if forbidden is not None:
        options["forbidden"] = forbidden
    tensors = [value for value in options.values() if isinstance(value, Tensor)]
    with nothing_else_changes(built, *tensors):
        ids, trajectory = wrapper.generate(generator=generator(setting.seed), return_trajectory=True, **options)
    given, is_given = prompt.ids, prompt.is_given
    assert ids.shape == (setting.batch, setting.length)
    assert ids.dtype == torch.int64
    assert torch.equal(ids[is_given], given[is_given]), "the prompt"
    assert bool(((ids >= 0) & (ids < setting.vocabulary)).all()), "ids"
    if not compat:
        assert not bool((ids == setting.mask_id)[~is_given].any()), "a mask is left"
    if forbidden is not None and (setting.mask_id in forbidden or setting.vocabulary > 3):
        assert not bool(torch.isin(ids, torch.tensor(forbidden))[~is_given].any()), "forbidden ids"

    assert trajectory.ids.shape == trajectory.is_masked.shape == (len(trajectory.ids), *ids.shape)
    assert torch.equal(trajectory.ids[-1], ids)
    assert not trajectory.is_masked[-1].any()
    assert bool((trajectory.ids[trajectory.is_masked] == setting.mask_id).all()), "masked, and not shown as such"
    assert not bool((trajectory.is_masked & is_given).any()), "a prompt that was masked"
    assert bool((trajectory.log_probs[:, is_given] == 0).all()), "log_probs of what was given"
    assert not bool(trajectory.log_probs.isnan().any())
    assert bool((trajectory.log_probs <= 1e-6).all())
    check_counts(built, trajectory.is_masked, ~is_given)

    again = wrapper.generate(generator=generator(setting.seed), **options)
    assert torch.equal(again, ids), "the same generator, other ids"
    if setting.writes:
        tame = build(setting._replace(writes=False)).wrapper
        assert torch.equal(tame.generate(generator=generator(setting.seed), **options), ids), "ids that were written"
    is_exact = setting.network == "own" and setting.head in ("logits", "padded", "output") and not compat
    if setting.batch > 1 and is_exact and setting.dtype == "float64":
        part = {
            name: value[1:] if isinstance(value, Tensor) and value.ndim > 1 else value
            for name, value in options.items()
        }
        if "batch_size" in part:
            part["batch_size"] = setting.batch - 1
        rest = wrapper.generate(generator=generator(setting.seed), sample_offset=1, **part)
        assert torch.equal(rest, ids[1:]), "a split of the batch"


def windows_of(setting: Setting, maskable: Tensor) -> list[list[range]]:
    """The blocks, in which something is open, of each sequence; at least one."""
    length, size = setting.length, setting.generation.get("block_length")
    if size is None:
        return [[range(length)] * len(maskable)]
    begins = [0] * len(maskable)
    if setting.generation["block_origin"] == "prompt":
        begins = [next((i for i, is_open in enumerate(row) if is_open), length) for row in maskable.tolist()]
    blocks = [
        [range(min(length, begin + k * size), min(length, begin + (k + 1) * size)) for begin in begins]
        for k in range(length)
    ]
    return [
        block for block in blocks
        if any(maskable[row, place] for row, window in enumerate(block) for place in window)
    ] or blocks[:1]  # fmt: skip


def check_counts(built: Built, is_masked: Tensor, maskable: Tensor) -> None:
    """How many positions stay masked after each step, [T, B, N] bool, block by block."""
    setting, generation = built.setting, built.setting.generation
    may_remask, threshold = setting.wrapper["can_mask_prev_unmasked"], generation.get("threshold")
    commits, by_rule = generation.get("commits"), threshold is not None
    longest = min(setting.length, generation.get("block_length", setting.length))
    steps = generation.get("steps", longest if by_rule and not may_remask else built.wrapper.steps)
    before, states, edits = maskable, iter(is_masked), generation.get("editing_steps", 0)
    for windows in windows_of(setting, maskable):
        inside = torch.zeros_like(maskable)
        for row, window in enumerate(windows):
            inside[row, window.start : window.stop] = True
        inside &= maskable
        sizes = inside.sum(dim=-1).tolist()
        for step in range(steps):
            now = next(states)
            assert bool((now == before)[~inside].all()), "outside of the block"
            if not may_remask:
                assert not bool((now & ~before).any()), "masked again"
            for row, size in enumerate(sizes):
                left = int((now & inside)[row].sum())
                if by_rule:
                    assert left <= max(0, size - (step + 1) * max(1, commits or 1)), "a step commits one at least"
                elif commits is not None:
                    assert left == (0 if step == steps - 1 else max(0, size - (step + 1) * commits))
                elif not setting.wrapper["compat"]:
                    count = expected_counts(setting, steps, size)[step]
                    most = count if may_remask else min(count, int((before & inside)[row].sum()))
                    assert left == most, ("count", step, left, most)
            before = now
            if (by_rule or edits) and not may_remask and not bool((now & inside).any()):  # the rest does not run
                break
        assert not bool((before & inside).any()), "a block that is left open"
    last = list(states)
    assert len(last) <= (steps + edits if edits else 0), "a step too many"
    assert not any(bool(state.any()) for state in last), "masked by an edit"


@PROFILE
@given(settings_of_all())
def test_option_sets(setting: Setting) -> None:
    built = build(setting)
    check_training(built)
    check_parts(built)
    check_nelbo(built)
    check_generation(built)
