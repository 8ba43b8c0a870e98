"""A block-causal network with a cache, and generations of many kinds, with and without one."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from generating import MASK, V
from torch import nn

from fastmask import Head, NonAutoregressiveWrapper


class Cache:
    """Keys and values of each layer, and the blocks of their columns: of those kept, and of the last pass."""

    def __init__(self) -> None:
        self.kept: dict[Any, torch.Tensor] = {}
        self.last: dict[Any, torch.Tensor] = {}

    def joined(self, name: Any, own: torch.Tensor) -> torch.Tensor:
        """What is kept, and then a pass's own, [B, K + W, ...]."""
        self.last[name] = own
        return torch.cat([self.kept[name], own], dim=1) if name in self.kept else own

    def commit(self, length: int) -> None:
        self.kept = {name: self.joined(name, own[:, :length]) for name, own in self.last.items()}


class BlockCausal(nn.Module):
    """A transformer in float64, whose positions see their own block and those before. It writes its passes down."""

    is_block_causal = True

    def __init__(self, max_seq_len: int = 24, width: int = 16, depth: int = 2, scale: float = 2.0) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len = V, max_seq_len
        self.ids, self.positions = nn.Embedding(V, width), nn.Embedding(max_seq_len, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.out = nn.Linear(width, V)
        self.scale = scale
        self.widths: list[int] = []
        self.double()

    def start_cache(self, length: int) -> Cache:
        return Cache()

    def linear_head(self) -> Head:
        return Head(self.out.weight, self.out.bias, self.scale)

    def forward(self, ids, positions=None, blocks=None, cache=None, label=None, return_embeddings=False):
        self.widths.append(ids.shape[1])
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        blocks = torch.zeros_like(ids) if blocks is None else blocks
        seen = blocks if cache is None else cache.joined("blocks", blocks)
        hidden = seen[:, None, :] > blocks[:, :, None]
        x = self.ids(ids) + self.positions(positions)
        x = x if label is None else x + label[:, None]
        for layer, (qkv, mlp) in enumerate(zip(self.qkv, self.mlp, strict=True)):
            q, *kv = qkv(F.rms_norm(x, x.shape[-1:])).chunk(3, dim=-1)
            k, v = kv if cache is None else (cache.joined((layer, i), each) for i, each in enumerate(kv))
            scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
            x = x + scores.softmax(dim=-1) @ v
            x = x + mlp(F.rms_norm(x, x.shape[-1:]))
        x = F.rms_norm(x, x.shape[-1:])
        return x if return_embeddings else self.out(self.scale * x)


class BothSides(BlockCausal):
    """The same, whose positions see all that is none's padding."""

    is_block_causal = False


def random_prompt(draw: random.Random, batch: int, length: int, kind: str, vocabulary: int = V) -> dict[str, Any]:
    """Prompts of one length, or of ragged lengths from 0 to all of it, or with positions given later on."""
    if kind == "none":
        return {"batch_size": batch}
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    prompt = torch.randint(0, MASK, (batch, length), generator=generator)
    if kind == "equal":
        return {"prompt": prompt[:, : draw.randrange(1, length)]}
    lengths = torch.tensor([draw.randrange(length) for _ in range(batch)])
    lengths[draw.randrange(batch)] = draw.choice([0, length])
    given = torch.arange(length) < lengths[:, None]
    if kind == "holes":
        given |= torch.rand(given.shape, generator=generator) < 0.2
    return {"prompt": prompt, "prompt_mask": given}


_PACES: list[dict[str, Any]] = [
    {"steps": 3},
    {"steps": 4, "commits": 1, "choice_temperature": 1.0},
    {"threshold": 0.3},
    {"threshold": 0.5, "steps": 3, "commits": 1, "score": "margin"},
    {"factor": 1.0},
    {"score": "entropy", "entropy_bound": 1.0},
    {"score": "random", "steps": 3},
    {"threshold": 0.4, "editing_threshold": 0.2, "editing_steps": 3},
    {"steps": 2, "editing_threshold": 0.3, "editing_steps": 2},
]
_KINDS = ["equal", "none", "ragged", "holes"]


def random_options(draw: random.Random, number: int) -> dict[str, Any]:
    """A rule, a temperature, ends, guidance, blocks: those that come first differ from number to number."""
    warm = {"start_temperature": 0.8, "top_p": 0.9} if number % 2 else {"start_temperature": 0.0}
    options = {**_PACES[number % len(_PACES)], "filter_thres": None, **warm}
    options["block_origin"] = "prompt" if number // 2 % 2 else "zero"
    options["block_length"] = draw.choice([1, 3, 4, 5, 8])
    if draw.random() < 0.4:
        options["eos_id"] = [1, 2]
    if draw.random() < 0.4:
        options["cfg_scale"] = 0.5
    return options


def random_generation(number: int, length: int = 24, batch: int = 3) -> dict[str, Any]:
    """Options of one of many generations; each second five have ragged prompts."""
    draw = random.Random(number)
    options = random_options(draw, number)
    kind = draw.choice(_KINDS[:2] if number % 10 < 5 else _KINDS[2:])
    given = random_prompt(draw, batch, length, kind)
    if "cfg_scale" in options and kind == "none":
        options["unconditional"] = {}
    return {**options, **given}


def states(model: NonAutoregressiveWrapper, options: dict[str, Any], cache: Any) -> list[tuple[torch.Tensor, ...]]:
    """What generate_steps yields."""
    generator = torch.Generator().manual_seed(3)
    steps = model.generate_steps(**options, cache=cache, generator=generator)
    return [tuple(x.clone() for x in state) for state in steps]


def assert_same_states(ours, expected) -> None:
    """Ids, masks, the pass of each commit and the passes, exactly; log-probabilities to within float32's rounding."""
    assert len(ours) == len(expected)
    for (*exact, log_probs, at, passes), (*other, other_log_probs, other_at, other_passes) in zip(
        ours, expected, strict=True
    ):
        for x, y in zip((*exact, at, passes), (*other, other_at, other_passes), strict=True):
            assert torch.equal(x, y)
        torch.testing.assert_close(log_probs, other_log_probs, rtol=1e-5, atol=1e-6)


def wrapped(net: nn.Module) -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(net, mask_id=MASK, steps=4).eval()
