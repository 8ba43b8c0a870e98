"""BERT's pre-training with a Hugging Face model: 15 % of the tokens, 80/10/10, whole words, accuracy.

Logits are formed of the masked tokens alone.

    python examples/bert_hugging_face.py my.txt --whole-words

    linear head: cls.predictions.decoder, as a run has shown
    loss 6.91 nats, 0 % of 98 masked tokens right at step 0
    ...

Needs transformers. 200 steps take about two minutes on one core of a CPU.
"""

from __future__ import annotations

import argparse
import pathlib

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from fastmask import NonAutoregressiveWrapper
from fastmask.hf import Backbone

VOCABULARY, LENGTH = 1000, 64


def whole_words(word_ids: Tensor, share: float) -> Tensor:
    """Words chosen by themselves, with all of their tokens: [B, N] bool, of word_ids [B, N], rising in a sequence."""
    chosen = torch.rand(len(word_ids), int(word_ids.max()) + 1) < share
    return chosen.gather(1, word_ids)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--whole-words", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    tokenizer = BertWordPieceTokenizer()
    tokenizer.train([str(options.text)], vocab_size=VOCABULARY, show_progress=False)
    encoding = tokenizer.encode(options.text.read_text(encoding="utf-8"), add_special_tokens=False)
    size = len(encoding.ids) // LENGTH * LENGTH
    tokens = torch.tensor(encoding.ids[:size]).view(-1, LENGTH)
    words = torch.tensor(encoding.word_ids[:size]).view(-1, LENGTH)
    words = words - words[:, :1]
    special = [tokenizer.token_to_id(word) for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")]

    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512, max_position_embeddings=LENGTH,
    )  # fmt: skip
    net = Backbone(BertForMaskedLM(config))
    print(f"linear head: {net.head_reason}")
    model = NonAutoregressiveWrapper(
        net,
        mask_id=tokenizer.token_to_id("[MASK]"),
        schedule=0.15,  # a constant ratio; the loss is then the mean over masked tokens
        gate="token",  # each masked token by itself: 10 % kept, 10 % random
        no_replace_prob=0.1,
        random_token_prob=0.1,
        random_excludes=special,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(options.steps):
        rows = torch.randint(len(tokens), (16,))
        masks = {"is_masked": whole_words(words[rows], 0.15)} if options.whole_words else {}
        losses, metrics = model(tokens[rows], with_metrics=True, **masks)
        losses.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(
                f"loss {losses.loss.item():.2f} nats, {metrics.accuracy.item():.0%} of "
                f"{int(metrics.num_masked)} masked tokens right at step {step}"
            )


if __name__ == "__main__":
    main()
