"""What training a model of LLaDA-8B's size takes on 8 and 64 GPUs: memory, and bytes that a GPU sends in a step.

    python -m benchmarks.distributed_plan

prints the table of docs/distributed.md. Counted, not measured: the tests hold the bytes of the loss to what ranks
tell each other, and the parameters to those published.
"""

from __future__ import annotations

from typing import NamedTuple

from fastmask.distributed import padded_vocabulary

# What a rank tells the others of a row: for the loss a maximum, a sum and the target's logit; for a sample.
LOSS_BYTES, SAMPLE_BYTES = 12, 60
# Rows of logits that exist at once: the kernels' at this vocabulary, and those of a vocabulary that is split.
KERNEL_ROWS, SPLIT_ROWS = 8192, 1024
BFLOAT16, FLOAT32 = 2, 4


class Model(NamedTuple):
    """LLaDA-8B (https://arxiv.org/abs/2502.09992): attention without grouping, SwiGLU, an untied head."""

    width: int = 4096
    layers: int = 32
    feed_forward: int = 12288
    vocabulary: int = 126464
    length: int = 4096

    @property
    def block(self) -> int:
        """Parameters of a layer: four matrices of attention, three of the feed-forward, two norms."""
        return 4 * self.width**2 + 3 * self.width * self.feed_forward + 2 * self.width

    @property
    def blocks(self) -> int:
        """Parameters of all layers."""
        return self.layers * self.block

    @property
    def total(self) -> int:
        """Parameters: layers, embeddings, head and the last norm."""
        return self.blocks + 2 * self.vocabulary * self.width + self.width


class Plan(NamedTuple):
    """How many parts the batch is split into, over which fully_shard averages, and the vocabulary and each block."""

    data: int
    vocabulary: int = 1

    @property
    def name(self) -> str:
        gpus = f"{self.data * self.vocabulary} GPUs"
        data = f", fully_shard over {self.data}" if self.data > 1 else ""
        return gpus + data + (f", blocks and vocabulary over {self.vocabulary}" if self.vocabulary > 1 else "")


PLANS = (Plan(8), Plan(1, 8), Plan(64), Plan(8, 8))


def memory(model: Model, plan: Plan) -> dict[str, float]:
    """Bytes on a GPU, one sequence for each GPU: parameters, gradients and AdamW in float32, the rest in bfloat16.

    Of activations each block keeps its input and is run again in backward (activation checkpointing).
    """
    parts, rows = plan.vocabulary, plan.vocabulary * model.length  # at most: all masked
    of_a_block = 4 * model.width + (4 * model.width + 3 * model.feed_forward) / parts
    whole = 2 * model.vocabulary * model.width / parts
    held_rows = min(rows, KERNEL_ROWS) if parts == 1 else SPLIT_ROWS
    columns = model.vocabulary if parts == 1 else padded_vocabulary(model.vocabulary, parts) // parts
    # The kernels' gradient takes the logits' place; PyTorch's code has them in float32 twice besides.
    of_a_logit = BFLOAT16 if parts == 1 else BFLOAT16 + 2 * FLOAT32
    return {
        "parameters, gradients, AdamW's two": 4 * FLOAT32 * model.total / (plan.data * parts),
        "gathered: embeddings and head, their gradients": 2 * BFLOAT16 * whole if plan.data > 1 else 0.0,
        "gathered: two blocks, their gradients": 4 * BFLOAT16 * model.block / parts if plan.data > 1 else 0.0,
        "inputs of the blocks": BFLOAT16 * model.layers * rows * model.width,
        "a block run again": BFLOAT16 * rows * of_a_block,
        "logits of a chunk": held_rows * columns * of_a_logit,
        "head's gradient, summed": FLOAT32 * columns * model.width,
        "embeddings' gradient": BFLOAT16 * rows * model.width,
    }


def sent(model: Model, plan: Plan) -> dict[str, float]:
    """Bytes that a GPU sends in a step, by collectives in a ring: (W - 1) / W of what is gathered or scattered."""
    parts, rows = plan.vocabulary, plan.vocabulary * model.length
    share, split = (plan.data - 1) / plan.data, (parts - 1) / parts
    activations = BFLOAT16 * rows * model.width
    return {
        "parameters gathered": share * BFLOAT16 * (model.total + model.blocks) / parts,
        "gradients scattered": share * FLOAT32 * model.total / parts,
        "counts of tokens": 2 * share * 16,
        "blocks split over ranks": 2 * split * 6 * model.layers * activations,  # two each: forward, again, backward
        "loss: three numbers a row": 2 * split * LOSS_BYTES * rows,
        "loss: embeddings' gradient": 2 * split * activations,
    }


def table() -> str:
    """Both, of each plan, in GB; in Markdown."""
    model = Model()
    lines = ["| GB | " + " | ".join(plan.name for plan in PLANS) + " |", "|---" * (len(PLANS) + 1) + "|"]
    for title, function in (("**memory of a GPU**", memory), ("**sent by a GPU in a step**", sent)):
        columns = [function(model, plan) for plan in PLANS]
        lines.append(_line(title, [sum(column.values()) for column in columns]))
        lines += [_line(name, [column[name] for column in columns]) for name in columns[0]]
    return "\n".join(lines)


def _line(name: str, figures: list[float]) -> str:
    cells = ["0" if not x else "below .01" if x < 5e6 else f"{x / 1e9:.2f}" for x in figures]
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(table())
