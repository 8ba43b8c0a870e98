"""The demo: a MaskGIT trained from nothing in minutes, on handwritten digits or on a text of yours.

Digits are scikit-learn's ``load_digits``: 1797 images of 8x8 pixels, here in 5 grey levels, 64 tokens. Needs the
extra ``demo``: tqdm, matplotlib, scikit-learn, x-transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import math
import os
import pathlib
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, Subset

from fastmask import _progress, data
from fastmask.records import Trajectory
from fastmask.wrapper import NonAutoregressiveWrapper

SIDE = 8
GREY_LEVELS = 5
VALUE_RANGE = (0.0, 16.0)
HELD_OUT_DIGITS = 297
TEXT_LENGTH = 64
MAX_HELD_OUT = 512  # windows of text: a longer evaluation would take longer than the training
NEIGHBOURS = 10  # of the classifier; its confidence is the share of them that agree
CONFIDENT = 0.9
NUM_GENERATED = 256


@dataclass(frozen=True)
class Recipe:
    """How the network is built and trained. It is sampled by generate's defaults."""

    dim: int = 64
    depth: int = 4
    heads: int = 4
    batch_size: int = 64
    learning_rate: float = 6e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warm_up: int = 50
    weight_average: float = 0.99


RECIPE = Recipe()


@dataclass(frozen=True)
class Task:
    """Clean sequences to learn, sequences held out, and the law of one token on its own (nats)."""

    train: Dataset[Tensor]
    held_out: Tensor
    num_tokens: int
    seq_len: int
    independent: float
    row_length: int | None
    characters: str = ""

    @property
    def mask_id(self) -> int:
        return self.num_tokens - 1


class Refused(ValueError):
    """What the command line cannot use: one line for the reader, no traceback."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument("--text", type=pathlib.Path, help="learn the characters of this UTF-8 file instead of digits")
    parser.add_argument("--steps", type=_positive, default=1500, help="training steps in all (default 1500)")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help="the picture, a PNG (default fastmask-demo.png); with --text the samples, UTF-8 (fastmask-demo.txt)",
    )
    parser.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        default=pathlib.Path("fastmask-demo.pt"),
        help="where training is saved (default fastmask-demo.pt); read by torch.load(weights_only=True)",
    )
    onto = parser.add_mutually_exclusive_group()
    onto.add_argument("--resume", action="store_true", help="go on from the checkpoint, with its seed")
    onto.add_argument("--force", action="store_true", help="overwrite a checkpoint that is there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=_seed, default=0)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, low: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, received {text!r}") from None
    if number < low:
        raise argparse.ArgumentTypeError(f"expected at least {low}, received {number}")
    if number >= 2**63:
        raise argparse.ArgumentTypeError(f"expected less than 2**63, received {number}")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Trains, evaluates, generates, reports; returns the exit status: 2 after an argument or a file that cannot be
    used, 1 where packages are missing, 130 after Ctrl-C."""
    missing = _missing_packages()
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'fastmask[demo]'", file=sys.stderr)
        return 1
    try:
        return _run(arguments)
    except Refused as error:
        print(f"fastmask demo: error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.output is None:
        arguments.output = pathlib.Path("fastmask-demo.png" if arguments.text is None else "fastmask-demo.txt")
    refuse_device(arguments.device)
    refuse_place("--output", arguments.output)
    refuse_place("--checkpoint", arguments.checkpoint)
    if arguments.checkpoint.exists() and not arguments.checkpoint.is_file():  # /dev/null would be renamed over
        raise Refused(f"expected --checkpoint to name a plain file, received {arguments.checkpoint}; name another")
    places = {"--text": arguments.text, "--output": arguments.output, "--checkpoint": arguments.checkpoint}
    for (option, path), (other, place) in itertools.combinations(places.items(), 2):
        if path is not None and path.resolve() == place.resolve():
            raise Refused(f"expected files of their own, received {path} for {option} and {other}; name another")
    if arguments.resume and not arguments.checkpoint.exists():
        raise Refused(f"nothing to resume: there is no {arguments.checkpoint}; leave --resume out")
    if arguments.checkpoint.exists() and not (arguments.resume or arguments.force):
        raise Refused(
            f"expected no file at {arguments.checkpoint}, received a checkpoint to overwrite; --resume goes on "
            "from it, --force overwrites it, --checkpoint names another"
        )
    torch.manual_seed(arguments.seed)
    task = digits_task() if arguments.text is None else text_task(arguments.text)
    model = build(task).to(arguments.device)
    average = train(model, task, arguments)
    if average is None:
        print(f"\nstopped; --resume goes on from {arguments.checkpoint}")
        return 130
    report_bound(average, task)
    try:
        if arguments.text is None:
            report_digits(average, task, arguments.output)
        else:
            report_text(average, task.characters, arguments.output)
    except OSError as error:
        raise Refused(f"expected to write {arguments.output}, received {error}; --output names another") from error
    return 0


def refuse_device(name: str) -> None:
    """A device that is not here, or that holds no values."""
    try:
        torch.zeros(1, device=torch.device(name)).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # the latter two: not built in, not installed
        reason = str(error).splitlines()[0]
        raise Refused(f"expected a device of this machine, received {name!r} ({reason}); try --device cpu") from error


def refuse_place(option: str, path: pathlib.Path) -> None:
    """A path that no file can be written to, found before training and not after."""
    if path.is_dir():
        raise Refused(f"expected {option} to name a file, received the folder {path}; add a name")
    if not path.parent.is_dir():
        raise Refused(f"expected {option} in a folder that is there, received {path}; make {path.parent} first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Refused(f"expected {option} where it can be written, received {path}; choose another place")


def _missing_packages() -> list[str]:
    import importlib.util

    packages = {
        "tqdm": "tqdm",
        "matplotlib": "matplotlib",
        "sklearn": "scikit-learn",
        "x_transformers": "x-transformers",
    }
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]


# Data


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1500, 64] and labels, held-out images [297, 64] and labels; float32 in [0, 16]."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float(), labels[order]
    cut = HELD_OUT_DIGITS
    return images[cut:], labels[cut:], images[:cut], labels[:cut]


def digit_ids(images: Tensor) -> data.TokenSequences:
    return data.from_images(images, levels=GREY_LEVELS, value_range=VALUE_RANGE)


def stack(dataset: Any) -> Tensor:
    """All items of a data set, [S, N] int64."""
    return torch.stack([dataset[i] for i in range(len(dataset))])


def digits_task() -> Task:
    """The digits as sequences of 64 grey levels."""
    train_images, _, held_out_images, _ = load_digits()
    train, held_out = digit_ids(train_images), digit_ids(held_out_images)
    train_ids, held_out_ids = stack(train), stack(held_out)
    one_hot = nn.functional.one_hot(train_ids, GREY_LEVELS)
    frequencies = (one_hot.sum(dim=0) + 1.0) / (len(train_ids) + GREY_LEVELS)  # of each level at each pixel
    independent = -frequencies.log().expand(len(held_out_ids), -1, -1).gather(-1, held_out_ids[..., None])
    return Task(train, held_out_ids, GREY_LEVELS + 1, SIDE * SIDE, float(independent.mean()), SIDE)


def text_task(path: pathlib.Path) -> Task:
    """The characters of a text, in windows; the last tenth of the windows is held out."""
    text = read_text(path)
    if len(text) < 20 * TEXT_LENGTH:
        raise Refused(
            f"expected a text of at least {20 * TEXT_LENGTH} characters, received {path} with {len(text)}; "
            "give a longer one"
        )
    characters = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(characters)}
    windows = data.TokenWindows(
        [index[character] for character in text],
        TEXT_LENGTH,
        num_tokens=len(characters) + 1,
        mask_id=len(characters),
        tail="drop",
    )
    cut = len(windows) - len(windows) // 10
    train = Subset(windows, range(cut))
    held_out = stack(Subset(windows, range(cut, min(len(windows), cut + MAX_HELD_OUT))))
    counts = Counter(stack(train).flatten().tolist())
    total = sum(counts.values()) + len(characters)
    log_frequency = torch.tensor([math.log((counts[i] + 1) / total) for i in range(len(characters))])
    independent = float(-log_frequency[held_out].mean())
    return Task(train, held_out, len(characters) + 1, TEXT_LENGTH, independent, None, characters)


def read_text(path: pathlib.Path) -> str:
    """A text, line ends as they are."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
    except OSError as error:
        raise Refused(
            f"expected --text to name a text file, received {path} ({error.strerror}); give another"
        ) from error
    except UnicodeDecodeError as error:
        raise Refused(f"expected UTF-8 in {path}, received {error}; convert the file") from error
    if "\0" in text:
        raise Refused(f"expected text in {path}, received a NUL at character {text.index(chr(0))}; it is binary")
    return text


# Network and training


def build(task: Task) -> NonAutoregressiveWrapper:
    """A small encoder; for images its positions start as sines of row and column, and each token also sees its
    neighbours (x-transformers' token shift), which an image of 64 pixels learns from soonest."""
    from x_transformers import Encoder, TransformerWrapper

    net = TransformerWrapper(
        num_tokens=task.num_tokens,
        max_seq_len=task.seq_len,
        attn_layers=Encoder(
            dim=RECIPE.dim,
            depth=RECIPE.depth,
            heads=RECIPE.heads,
            attn_dim_head=RECIPE.dim // RECIPE.heads,
            attn_flash=True,
            ff_mult=2,
            shift_tokens=2 if task.row_length is None else task.row_length + 1,
        ),
    )
    if task.row_length is not None:
        with torch.no_grad():
            net.pos_emb.emb.weight.copy_(_row_and_column_waves(task.row_length, RECIPE.dim))
    # No kept or random tokens: the loss then is the bound itself.
    return NonAutoregressiveWrapper(
        net, mask_id=task.mask_id, no_replace_prob=0.0, random_token_prob=0.0, stratified_times=True
    )


def _row_and_column_waves(side: int, dim: int) -> Tensor:
    """[side * side, dim]: sines and cosines of the row and the column."""
    frequency = math.pi * torch.linspace(1 / 16, 0.8, dim // 4)
    row, column = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    waves = [wave(place.reshape(-1, 1) * frequency) for place in (row, column) for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=-1) * math.sqrt(2.0)


def train(
    model: NonAutoregressiveWrapper, task: Task, arguments: argparse.Namespace
) -> NonAutoregressiveWrapper | None:
    """The average of the weights over the last steps; None after Ctrl-C. Either way a checkpoint is written.

    A resumed run ends where an uninterrupted one does: the checkpoint holds the random state too, and the order of
    the data follows from the seed and the step.
    """
    from tqdm.auto import tqdm

    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=RECIPE.learning_rate, betas=RECIPE.betas)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate(arguments.steps))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(RECIPE.weight_average))
    parts = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler}
    done, seed = 0, arguments.seed
    if arguments.resume:
        done, seed = load_checkpoint(arguments.checkpoint, task, parts, arguments.device)
    batches = _endless_batches(task.train, seed, done)
    smooth = None
    # So small a network gains little from a second CPU thread, and beside another program loses a lot by it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            _ctrl_c() as pressed,
            tqdm(total=arguments.steps, initial=done, desc="training", unit="step", **_progress.pace(tqdm)) as bar,
        ):
            while done < arguments.steps and not pressed:
                loss = model(next(batches).to(arguments.device)).loss
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                average.update_parameters(model)
                done += 1
                smooth = loss.detach() if smooth is None else smooth.lerp(loss.detach(), 0.05)
                if done % 10 == 0:
                    bar.set_postfix_str(f"bound {smooth.item() / math.log(2):.2f} bits/token", refresh=False)
                bar.update()
    finally:
        torch.set_num_threads(threads)
    random = _random_state(arguments.device)
    states = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
    save_checkpoint(
        {"done": done, "seed": seed, "task": _identity(task), "random": random, **states}, arguments.checkpoint
    )
    averaged: NonAutoregressiveWrapper = average.module  # type: ignore[assignment]
    return None if pressed else averaged


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to instead of breaking off a step, so that a checkpoint holds whole steps only."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone may hear signals
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _identity(task: Task) -> dict[str, Any]:
    """What a checkpoint must have in common with a task, and a network with another, to go on."""
    sizes = {"num_tokens": task.num_tokens, "seq_len": task.seq_len, "sequences": len(task.train)}  # type: ignore[arg-type]
    return {**sizes, "characters": task.characters, "recipe": repr(dataclasses.astuple(RECIPE))}


def _random_state(device: str) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if torch.device(device).type == "cuda" else state


def save_checkpoint(state: dict[str, Any], path: pathlib.Path) -> None:
    """Written beside and renamed: a save that fails leaves the checkpoint that was there."""
    contents = io.BytesIO()  # torch's own writer fails in words of its own
    torch.save(state, contents)
    place = path.resolve()  # a link stays one
    temporary = place.with_name(f".fastmask-{os.getpid()}.tmp")
    try:
        temporary.write_bytes(contents.getbuffer())
        os.replace(temporary, place)
    except OSError as error:
        raise Refused(f"expected to save {path}, received {error}; what was there is as it was") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: pathlib.Path, task: Task, parts: dict[str, Any], device: str) -> tuple[int, int]:
    """Puts every part and the random state where they were; returns the steps done and the seed."""
    remedy = "give the checkpoint that this task wrote, or start again with --force"
    try:
        # weights_only: a file from elsewhere must not run code.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign formats, which the line below names
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"a file that holds {type(checkpoint).__name__}")
        identity = checkpoint["task"]
    except Exception as error:  # torch.load raises a dozen kinds
        reason = (str(error).splitlines() or [""])[0]
        raise Refused(
            f"expected a checkpoint of this demo in {path}, received {type(error).__name__} ({reason:.120}); {remedy}"
        ) from error
    if identity != _identity(task):
        theirs = identity if isinstance(identity, dict) else {}
        differ = ", ".join(name for name, value in _identity(task).items() if theirs.get(name) != value)
        raise Refused(f"expected a checkpoint of this task in {path}, received one of another ({differ}); {remedy}")
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if torch.device(device).type == "cuda" and "cuda" in checkpoint["random"]:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"], device)
        return int(checkpoint["done"]), int(checkpoint["seed"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise Refused(f"expected a whole checkpoint in {path}, received one with {reason:.120}; {remedy}") from error


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on the layers' matrices only."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "attn_layers" in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        {"params": matrices, "weight_decay": RECIPE.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _learning_rate(steps: int) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to 0."""
    return lambda step: min((step + 1) / RECIPE.warm_up, 1.0) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _endless_batches(dataset: Dataset[Tensor], seed: int, start: int) -> Iterator[Tensor]:
    """The batches of step `start` and after: every epoch in an order of its own, known from seed and epoch alone."""
    count = len(dataset)  # type: ignore[arg-type]
    size = min(RECIPE.batch_size, count)
    generator = torch.Generator().manual_seed(seed)
    for epoch in itertools.count():
        batches = torch.randperm(count, generator=generator).split(size)[: count // size]
        for step, rows in enumerate(batches, epoch * len(batches)):
            if step >= start:
                yield torch.stack([dataset[i] for i in rows.tolist()])


# Evaluation


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
