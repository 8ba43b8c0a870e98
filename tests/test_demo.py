"""The demo's parts, cut short: what it learns in seconds, its picture, Ctrl-C and --resume, a text of one's own."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pathlib
import signal
import threading

import pytest
import torch

from fastmask import __main__, demo
from fastmask.demo import checkpoints, command_line, refusals, results, tasks, training


def arguments(tmp_path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    paths = ["--output", str(tmp_path / "demo.png"), "--checkpoint", str(tmp_path / "demo.pt"), "--device", "cpu"]
    return parser.parse_args([*paths, *options])


def test_digits_are_split_quantised_and_never_the_mask():
    task = tasks.digits_task()
    assert len(task.train) == 1500
    assert task.held_out.shape == (297, 64)
    assert task.held_out.max() == tasks.GREY_LEVELS - 1 < task.mask_id == task.num_tokens - 1
    # Independent pixels are a real baseline: better than uniform, and below the entropy of five levels.
    assert 0.5 * math.log(5) < task.independent < math.log(5)


def test_held_out_digits_are_not_trained_on():
    train_images, _, held_out_images, _ = tasks.load_digits()
    assert len(train_images) + len(held_out_images) == 1797
    seen = {tuple(image.tolist()) for image in train_images}
    assert not any(tuple(image.tolist()) in seen for image in held_out_images)


def test_the_judge_tells_digits_from_noise():
    task = tasks.digits_task()
    confidence, label = results.judge(task.held_out)
    _, _, _, labels = tasks.load_digits()
    assert (confidence > results.CONFIDENT).float().mean() > 0.75
    assert (label == labels).float().mean() > 0.95
    noise = torch.randint(0, tasks.GREY_LEVELS, (200, 64), generator=torch.Generator().manual_seed(0))
    assert (results.judge(noise)[0] > results.CONFIDENT).float().mean() < 0.2


def test_a_short_run_learns_reports_and_draws(tmp_path, monkeypatch, capsys):
    """60 steps already beat independent pixels; the picture is a PNG."""
    monkeypatch.setattr(training, "RECIPE", dataclasses.replace(training.RECIPE, weight_average=0.9))
    monkeypatch.setattr(results, "NUM_GENERATED", 64)
    assert demo.run(arguments(tmp_path, "--steps", "60")) == 0
    printed = capsys.readouterr().out
    bound, independent, uniform = _bits(printed)
    assert bound < independent < uniform == 2.32
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "of 10 classes" in printed


def _bits(printed: str) -> list[float]:
    words = next(line for line in printed.splitlines() if line.startswith("held out")).replace(";", "").split()
    return [float(word) for word in words if word[0].isdigit()]


def test_ctrl_c_leaves_a_checkpoint_to_resume_from(tmp_path, monkeypatch):
    """Pressed inside the optimiser's step, which it may not break off: the checkpoint holds three whole steps."""
    task, step, calls = tasks.digits_task(), torch.optim.AdamW.step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    options = arguments(tmp_path, "--steps", "6")
    assert training.train(training.build(task), task, options) is None
    assert signal.getsignal(signal.SIGINT) is before
    checkpoint = torch.load(options.checkpoint, weights_only=True)
    moments = checkpoint["optimizer"]["state"].values()
    assert checkpoint["done"] == 3 == checkpoint["average"]["n_averaged"]
    assert {int(moment["step"]) for moment in moments} == {3}
    resumed = arguments(tmp_path, "--steps", "6", "--resume")
    steps = []
    monkeypatch.setattr(training.NonAutoregressiveWrapper, "forward", _counting(steps))
    assert training.train(training.build(task), task, resumed) is not None
    assert len(steps) == 3
    assert torch.load(options.checkpoint, weights_only=True)["done"] == 6


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    task, done = tasks.digits_task(), []
    run = threading.Thread(
        target=lambda: done.append(training.train(training.build(task), task, arguments(tmp_path, "--steps", "1")))
    )
    run.start()
    run.join()
    assert isinstance(done[0], training.NonAutoregressiveWrapper)


def _counting(steps: list[int]):
    forward = training.NonAutoregressiveWrapper.forward

    def counted(self, *args, **kwargs):
        steps.append(1)
        return forward(self, *args, **kwargs)

    return counted


def test_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "train", lambda *_: None)
    assert demo.run(arguments(tmp_path)) == 130
    assert "--resume goes on from" in capsys.readouterr().out


def test_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where the default checkpoint goes
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    assert __main__.main(["demo", "--text", str(path), "--steps", "5", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    samples = [line for line in lines if line.startswith("'")]
    assert len(samples) == 8
    assert all(len(eval(line)) == tasks.TEXT_LENGTH for line in samples)
    written = (tmp_path / "fastmask-demo.txt").read_bytes().decode()
    assert written == "\n\n".join(eval(line) for line in samples)


def test_text_with_the_line_ends_of_any_system(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one line\r\nanother line\rand a third\n" * 60)
    assert {"\r", "\n"} < set(tasks.text_task(path).characters)
    assert len(tasks.text_task(path).train) > 10


def test_resume_without_a_checkpoint_and_steps_below_one_are_refused(tmp_path, capsys):
    assert demo.run(arguments(tmp_path, "--resume")) == 2
    assert "nothing to resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        arguments(tmp_path, "--steps", "0")
    assert "expected at least 1, received 0" in capsys.readouterr().err
    for option in ("--steps", "--seed"):
        with pytest.raises(SystemExit):
            arguments(tmp_path, option, "many")
        assert "expected a whole number, received 'many'" in capsys.readouterr().err


def test_text_too_short(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab" * 100)
    with pytest.raises(ValueError, match="expected a text of at least 1280 characters"):
        tasks.text_task(path)


def test_missing_extras_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "_missing_packages", lambda: ["scikit-learn"])
    assert demo.run(arguments(tmp_path)) == 1
    assert "pip install 'fastmask[demo]'" in capsys.readouterr().err


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    """Bit for bit: weights, their average, optimiser, learning rate, random state and order of the data go on."""
    task, real, stop = tasks.digits_task(), training._endless_batches, [None]

    def batches(*order):
        for count, batch in enumerate(real(*order), 1):
            if count == stop[0]:
                signal.raise_signal(signal.SIGINT)
            yield batch

    def run(seed: int, *options: str):
        torch.manual_seed(seed)
        return training.train(
            training.build(task), task, arguments(tmp_path, "--steps", "6", "--seed", str(seed), *options)
        )

    monkeypatch.setattr(training, "_endless_batches", batches)
    whole = run(0)
    at_end = torch.get_rng_state()
    stop[0] = 3
    assert run(0) is None
    stop[0] = None
    resumed = run(1, "--resume")  # another initialisation and seed: nothing of them may remain
    assert torch.equal(torch.get_rng_state(), at_end)  # what is generated afterwards is the same too
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_every_epoch_holds_every_batch_once_in_an_order_of_its_own():
    dataset = list(torch.arange(200))
    batches = training._endless_batches(dataset, 0, 0)
    epochs = [torch.cat([next(batches) for _ in range(3)]) for _ in range(2)]
    assert all(len(epoch.unique()) == 3 * training.RECIPE.batch_size for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(next(training._endless_batches(dataset, 0, 4)), epochs[1][64:128])
    assert not torch.equal(next(training._endless_batches(dataset, 5, 0)), epochs[0][:64])


LONG = "the quick brown fox jumps over the lazy dog. " * 60


def refused(tmp_path, capsys, *options: str) -> str:
    """The one line that the command line prints for these options, with exit status 2 and no training."""
    assert demo.run(arguments(tmp_path, *options)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fastmask demo: error: expected ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (None, "No such file"),
        ("folder", "Is a directory"),
        (b"", "at least 1280 characters"),
        (b"ab" * 100, "at least 1280 characters"),
        (bytes(range(256)) * 40, "expected UTF-8"),
        (bytes(4000), "received a NUL at character 0"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_line(tmp_path, capsys, contents, words):
    path = tmp_path / "text.txt"
    if contents == "folder":
        path.mkdir()
    elif contents is not None:
        path.write_bytes(contents)
    assert words in refused(tmp_path, capsys, "--text", str(path))


def test_a_text_or_checkpoint_that_may_not_be_read_is_one_line(tmp_path, capsys, monkeypatch):
    """Root may read everything, so the refusal is the system's in name only."""

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "text.txt").write_text(LONG)
    (tmp_path / "demo.pt").write_bytes(b"a checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", denied)
        assert "Permission denied" in refused(tmp_path, capsys, "--resume")
    monkeypatch.setattr(pathlib.Path, "open", denied)
    assert "Permission denied" in refused(tmp_path, capsys, "--text", str(tmp_path / "text.txt"), "--force")


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99", "cpu:", "", "hpu"])
def test_a_device_that_is_not_here_is_one_line(tmp_path, capsys, device):
    assert "expected a device of this machine" in refused(tmp_path, capsys, "--device", device)


@pytest.mark.parametrize("option", ["--output", "--checkpoint"])
def test_places_are_looked_at_before_training(tmp_path, capsys, monkeypatch, option):
    assert "in a folder that is there" in refused(tmp_path, capsys, option, str(tmp_path / "none" / "x"))
    assert "received the folder" in refused(tmp_path, capsys, option, str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "where it can be written" in refused(tmp_path, capsys)


def test_a_place_that_saving_would_destroy_is_refused(tmp_path, capsys):
    assert "a plain file" in refused(tmp_path, capsys, "--force", "--checkpoint", os.devnull)
    text = tmp_path / "text.txt"
    text.write_text(LONG)
    for option in ("--output", "--checkpoint"):
        place = str(tmp_path / "." / "text.txt")
        assert f"--text and {option}" in refused(tmp_path, capsys, "--text", str(text), "--force", option, place)
    same = str(tmp_path / "same")
    assert "--output and --checkpoint" in refused(tmp_path, capsys, "--output", same, "--checkpoint", same)
    assert text.read_text() == LONG


def test_a_checkpoint_is_overwritten_by_force_only(tmp_path, capsys, monkeypatch):
    (tmp_path / "demo.pt").write_bytes(b"precious")
    assert "--force" in refused(tmp_path, capsys)
    assert (tmp_path / "demo.pt").read_bytes() == b"precious"
    with pytest.raises(SystemExit):
        arguments(tmp_path, "--force", "--resume")
    monkeypatch.setattr(training, "train", lambda *_: None)
    assert demo.run(arguments(tmp_path, "--force")) == 130


def test_a_foreign_or_broken_checkpoint_is_one_line(tmp_path, capsys):
    text, other, path = tmp_path / "text.txt", tmp_path / "other.txt", tmp_path / "demo.pt"
    text.write_text(LONG)
    other.write_text(LONG.replace("q", "Q"))
    options = ["--text", str(text), "--steps", "1", "--resume"]
    for contents in (b"", b"no checkpoint", b"PK\x03\x04"):
        path.write_bytes(contents)
        assert "a checkpoint of this demo" in refused(tmp_path, capsys, *options)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    assert "a checkpoint of this demo" in refused(tmp_path, capsys, *options)
    for value in ({"done": 1}, [1], torch.ones(2), pathlib.PurePosixPath("code")):  # the last: weights_only refuses
        torch.save(value, path)
        assert "a checkpoint of this demo" in refused(tmp_path, capsys, *options)
    task = tasks.text_task(text)
    torch.save({"task": training.identity(task), "code": pathlib.PurePosixPath("code")}, path)  # the rest is right
    assert "a checkpoint of this demo" in refused(tmp_path, capsys, *options)
    torch.save({"task": 5}, path)
    assert "one of another" in refused(tmp_path, capsys, *options)
    torch.save({"task": training.identity(task)}, path)
    assert "a whole checkpoint" in refused(tmp_path, capsys, *options)
    assert training.train(training.build(task), task, arguments(tmp_path, "--steps", "1")) is not None
    capsys.readouterr()
    assert "(characters)" in refused(tmp_path, capsys, "--text", str(other), "--steps", "1", "--resume")
    assert "num_tokens" in refused(tmp_path, capsys, "--steps", "1", "--resume")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "a checkpoint of this demo" in refused(tmp_path, capsys, *options)


def test_a_save_that_fails_leaves_the_checkpoint_that_was_there(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    path = tmp_path / "demo.pt"
    checkpoints.save_checkpoint({"done": 1}, path)
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        with pytest.raises(refusals.Refused, match=r"expected to save .*File too large"):
            checkpoints.save_checkpoint({"done": 2, "large": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.load(path, weights_only=True) == {"done": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_keeps_a_link_and_the_usual_permissions(tmp_path):
    usual, link, target = tmp_path / "usual", tmp_path / "link.pt", tmp_path / "target.pt"
    usual.touch()
    link.symlink_to(target)
    checkpoints.save_checkpoint({"done": 1}, link)
    assert link.is_symlink()
    assert target.stat().st_mode == usual.stat().st_mode


def test_few_lines_of_progress_off_a_terminal(tmp_path, capfd):
    task = tasks.digits_task()
    training.train(training.build(task), task, arguments(tmp_path, "--steps", "5"))
    shown = capfd.readouterr().err
    assert "5/5" in shown
    assert shown.count("\r") <= 3


def test_held_out_text_is_not_trained_on(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(0x4E00 + i) for i in range(40 * tasks.TEXT_LENGTH)), encoding="utf-8")
    task = tasks.text_task(path)  # every character stands once
    trained, held_out = tasks.stack(task.train).flatten().tolist(), task.held_out.flatten().tolist()
    assert len(held_out) == 4 * tasks.TEXT_LENGTH
    assert sorted(trained + held_out) == list(range(40 * tasks.TEXT_LENGTH))


def test_what_is_reported_is_what_training_returned_from_the_seed_given(tmp_path, monkeypatch):
    reported, seeds = [], []
    monkeypatch.setattr(training, "train", lambda *_: seeds.append(torch.initial_seed()) or "the average")
    monkeypatch.setattr(results, "report_bound", lambda model, *_: reported.append(model))
    monkeypatch.setattr(results, "report_digits", lambda model, *_: reported.append(model))
    assert demo.run(arguments(tmp_path, "--seed", "7")) == 0
    assert reported == ["the average"] * 2
    assert seeds == [7]
