"""What tests of the Trainer share: small models, data, one step of training, and its gradients from the formula.

    torchrun --nproc-per-node 2 tests/hf_training.py folder

takes that step on each rank, for each kind of training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from fastmask import NonAutoregressiveWrapper
from fastmask.hf import Backbone, MaskCollator, MaskedLM, MaskedTrainerMixin

WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
V, MASK = 40, WORDS["[MASK]"]
SPECIAL = sorted(WORDS.values())
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
KINDS = ["weighted", "mean", "labels"]
GIVES = {"weighted": "maskable", "mean": "is_masked", "labels": "labels"}


class MaskedTrainer(MaskedTrainerMixin, transformers.Trainer):
    pass


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    model = models.WordLevel({**WORDS, **{f"w{i}": i for i in range(len(WORDS), V)}}, "[UNK]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{word.strip('[]').lower()}_token": word for word in WORDS}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def examples(number: int, longest: int = 12) -> list[dict[str, list[int]]]:
    """Sequences of several lengths, between [CLS] and [SEP]."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, longest, (number,), generator=generator).tolist()
    bodies = (torch.randint(len(WORDS), V, (length,), generator=generator).tolist() for length in lengths)
    return [{"input_ids": [WORDS["[CLS]"], *body, WORDS["[SEP]"]]} for body in bodies]


def bert(**options: Any) -> nn.Module:
    """In float64, without dropout."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options)
    return transformers.BertForMaskedLM(config).double()


def build(kind: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    net = Backbone(bert() if model is None else model)
    if kind == "labels":
        return MaskedLM(net)
    options = {"no_replace_prob": 0.0, "random_token_prob": 0.0, **options}
    return NonAutoregressiveWrapper(net, mask_id=MASK, use_simple_mdlm_loss_weight=kind == "weighted", **options)


def trainer(
    kind: str, folder: str | os.PathLike[str], model: nn.Module | None = None, **options: Any
) -> MaskedTrainer:
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_grad_norm=0.0, optim="sgd", learning_rate=1.0,
        lr_scheduler_type="constant", **{"save_strategy": "no", "logging_steps": 1, **options},
    )  # fmt: skip
    return MaskedTrainer(
        build(kind) if model is None else model, arguments, train_dataset=examples(32), eval_dataset=examples(9),
        data_collator=MaskCollator(tokenizer(), gives=GIVES[kind], mlm_probability=0.4),
    )  # fmt: skip


@contextmanager
def recording(model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """The batches that a model gets, with what its network sees of them."""
    seen: list[dict[str, Tensor]] = []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = {name: x for name, x in kwargs.items() if isinstance(x, Tensor)}
        seen.append({"x": args[0] if args else kwargs["input_ids"], **tensors})

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "seen" not in seen[-1]:
            seen[-1]["seen"] = kwargs["input_ids"].clone()

    handles = [
        model.register_forward_pre_hook(take, with_kwargs=True),
        model.net.model.bert.embeddings.register_forward_pre_hook(see, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gradients(kind: str, batches: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the whole batch, of all of its logits, from the formula."""
    model = bert()
    total, divisor = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        logits = model(input_ids=batch["seen"], attention_mask=batch["attention_mask"]).logits
        if kind == "labels":
            asked, targets = batch["labels"] != -100, batch["labels"]
        else:
            logits = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)
            asked, targets = batch["seen"] != batch["x"], batch["x"]
            if kind == "mean":
                asked = batch["is_masked"]
        nll = torch.zeros(asked.shape, dtype=torch.float64)
        nll[asked] = F.cross_entropy(logits[asked], targets[asked], reduction="none")
        if kind == "weighted":
            n = batch["maskable"].sum(1)
            weights = n / asked.sum(1)  # float32, as the wrapper's are
            total = total + (weights * nll.sum(1)).sum()
            divisor += int(n.sum())
        else:
            total, divisor = total + nll.sum(), divisor + int(asked.sum())
    loss = total / divisor
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def step(kind: str, folder: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """One step of plain gradient descent: the batches, what was logged, and by how much parameters fell."""
    wrapped = build(kind)
    before = {name: p.detach().clone() for name, p in wrapped.net.model.named_parameters()}
    with recording(wrapped) as batches:
        trained = trainer(kind, folder, wrapped, max_steps=1, **options)
        trained.train()
    fall = {name: before[name] - p.detach() for name, p in wrapped.net.model.named_parameters()}
    return {"batches": batches, "loss": trained.state.log_history[0]["loss"], "fall": fall}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in KINDS:
        found = step(each, sys.argv[1], per_device_train_batch_size=2, gradient_accumulation_steps=3)
        torch.save(found, Path(sys.argv[1]) / f"{each} {os.environ['RANK']}.pt")
