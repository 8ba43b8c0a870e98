"""What the demo shows at its end: the bound, what was generated, and a picture of it."""

from __future__ import annotations

import math
import pathlib
import sys
import time
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastmask.demo.tasks import GREY_LEVELS, SIDE, Task, digit_ids, load_digits, stack
from fastmask.records import Trajectory
from fastmask.wrapper import NonAutoregressiveWrapper

NEIGHBOURS = 10  # of the classifier; its confidence is the share of them that agree
CONFIDENT = 0.9
NUM_GENERATED = 256


def report_bound(model: NonAutoregressiveWrapper, task: Task) -> None:
    """Prints held-out bits per token beside the two baselines."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    bound = float(model.nelbo(task.held_out.to(device), num_samples=8, generator=generator)) / math.log(2)
    print(
        f"held out: {bound:.2f} bits per token (bound); independent tokens {task.independent / math.log(2):.2f}; "
        f"uniform {math.log2(task.num_tokens - 1):.2f}"
    )


def sample(model: NonAutoregressiveWrapper, count: int) -> tuple[Tensor, Trajectory]:
    """Sequences [count, N] by generate's defaults, with their trajectory."""
    return model.generate(count, progress=True, return_trajectory=True)


def report_digits(model: NonAutoregressiveWrapper, task: Task, output: pathlib.Path) -> None:
    """Generates digits, asks a classifier trained on real ones what it sees, and draws the picture."""
    start = time.perf_counter()
    ids, trajectory = sample(model, NUM_GENERATED)
    ids, trajectory = ids.cpu(), Trajectory(*(value.cpu() for value in trajectory))
    seconds = time.perf_counter() - start
    confidence, label = judge(ids)
    # Each pixel drawn from some real digit, independently: what the classifier must not be fooled by.
    shuffled = torch.stack([pixel[torch.randperm(len(pixel))] for pixel in task.held_out.T], dim=-1)
    shares = [float((judge(images)[0] > CONFIDENT).float().mean()) for images in (ids, task.held_out, shuffled)]
    classes = label[confidence > CONFIDENT].unique()
    print(
        f"generated {len(ids)} digits in {seconds:.1f} s: a classifier trained on the real ones is over "
        f"{CONFIDENT:.0%} sure of {shares[0]:.0%} (real held-out digits {shares[1]:.0%}, independent pixels "
        f"{shares[2]:.0%}); "
        f"{len(classes)} of 10 classes; {len(ids.unique(dim=0))} distinct"
    )
    draw(task.held_out, ids, trajectory, output)
    print(f"picture: {output}")


def judge(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and label, [B] each, that the real training digits nearest to ids [B, 64] agree on."""
    confidence, label = torch.from_numpy(_classifier().predict_proba(ids.numpy())).max(dim=-1)
    return confidence, label


@cache
def _classifier() -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    images, labels, _, _ = load_digits()
    return KNeighborsClassifier(NEIGHBOURS).fit(stack(digit_ids(images)).numpy(), labels.numpy())


def draw(real: Tensor, generated: Tensor, trajectory: Trajectory, output: pathlib.Path) -> None:
    """Real digits, generated digits, and one digit step by step with its confidence, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns, rows = 16, 4
    figure = pyplot.figure(figsize=(10, 8.2), layout="constrained")
    panels: Any = figure.subfigures(3, 1, height_ratios=[rows, rows, 3.2])
    for panel, title, ids in ((panels[0], "real", real), (panels[1], "generated", generated)):
        panel.suptitle(title)
        for axis, image in zip(panel.subplots(rows, columns).flat, ids, strict=False):
            axis.imshow(image.view(SIDE, SIDE).numpy(), cmap="gray_r", vmin=0, vmax=GREY_LEVELS - 1)
            axis.axis("off")
    panels[2].suptitle("one digit, step by step: what stands (blue: still masked), and the confidence of each pixel")
    steps = torch.linspace(0, len(trajectory.ids) - 1, columns // 2).round().long().tolist()
    axes: Any = panels[2].subplots(2, len(steps))
    for column, step in enumerate(steps):
        ids, is_masked = trajectory.ids[step, 0].float(), trajectory.is_masked[step, 0]
        grey = 1.0 - ids / (GREY_LEVELS - 1)
        picture = torch.stack([grey, grey, grey], dim=-1)
        picture[is_masked] = torch.tensor([0.62, 0.74, 0.9])
        axes[0, column].imshow(picture.clamp(0, 1).view(SIDE, SIDE, 3).numpy())
        axes[0, column].set_title(f"step {step + 1}", fontsize=8)
        image = axes[1, column].imshow(
            trajectory.log_probs[step, 0].exp().view(SIDE, SIDE).numpy(), cmap="viridis", vmin=0, vmax=1
        )
        for axis in axes[:, column]:
            axis.axis("off")
    panels[2].colorbar(image, ax=axes[1, :], shrink=0.9, label="confidence")
    figure.savefig(output, dpi=110, format="png")
    pyplot.close(figure)


def report_text(model: NonAutoregressiveWrapper, characters: str, output: pathlib.Path) -> None:
    """Prints generated windows of text, and writes them."""
    ids, _ = sample(model, 8)
    samples = ["".join(characters[i] for i in sequence) for sequence in ids.tolist()]
    for text in samples:
        encoding = sys.stdout.encoding or "utf-8"  # which may lack characters of the text
        print(repr(text).encode(encoding, "backslashreplace").decode(encoding))
    output.write_bytes("\n\n".join(samples).encode())
    print(f"samples: {output}")
