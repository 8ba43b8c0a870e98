"""The demo's parts, cut short: what it learns in seconds, its picture, Ctrl-C and --resume, a text of one's own."""

from __future__ import annotations

import argparse
import dataclasses
import math

import pytest
import torch

from fastmask import __main__, demo


def arguments(tmp_path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    paths = ["--output", str(tmp_path / "demo.png"), "--checkpoint", str(tmp_path / "demo.pt"), "--device", "cpu"]
    return parser.parse_args([*paths, *options])


def test_digits_are_split_quantised_and_never_the_mask():
    task = demo.digits_task()
    assert len(task.train) == 1500
    assert task.held_out.shape == (297, 64)
    assert task.held_out.max() == demo.GREY_LEVELS - 1 < task.mask_id == task.num_tokens - 1
    # Independent pixels are a real baseline: better than uniform, and below the entropy of five levels.
    assert 0.5 * math.log(5) < task.independent < math.log(5)


def test_held_out_digits_are_not_trained_on():
    train_images, _, held_out_images, _ = demo.load_digits()
    assert len(train_images) + len(held_out_images) == 1797
    seen = {tuple(image.tolist()) for image in train_images}
    assert not any(tuple(image.tolist()) in seen for image in held_out_images)


def test_the_judge_tells_digits_from_noise():
    task = demo.digits_task()
    confidence, label = demo.judge(task.held_out)
    _, _, _, labels = demo.load_digits()
    assert (confidence > demo.CONFIDENT).float().mean() > 0.75
    assert (label == labels).float().mean() > 0.95
    noise = torch.randint(0, demo.GREY_LEVELS, (200, 64), generator=torch.Generator().manual_seed(0))
    assert (demo.judge(noise)[0] > demo.CONFIDENT).float().mean() < 0.2


def test_a_short_run_learns_reports_and_draws(tmp_path, monkeypatch, capsys):
    """60 steps already beat independent pixels; the picture is a PNG."""
    monkeypatch.setattr(demo, "RECIPE", dataclasses.replace(demo.RECIPE, generate_steps=6, weight_average=0.9))
    monkeypatch.setattr(demo, "NUM_GENERATED", 64)
    assert demo.run(arguments(tmp_path, "--steps", "60")) == 0
    printed = capsys.readouterr().out
    bound, independent, uniform = _bits(printed)
    assert bound < independent < uniform == 2.32
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "of 10 classes" in printed


def _bits(printed: str) -> list[float]:
    words = next(line for line in printed.splitlines() if line.startswith("held out")).replace(";", "").split()
    return [float(word) for word in words if word[0].isdigit()]


def test_ctrl_c_leaves_a_checkpoint_to_resume_from(tmp_path, monkeypatch, capsys):
    real, calls = demo._endless_batches, []

    def interrupted(dataset):
        for batch in real(dataset):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(demo, "_endless_batches", interrupted)
    task = demo.digits_task()
    options = arguments(tmp_path, "--steps", "6")
    assert demo.train(demo.build(task), task, options) is None
    assert torch.load(options.checkpoint)["done"] == 3
    monkeypatch.setattr(demo, "_endless_batches", real)
    resumed = arguments(tmp_path, "--steps", "6", "--resume")
    steps = []
    monkeypatch.setattr(demo.NonAutoregressiveWrapper, "forward", _counting(steps))
    assert demo.train(demo.build(task), task, resumed) is not None
    assert len(steps) == 3
    assert torch.load(options.checkpoint)["done"] == 6


def _counting(steps: list[int]):
    forward = demo.NonAutoregressiveWrapper.forward

    def counted(self, *args, **kwargs):
        steps.append(1)
        return forward(self, *args, **kwargs)

    return counted


def test_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "train", lambda *_: None)
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
    assert all(len(eval(line)) == demo.TEXT_LENGTH for line in samples)


def test_text_with_the_line_ends_of_any_system(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one line\r\nanother line\rand a third\n" * 60)
    assert {"\r", "\n"} < set(demo.text_task(path).characters)
    assert len(demo.text_task(path).train) > 10


def test_resume_without_a_checkpoint_and_steps_below_one_are_refused(tmp_path, capsys):
    assert demo.run(arguments(tmp_path, "--resume")) == 1
    assert "nothing to resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        arguments(tmp_path, "--steps", "0")
    assert "expected at least 1, received 0" in capsys.readouterr().err


def test_text_too_short(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab" * 100)
    with pytest.raises(ValueError, match="expected a text of at least 1280 characters"):
        demo.text_task(path)


def test_missing_extras_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_missing_packages", lambda: ["scikit-learn"])
    assert demo.run(arguments(tmp_path)) == 1
    assert "pip install 'fastmask[demo]'" in capsys.readouterr().err


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    """Weights, their average, the optimiser and the learning rate all go on: same batches, same masks, same end."""
    task, taken, stop = demo.digits_task(), [], [None]
    batch = task.held_out[:8]

    def batches(dataset):
        while len(taken) != stop[0]:
            torch.manual_seed(len(taken))  # the masks of this step
            taken.append(1)
            yield batch
        raise KeyboardInterrupt

    def run(seed: int, *options: str):
        torch.manual_seed(seed)
        return demo.train(demo.build(task), task, arguments(tmp_path, "--steps", "6", *options))

    monkeypatch.setattr(demo, "_endless_batches", batches)
    whole = run(0)
    taken.clear()
    stop[0] = 3
    assert run(0) is None
    stop[0] = None
    resumed = run(1, "--resume")  # another initialisation: nothing of it may remain
    assert len(taken) == 6
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=name)


def test_held_out_text_is_not_trained_on(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(0x4E00 + i) for i in range(40 * demo.TEXT_LENGTH)), encoding="utf-8")
    task = demo.text_task(path)  # every character stands once
    trained, held_out = demo.stack(task.train).flatten().tolist(), task.held_out.flatten().tolist()
    assert len(held_out) == 4 * demo.TEXT_LENGTH
    assert sorted(trained + held_out) == list(range(40 * demo.TEXT_LENGTH))


def test_what_is_reported_is_what_training_returned_from_the_seed_given(tmp_path, monkeypatch):
    reported, seeds = [], []
    monkeypatch.setattr(demo, "train", lambda *_: seeds.append(torch.initial_seed()) or "the average")
    monkeypatch.setattr(demo, "report_bound", lambda model, *_: reported.append(model))
    monkeypatch.setattr(demo, "report_digits", lambda model, *_: reported.append(model))
    assert demo.run(arguments(tmp_path, "--seed", "7")) == 0
    assert reported == ["the average"] * 2
    assert seeds == [7]
