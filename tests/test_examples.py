"""Each file in examples/ runs, cut short, and prints what it says it does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from processes import printed_by

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A file of prose."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "CHANGELOG.md"]
    prose = " ".join(re.sub(r"[^a-z.,' ]+", " ", page.read_text(encoding="utf-8").lower()) for page in pages)
    path.write_text(re.sub(" +", " ", prose), encoding="utf-8")
    return str(path)


def run(name: str, capsys, *arguments: str) -> str:
    """What an example prints."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(list(arguments))
    return capsys.readouterr().out


def number(pattern: str, printed: str) -> float:
    """The last number that the pattern's group finds."""
    return float(re.findall(pattern, printed)[-1])


def nats_a_letter(printed: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"([\d.]+) nats a letter", printed)]


def alone_and_on_two(name: str, capsys, *arguments: str) -> tuple[str, str]:
    """What an example prints by itself, and on two processes."""
    return run(name, capsys, *arguments), printed_by(f"examples/{name}.py", *arguments, processes=2)


@pytest.mark.slow
def test_text(text, capsys):
    printed = run("text", capsys, text, "--steps", "100", "--length", "32", "--prompt", "the ")
    assert number(r"held out: ([\d.]+) bits", printed) < 4.3  # independent characters: 4.4 bits at least
    lines = printed.splitlines()[-4:]
    assert all(line.startswith("'the ") and len(line) == 34 for line in lines), lines
    assert len(set(lines)) == 4


@pytest.mark.slow
def test_class_conditional_images(capsys):
    printed = run("class_conditional_images", capsys, "--steps", "200", "--guidance", "1.5")
    assert number(r"([\d.]+) nats a pixel", printed) < 1.3  # uniform: ln 5 = 1.61
    picture = printed.splitlines()[-8:]
    assert all(re.fullmatch(r"([ .:*#]{8}  ){7}[ .:*#]{8}", line) for line in picture), picture


def test_own_network(capsys):
    printed = run("own_network", capsys)
    assert "linear head: True" in printed
    assert number(r"(\d+)% of the letters", printed) > 25  # by chance: 6
    assert number(r"from (\d+) first ones", printed) > 8


@pytest.mark.slow
def test_blocks(capsys):
    printed = run("blocks", capsys)
    *states, last = [line for line in printed.splitlines() if not line.startswith("loss")]
    assert states[-1].startswith("abcdefghijklmno")
    assert "_" not in states[-1]
    assert int(last.split()[0]) == len(states) < 21


def test_block_cache(capsys):
    printed = run("block_cache", capsys)
    assert number(r"million, (\d+) times fewer", printed) > 10
    assert "prompts of 3 lengths: the same ids: True" in printed


def test_mdlm_ancestral(capsys):
    printed = run("mdlm_ancestral", capsys, "--batch", "64")
    law = number(r"the law itself +([\d.]+)", printed)
    nats = {int(steps): float(figure) for steps, figure in re.findall(r"(\d+) steps +([\d.]+)", printed)}
    assert nats[2] > nats[8] + 0.5 > nats[32] + 0.5  # letters committed together do not know of each other
    assert nats[128] == pytest.approx(law, abs=0.08)


def test_remdm(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as where it is run
    for options in ([], ["--rule", "rescale", "--eta", "0.5"]):
        printed = run("remdm", capsys, "--batch", "64", *options)
        law = number(r"the law itself +([\d.]+)", printed)
        first, second, third = (
            float(figure) for figure in re.findall(r"^8 steps.* ([\d.]+)$", printed, re.MULTILINE)
        )
        assert first > second + 0.15 > third + 0.15 > law + 0.15


@pytest.mark.parametrize("masks", [[], ["--whole-words"]], ids=["tokens", "words"])
def test_bert_hugging_face(text, capsys, masks):
    pytest.importorskip("transformers", reason="needs the extra hf")
    printed = run("bert_hugging_face", capsys, text, "--steps", "101", *masks)
    assert "linear head: cls.predictions.decoder, as a run has shown" in printed
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)[::2])
    assert last < first - 0.5


def test_decoder_hugging_face(capsys):
    pytest.importorskip("transformers", reason="needs the extra hf")
    printed = run("decoder_hugging_face", capsys)
    assert "linear head: lm_head, as a run has shown" in printed
    assert number(r"(\d+)% of the letters", printed) > 60  # by chance: 6
    assert number(r"from (\d+) first ones", printed) > 8


def test_hugging_face_trainer(text, capsys):
    pytest.importorskip("accelerate", reason="needs the extra train")
    printed = run("hugging_face_trainer", capsys, text, "--steps", "200")
    before, after = (number(pattern, printed) for pattern in (r"([\d.]+) nats at step 0", r"([\d.]+) at step 200"))
    assert after < before - 0.6
    assert number(r"loaded again: ([\d.]+) nats", printed) == after


@pytest.mark.parametrize("name", ["accelerate_loop", "lightning_module"])
def test_loops(name, capsys, monkeypatch):
    pytest.importorskip(name.split("_")[0], reason="needs the extra train")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as where it is run
    first, *_, last = nats_a_letter(run(name, capsys, "--steps", "200"))
    assert last < 2.3 < 3 < first  # uniform: 2.77


def test_diffusers_scheduler(capsys):
    pytest.importorskip("diffusers", reason="needs the extra diffusers")
    pytest.importorskip("transformers", reason="needs the extra hf")
    printed = run("diffusers_scheduler", capsys, "--steps", "300")
    assert "the same ids: True" in printed
    assert number(r"fastmask: (\d+)% of the letters", printed) > 30  # by chance: 10
    assert number(r"after (\d+) passes", printed) > 2


@pytest.mark.slow
def test_ddp(capsys, monkeypatch):
    """Two processes as one."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as where it is run
    one, two = alone_and_on_two("ddp", capsys, "--steps", "100")
    assert "2 of 2 processes: 32 of 64" in two
    first, _, last = nats_a_letter(two)
    assert last < first - 0.5
    assert nats_a_letter(two) == pytest.approx(nats_a_letter(one), abs=0.02)


@pytest.mark.slow
def test_vocabulary_parallel(capsys, monkeypatch):
    """Two processes as one."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as where it is run
    one, two = alone_and_on_two("vocabulary_parallel", capsys, "--steps", "15")
    assert "1 of 2 processes: ids 0 to 4095 of 8192, of which 17 are any" in two
    first, *_, last = nats_a_letter(two)
    assert len(nats_a_letter(two)) == 4
    assert last < first - 0.3
    assert nats_a_letter(two) == pytest.approx(nats_a_letter(one), abs=0.002)
    assert one.splitlines()[-1] in two


def test_all_are_run():
    """And each says on top how it is run."""
    tested = {name.removeprefix("test_") for name in globals()} | {"accelerate_loop", "lightning_module"}
    for name in EXAMPLES:
        assert name in tested
        assert f"python examples/{name}.py" in (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
