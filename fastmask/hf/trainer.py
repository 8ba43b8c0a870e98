"""transformers' Trainer for a wrapper: its loss, exact however the batch is cut, and checkpoints."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmask.hf import checkpoints
from fastmask.hf.masked_lm import MaskedLM

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

# What examples may have for the collator, and batches for a wrapper.
_FIELDS = ("input_ids", "special_tokens_mask", "offset_mapping", "maskable", "is_masked", "masked_ids", "labels")

# What Trainer calls of a model to train it by its arguments.
_OF_INNER = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "get_input_embeddings")


class MaskedTrainerMixin(_Trainer):
    """Trains a wrapper or a MaskedLM: ``class MaskedTrainer(MaskedTrainerMixin, Trainer)``, with Trainer's arguments.

    - A :class:`fastmask.NonAutoregressiveWrapper` gets batches of a :class:`MaskCollator` with ``gives="maskable"``
      (it draws the masks; the weighted loss) or ``gives="is_masked"`` (the mean loss), a :class:`MaskedLM` those with
      labels.
    - **Loss.** Parts of a batch, of gradient accumulation and of several processes, are divided by what the whole
      has: its (maskable) tokens, or with the mean loss its masked ones. Their sum, and its gradient, is one process's
      on the whole batch.
    - **Masks** that a wrapper draws come of args.seed, the step and the row: the same on any number of processes and
      after a checkpoint, and in each evaluation the same as in the one before.
    - **Evaluation** gives the loss, without logits: the mean over the set's tokens (or masked ones, or labels),
      however it is cut into batches. With the mean loss of masks that the wrapper draws, batches are weighted by
      their tokens. Rows that several processes repeat to fill the last batch count again.
    - **gradient_checkpointing** and **neftune_noise_alpha** go to the Hugging Face model.
    - **Checkpoints** are the Hugging Face model's own, for its from_pretrained; what the wrapper adds lies beside it
      (:func:`save_pretrained`).

    Processes are torchrun's or accelerate's, with DistributedDataParallel and one device each.

    Raises:
        TypeError: a model without a Backbone.
        ValueError: arguments that need logits (label smoothing, compute_metrics, compute_loss_func), several GPUs in
            one process, FSDP or DeepSpeed; batches for a wrapper with an attention_mask, but neither maskable nor
            is_masked, so that padding and special tokens would be masked too; the mean loss of masks that the
            wrapper draws, of parts of a batch, since nobody knows yet how many are masked in the whole.
    """

    model: Any
    _signature_columns: list[str] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = kwargs.get("args", args[1] if len(args) > 1 else None)
        smoothing = getattr(options, "label_smoothing_factor", 0.0)
        if smoothing:  # Trainer would look for what only its own models have
            raise ValueError(f"expected label_smoothing_factor=0.0, received {smoothing}, which needs all logits")
        super().__init__(*args, **kwargs)
        self._drawn = 0
        self._evaluated: list[tuple[Tensor, Tensor]] = []
        if checkpoints.inner_model(self.model) is None:
            raise TypeError(
                "expected a NonAutoregressiveWrapper or a MaskedLM around a fastmask.hf.Backbone, received "
                f"{type(self.model).__name__}; MaskedLM(Backbone(model)) is for labels"
            )
        for name in ("compute_metrics", "compute_loss_func"):
            if getattr(self, name) is not None:
                raise ValueError(f"expected {name}=None, received {getattr(self, name)}, which needs all logits")
        if self.args.n_gpu > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "expected DistributedDataParallel of one device a process, received several GPUs in one, FSDP or "
                "DeepSpeed; start it with torchrun, or shard in a loop of your own (docs/distributed.md)"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, which asks the model for checkpointing and for embeddings: the inner one has them."""
        whole, inner = self.model, checkpoints.inner_model(self.model)
        lent = [name for name in _OF_INNER if not hasattr(whole, name) and hasattr(inner, name)]
        for name in lent:
            setattr(whole, name, getattr(inner, name))
        try:
            return super().train(*args, **kwargs)
        finally:
            for name in lent:
                delattr(whole, name)

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As in Trainer. num_items_in_batch: with a wrapper [2] int64, the whole batch's tokens and masked tokens."""
        if self._is_masked_lm:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        wrapper, ranks = self.model, self.accelerator.num_processes
        inputs = dict(inputs)
        if "attention_mask" in inputs and not {"maskable", "is_masked"} & inputs.keys():
            raise ValueError(
                f"expected maskable or is_masked beside an attention_mask, received {sorted(inputs)}: padding and "
                "special tokens would be masked too; give MaskCollator(tokenizer, gives='maskable')"
            )
        ids = inputs.pop("input_ids")
        if num_items_in_batch is not None:
            num_tokens, num_masked = (num_items_in_batch.double() / ranks).unbind()
            inputs["num_tokens"] = num_tokens
            if "is_masked" in inputs:
                inputs["num_masked"] = num_masked
            elif not wrapper.use_simple_mdlm_loss_weight and model.training and self._has_parts:
                raise ValueError(
                    "expected masks that the data have, for the mean loss of parts of a batch, received none; give "
                    "MaskCollator(tokenizer, gives='is_masked'), or the wrapper the weighted loss"
                )
        losses = model(
            ids,
            **inputs,
            generator=self._generator(model.training),
            sample_offset=self.accelerator.process_index * len(ids),
            global_batch_size=ranks * len(ids),
        )
        return (losses.loss, {"loss": losses.loss}) if return_outputs else losses.loss

    @property
    def _is_masked_lm(self) -> bool:
        return isinstance(self.model, MaskedLM)

    @property
    def _has_parts(self) -> bool:
        return self.args.gradient_accumulation_steps * self.accelerator.num_processes > 1

    def _generator(self, is_training: bool) -> torch.Generator:
        """One seed on all processes, another in each call of a training; the same ones in each evaluation."""
        place = f"{self.state.global_step} {self._drawn}" if is_training else f"evaluation {self._drawn}"
        self._drawn += 1
        return torch.Generator().manual_seed(random.Random(f"{self.args.seed} {place}").getrandbits(63))

    def get_batch_samples(self, *args: Any) -> Any:
        self._drawn = 0
        return super().get_batch_samples(*args)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in Trainer, which weights batches by their rows; here by what their losses are divided by."""
        self._drawn, self._evaluated = 0, []
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self._evaluated:
            losses, counts = (torch.stack(x).double() for x in zip(*self._evaluated, strict=True))
            sums = torch.stack([(losses * counts).sum(), counts.sum()])
            total, count = self.accelerator.reduce(sums, reduction="mean").tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)
        return output

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self._is_masked_lm or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        counts = torch.stack([_counts(batch) for batch in batch_samples]).sum(dim=0)
        return self.accelerator.reduce(counts.to(device), reduction="sum")

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss, without logits and labels."""
        inputs = self._prepare_inputs(inputs)
        counts = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=counts)
        if not self._is_masked_lm:
            counts = counts[int("is_masked" in inputs and not self.model.use_simple_mdlm_loss_weight)]
        self._evaluated.append((loss.detach(), counts))
        return loss.detach(), None, None

    def _set_signature_columns_if_needed(self) -> None:
        """What examples keep: what the inner model takes, and what the collator and the wrapper do."""
        if self._signature_columns is None:
            self._signature_columns = [*self.model.net.parameters_of_model(), *_FIELDS]

    # Checkpoints

    @contextmanager
    def _as_inner(self) -> Iterator[None]:
        """Trainer saves and loads the Hugging Face model in place of the wrapper."""
        whole = self.model
        self.model = checkpoints.inner_model(whole)
        try:
            yield
        finally:
            self.model = whole

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if state_dict is not None:
            state_dict = {
                name.removeprefix("net.model."): x for name, x in state_dict.items() if name.startswith("net.model.")
            }
        with self._as_inner():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            checkpoints.save_added_weights(self.model, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._as_inner():
            super()._load_from_checkpoint(resume_from_checkpoint)
        checkpoints.load_added_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with self._as_inner():
            super()._load_best_model()
        checkpoints.load_added_weights(self.model, self.state.best_model_checkpoint)


def _counts(batch: dict[str, Any]) -> Tensor:
    """Tokens that may be masked, and tokens that are, where the data say which: [2] int64."""
    ids = batch["input_ids"]
    num_tokens = batch["maskable"].sum() if "maskable" in batch else torch.tensor(ids.numel(), device=ids.device)
    num_masked = batch["is_masked"].sum() if "is_masked" in batch else torch.zeros_like(num_tokens)
    return torch.stack([num_tokens, num_masked])
