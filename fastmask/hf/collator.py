"""Batches of masked tokens, by the contract of transformers' DataCollatorForLanguageModeling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from fastmask import _check, functional


@dataclass
class MaskCollator(DataCollatorForLanguageModeling):
    """transformers' DataCollatorForLanguageModeling, its masks chosen by :func:`fastmask.functional.mask_sampling`.

    Examples, padding and arguments are transformers'. Each token is chosen with probability mlm_probability; it
    becomes the mask with mask_replace_prob, a random token with random_replace_prob, and else stays. Special tokens
    and padding are never chosen, and no random token is a special one (in transformers it may be).

    Args:
        tokenizer: of transformers, with a mask token.
        whole_word_mask: as in transformers choose words, all of whose tokens become the mask; the examples have
            "offset_mapping".
        mlm_probability, mask_replace_prob, random_replace_prob, pad_to_multiple_of: as in transformers.
        seed: of a generator of its own, in each worker of a DataLoader another; workers that are made anew for an
            epoch begin anew. None for torch's own generator, which DataLoader seeds in each worker and epoch:
            torch.manual_seed then reproduces all masks.
        gives: what a batch has beside "attention_mask" and what else the examples have:
            "labels", transformers' contract: "input_ids" with masks in them, "labels", -100 where nothing is asked;
            "is_masked", masks for a wrapper with the mean loss: "input_ids", the clean ids, "is_masked",
            "masked_ids";
            "maskable", for a wrapper that draws its own: "input_ids", the clean ids, "maskable".
            With the last two it is ``wrapper(batch.pop("input_ids"), **batch)``.

    Raises:
        ValueError: gives is something else; mlm=False, return_tensors other than "pt", and what transformers refuses.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "[MASK]": 1, "to": 2, "be": 3, "or": 4}, "[PAD]"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]")
        >>> collator = MaskCollator(tokenizer, mlm_probability=1.0, mask_replace_prob=1.0, random_replace_prob=0.0)
        >>> batch = collator([{"input_ids": [2, 3, 4]}, {"input_ids": [2]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[1, 1, 1], [1, 0, 0]], [[2, 3, 4], [2, -100, -100]])
    """

    gives: str = "labels"

    def __post_init__(self) -> None:
        _check.option("gives", self.gives, ["labels", "is_masked", "maskable"])
        _check.option("return_tensors", self.return_tensors, ["pt"])
        if not self.mlm:
            raise ValueError(
                "expected mlm=True, received False, which chooses no masks; take transformers' own collator, or "
                "gives='maskable' for a wrapper that draws them"
            )
        super().__post_init__()

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        if self.gives == "labels":
            return batch
        labels, ids = batch.pop("labels"), batch["input_ids"]
        is_asked = labels != -100
        if self.gives == "maskable":
            batch["maskable"] = is_asked
        else:
            batch |= {"input_ids": labels.where(is_asked, ids), "is_masked": is_asked, "masked_ids": ids}
        return batch

    def numpy_call(self, examples: list[Any]) -> dict[str, Any]:
        raise ValueError("expected return_tensors='pt', received 'np'; take batch[name].numpy()")

    def torch_mask_tokens(
        self, inputs: Tensor, special_tokens_mask: Any = None, offset_mapping: Any = None
    ) -> tuple[Tensor, Tensor]:
        """What the network sees, and the labels, both [B, N] int64; arguments as in transformers."""
        if special_tokens_mask is None:
            special_tokens_mask = [
                self.tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
                for row in inputs.tolist()
            ]
        maskable = ~torch.as_tensor(special_tokens_mask).bool()
        if self.gives == "maskable":
            return inputs, inputs.masked_fill(~maskable, -100)
        if not self.whole_word_mask:
            masked = self._masked(inputs, maskable)
            return masked.masked_ids, inputs.masked_fill(~masked.is_masked, -100)
        starts = _word_starts(torch.as_tensor(offset_mapping), maskable)
        places = torch.arange(inputs.shape[1]).expand_as(inputs)
        start_of_word = places.where(starts, 0).cummax(dim=1).values
        chosen = self._masked(inputs, starts).is_masked.gather(1, start_of_word) & maskable
        return inputs.masked_fill(chosen, self.tokenizer.mask_token_id), inputs.masked_fill(~chosen, -100)

    def _masked(self, ids: Tensor, maskable: Tensor) -> Any:
        return functional.mask_sampling(
            ids,
            mask_id=self.tokenizer.mask_token_id,
            num_tokens=len(self.tokenizer),
            schedule=self.mlm_probability,
            mode="bernoulli",
            maskable=maskable,
            gate="token",
            no_replace_prob=max(0.0, 1.0 - self.mask_replace_prob - self.random_replace_prob),
            random_token_prob=self.random_replace_prob,
            random_excludes=self.tokenizer.all_special_ids,
            generator=self.generator,
        )


def _word_starts(offsets: Tensor, maskable: Tensor) -> Tensor:
    """Where a word begins, [B, N] bool: behind a special token, or where the text has a gap.

    Args:
        offsets: [B, N, 2], where in the text a token begins and ends. maskable: [B, N] bool.
    """
    gap = torch.ones_like(maskable)
    gap[:, 1:] = (offsets[:, 1:, 0] != offsets[:, :-1, 1]) | ~maskable[:, :-1]
    return gap & maskable
