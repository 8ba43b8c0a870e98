"""BERT's pre-training by transformers' Trainer: logits of masked tokens alone, checkpoints of its own kind.

    python examples/hugging_face_trainer.py my.txt

    held out: ... nats at step 0, ... at step 200
    loaded again: ... nats

Needs the extra train. Runs in half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from fastmask.hf import Backbone, MaskCollator, MaskedLM, MaskedTrainerMixin

VOCABULARY, LENGTH = 500, 32


class MaskedTrainer(MaskedTrainerMixin, Trainer):
    pass


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    words = BertWordPieceTokenizer()
    words.train([str(options.text)], vocab_size=VOCABULARY, show_progress=False)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, **special)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    windows = [{"input_ids": ids[i : i + LENGTH]} for i in range(0, len(ids) - LENGTH, LENGTH)]

    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    collator = MaskCollator(tokenizer)

    def trainer(model: BertForMaskedLM) -> MaskedTrainer:
        training = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=8, gradient_accumulation_steps=2,
            learning_rate=2e-3, per_device_eval_batch_size=64, report_to=[], disable_tqdm=True, logging_steps=1000,
            save_strategy="no",
        )  # fmt: skip
        return MaskedTrainer(
            MaskedLM(Backbone(model)), training, data_collator=collator, train_dataset=windows[32:],
            eval_dataset=windows[:32],
        )  # fmt: skip

    def held_out(trained: MaskedTrainer) -> float:
        torch.manual_seed(1)  # the same masks each time
        return trained.evaluate()["eval_loss"]

    with tempfile.TemporaryDirectory() as folder:
        trained = trainer(BertForMaskedLM(config))
        before = held_out(trained)
        trained.train()
        print(f"held out: {before:.2f} nats at step 0, {held_out(trained):.2f} at step {options.steps}")
        trained.save_model(folder)
        trained.accelerator.wait_for_everyone()
        again = BertForMaskedLM.from_pretrained(folder)
        print(f"loaded again: {held_out(trainer(again)):.2f} nats")


if __name__ == "__main__":
    main()
