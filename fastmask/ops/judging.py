"""Which tokens are committed first, and how many: the score of a demasking step, and its rule; and what is edited."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask import _check
from fastmask.records import Sampled

SCORES = ("confidence", "margin", "entropy", "random")


class Judge(NamedTuple):
    """How the tokens of a step are judged; see :func:`fastmask.functional.demask_step`.

    score: one of SCORES, or [B, N] floating point. choice_temperature: of noise on it. threshold, factor,
    entropy_bound: one of them, or none.
    """

    score: str | Tensor = "confidence"
    choice_temperature: float = 0.0
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None

    def checked(self) -> Judge:
        """The same; what does not fit is refused."""
        if not isinstance(self.score, Tensor) and self.score not in SCORES:
            raise ValueError(f"expected score to be one of {', '.join(SCORES)} or a tensor, received {self.score!r}")
        _check.number("choice_temperature", self.choice_temperature, 0.0)
        given = self._rules()
        if len(given) > 1:
            raise ValueError(f"expected one rule, received {' and '.join(given)}; leave all but one out")
        of_scores = {"threshold": SCORES[:3], "factor": SCORES[:1], "entropy_bound": ("entropy",)}
        for name, value in given.items():
            if isinstance(self.score, Tensor) or self.score not in of_scores[name]:
                received = "a tensor" if isinstance(self.score, Tensor) else repr(self.score)
                raise ValueError(f"expected score {' or '.join(map(repr, of_scores[name]))} with {name}, received "
                                 f"{received}; change one")  # fmt: skip
            _check.number(name, value, 0.0, 1.0 if name == "threshold" and self.score != "entropy" else math.inf)
            if name != "threshold" and self.choice_temperature > 0.0:
                raise ValueError(f"expected choice_temperature=0 with {name}, whose order is by the score alone, "
                                 f"received {self.choice_temperature}; leave it out")  # fmt: skip
        return self

    def _rules(self) -> dict[str, float]:
        rules = {"threshold": self.threshold, "factor": self.factor, "entropy_bound": self.entropy_bound}
        return {name: value for name, value in rules.items() if value is not None}

    @property
    def has_rule(self) -> bool:
        """Whether tokens that are sure enough are committed, however many they are."""
        return bool(self._rules())

    def room(self, ids: Tensor, log_probs: Tensor) -> Sampled:
        """What a sampler writes [B, N]: ids, log_probs, and the figure that is scored."""
        margins, entropies = (
            torch.zeros_like(log_probs) if isinstance(self.score, str) and self.score == name else None
            for name in ("margin", "entropy")
        )
        return Sampled(ids, log_probs, margins, entropies)

    def remasking(self, sampled: Sampled, remaining: float = 1.0) -> dict[str, Any]:
        """What :func:`fastmask.functional.remask_` is told, with this share of the noise."""
        noise = self.choice_temperature * remaining
        if isinstance(self.score, Tensor):
            return {"values": self.score, "noise_scale": noise}
        if self.score == "random":
            return {"values": torch.zeros_like(sampled.log_probs), "noise_scale": 1.0}
        if self.score == "entropy":  # low is sure: the noise is taken off it
            return {
                "values": sampled.entropies,
                "is_confidence": False,
                "noise_scale": -noise,
                "min_remask_key": self.threshold,
                "entropy_bound": self.entropy_bound,
            }
        least = self.threshold
        if least is not None:
            least = remask_key_of_threshold(least) if self.score == "confidence" else -least
        values = sampled.log_probs if self.score == "confidence" else sampled.margins
        return {"values": values, "noise_scale": noise, "min_remask_key": least, "factor": self.factor}


def remask_key_of_threshold(threshold: float) -> float:
    """The remask key from which on a token's probability does not exceed a threshold: -log(threshold)."""
    return -math.log(threshold) if threshold > 0.0 else math.inf


def put_back(
    sampled: Sampled, ids: Tensor, log_probs: Tensor, is_masked: Tensor, may_edit: Tensor, threshold: float
) -> Tensor:
    """Edits what is committed: puts ids and log_probs [B, N] back into what was sampled, in place, but where it is
    masked, or may be edited and the proposal is another id of a probability above the threshold.

    Returns:
        [B, N] bool, what is edited.
    """
    is_surer = -sampled.log_probs < remask_key_of_threshold(threshold)
    is_edited = ~is_masked & may_edit & (sampled.ids != ids) & is_surer
    is_new = is_masked | is_edited
    sampled.ids.copy_(sampled.ids.where(is_new, ids))
    sampled.log_probs.copy_(sampled.log_probs.where(is_new, log_probs))
    return is_edited
