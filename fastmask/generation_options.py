"""Options of ``generate`` that stay the same through all steps: what they may be, and what they come to in a step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask import _check
from fastmask._devices import to_device
from fastmask.ops.judging import Judge, remask_key_of_threshold
from fastmask.planning import Step
from fastmask.upstream import MIN_TEMPERATURE, Formulas

# Options that are numbers, from 0 on, and the largest they may be.
_NUMBERS = {
    "start_temperature": math.inf,
    "end_temperature": math.inf,
    "filter_thres": 1.0,
    "min_p": 1.0,
    "top_p": 1.0,
    "noise_level_scale": math.inf,
    "choice_temperature": math.inf,
    "threshold": 1.0,
    "factor": math.inf,
    "entropy_bound": math.inf,
    "editing_threshold": 1.0,
    "cfg_scale": math.inf,
}
_MAY_BE_PER_SEQUENCE = ("start_temperature", "end_temperature", "filter_thres", "min_p", "top_p")


class Options(NamedTuple):
    """Options of ``generate`` that stay the same through all steps, and through the replays of their graph.

    start_temperature, end_temperature, filter_thres, min_p, top_p: numbers or [B] floating point, one a sequence.
    score: None for the critic's or, where there is none, the confidence; "order" for the state's own.
    """

    start_temperature: float | Tensor
    end_temperature: float | Tensor | None
    filter_thres: float | Tensor | None
    min_p: float | Tensor | None
    top_p: float | Tensor | None
    processed: bool
    noise_level_scale: float
    score: str | None
    choice_temperature: float | None
    threshold: float | None
    factor: float | None
    entropy_bound: float | None
    editing_threshold: float | None
    cfg_scale: float | None
    sample_offset: int

    def checked(self) -> Options:
        """The same as Python's own numbers; those that do not fit are refused. Tensors are not read."""
        numbers: dict[str, Any] = {}
        for name, high in _NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, Tensor) and name in _MAY_BE_PER_SEQUENCE:
                _check.tensor(name, value, _check.FLOATING, ndim=1)
            elif value is not None:
                if name == "threshold" and self.score == "entropy":
                    high = math.inf
                _check.number(name, value, 0.0, high, below_high=name == "filter_thres")
                numbers[name] = float(value)
        if self._is_greedy and (isinstance(self.end_temperature, Tensor) or self.end_temperature):
            raise ValueError(
                "expected end_temperature=0 or none with start_temperature=0, which is greedy in every step, "
                f"received {self.end_temperature}; give a start_temperature above 0"
            )
        _check.flag("processed", self.processed)
        if self.processed and self.end_temperature is None and not self._is_greedy:
            raise ValueError(
                "expected end_temperature= with processed=True, received None: the temperature falls to 0, where all "
                "confidences are 1; give end_temperature=start_temperature to keep it"
            )
        sample_offset = _check.integer("sample_offset", self.sample_offset, 0, 2**32)
        return self._replace(**numbers, sample_offset=sample_offset)

    def check_with(self, *, has_critic: bool, may_remask: bool, order: Tensor | None) -> None:
        """Refuses scores and rules that do not go with one another, or with the wrapper."""
        if has_critic:
            for name in ("score", "factor", "entropy_bound"):
                value = getattr(self, name)
                if value is not None:
                    received = "a tensor" if value == "order" else repr(value)
                    raise ValueError(
                        f"expected no {name}= with a critic, whose score is its own, received {received}; "
                        "leave it out"
                    )
        if may_remask:
            for name in ("factor", "entropy_bound", "editing_threshold"):
                if getattr(self, name) is not None:
                    raise ValueError(f"expected no {name}= with can_mask_prev_unmasked=True; leave one out")
        self.judge(order, 0.0).checked()

    def of_batch(self, size: int, device: torch.device) -> Options:
        """The same; what each sequence has for itself lies on the device, and is refused if it is not one each."""
        tensors: dict[str, Any] = {}
        for name in _MAY_BE_PER_SEQUENCE:
            values = getattr(self, name)
            if isinstance(values, Tensor):
                if len(values) != size:
                    raise ValueError(
                        f"expected {name} of shape [B] = [{size}], one for each sequence, received "
                        f"{list(values.shape)}; give batch_size={len(values)}, or as many as there are"
                    )
                tensors[name] = to_device(values, device)
        return self._replace(**tensors)

    def judge(self, order: Tensor | None, noise: float) -> Judge:
        """Who judges where there is no critic, with noise of this scale where none is asked for."""
        score = "confidence" if self.score is None else self.score
        scale = noise if self.choice_temperature is None else self.choice_temperature
        return Judge(score if order is None else order, scale, self.threshold, self.factor, self.entropy_bound)

    @property
    def has_rule(self) -> bool:
        """Whether a step commits what is sure enough, rather than as many as the schedule says."""
        return any(rule is not None for rule in (self.threshold, self.factor, self.entropy_bound))

    @property
    def edits(self) -> bool:
        """Whether what is committed may be overwritten."""
        return self.editing_threshold is not None

    @property
    def order_is_known(self) -> bool:
        """Whether what a step commits does not depend on what is sampled."""
        return self.score in ("random", "order") and not self.edits

    @property
    def _is_greedy(self) -> bool:
        return not isinstance(self.start_temperature, Tensor) and self.start_temperature == 0.0

    def choice_noise(self, formulas: Formulas) -> float:
        """Scale of the noise on the score by default: none where not counts alone decide by the confidence, or all is
        greedy."""
        is_plain = self.score in (None, "confidence") and not self._is_greedy
        return formulas.choice_temperature if is_plain and not self.has_rule else 0.0

    def settings(self, step: Step, formulas: Formulas, num_tokens: int) -> dict[str, Any]:
        """What a sampler is told in a step, of a vocabulary of this size."""
        return {
            "temperature": self._temperature(step, formulas),
            "top_k": self._top_k(num_tokens),
            "min_p": self.min_p,
            "top_p": self.top_p,
            "processed": self.processed,
        }

    def _temperature(self, step: Step, formulas: Formulas) -> float | Tensor:
        """The temperature of a step, or of each sequence in it, [B] float32."""
        start, end = self.start_temperature, self.end_temperature
        start = start.double() if isinstance(start, Tensor) else start
        if end is not None:
            end = end.double() if isinstance(end, Tensor) else end
            temperature = start + (end - start) * step.progress
            return temperature.float() if isinstance(temperature, Tensor) else temperature
        if isinstance(start, Tensor):  # what is no temperature stays so
            return (start * step.remaining).clamp(min=MIN_TEMPERATURE).where(start > 0.0, start).float()
        return formulas.temperature(start, step.remaining)

    def _top_k(self, num_tokens: int) -> int | Tensor | None:
        """How many logits filter_thres keeps, or of each sequence, [B] int64; None for all."""
        if isinstance(self.filter_thres, Tensor):
            shares = self.filter_thres.double()
            if self.filter_thres.dtype != torch.float64:  # 0.9 is meant, not 0.89999998, which keeps one more of 10
                shares = shares.round(decimals=6)
            return ((1 - shares) * num_tokens).ceil().long()
        return None if self.filter_thres is None else math.ceil((1 - self.filter_thres) * num_tokens)

    @property
    def critics_min_remask_key(self) -> float | None:
        """The remask key from which on a token is not sure enough, of a critic's logit."""
        if self.threshold is None:
            return None
        return remask_key_of_threshold(self.threshold) - remask_key_of_threshold(1.0 - self.threshold)
