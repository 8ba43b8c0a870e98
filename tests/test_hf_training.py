"""fastmask.hf in training: collator, loss of labels, Trainer, checkpoints."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import printed_by
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="needs the extra train")
hf = importlib.import_module("fastmask.hf")
lab = importlib.import_module("hf_training")

ROOT = Path(__file__).parent.parent
V, MASK, SPECIAL = lab.V, lab.MASK, lab.SPECIAL


# ---- the collator ----


def collated(number: int = 400, **options: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch, and its clean ids."""
    examples = lab.examples(number)
    torch.manual_seed(1)
    batch = hf.MaskCollator(lab.tokenizer(), **options)(examples)
    return batch, lab.tokenizer().pad(examples, return_tensors="pt")["input_ids"]


def is_share(hits: torch.Tensor, share: float) -> bool:
    """Whether so many of independent coins are within 5 standard deviations of that share."""
    return abs(hits.double().mean().item() - share) <= 5 * (share * (1 - share) / hits.numel()) ** 0.5


def test_a_batch_is_transformers_own_but_for_the_draws():
    examples = lab.examples(7)
    options = {"tokenizer": lab.tokenizer(), "pad_to_multiple_of": 8}
    ours = hf.MaskCollator(**options)(examples)
    theirs = transformers.DataCollatorForLanguageModeling(**options)(examples)
    assert list(ours) == list(theirs)
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    for name in ours:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
    clean = lab.tokenizer().pad(examples, pad_to_multiple_of=8, return_tensors="pt")["input_ids"]
    asked = ours["labels"] != -100
    assert torch.equal(ours["labels"][asked], clean[asked])
    assert torch.equal(ours["input_ids"][~asked], clean[~asked])


@pytest.mark.parametrize("given", [False, True])
def test_special_tokens_and_padding_are_never_masked(given):
    examples = lab.examples(50)
    if given:
        for example in examples:
            example["special_tokens_mask"] = [int(i in SPECIAL) for i in example["input_ids"]]
    batch = hf.MaskCollator(lab.tokenizer(), mlm_probability=1.0)(examples)
    clean = lab.tokenizer().pad([{"input_ids": e["input_ids"]} for e in examples], return_tensors="pt")["input_ids"]
    assert torch.equal(batch["labels"] != -100, ~torch.isin(clean, torch.tensor(SPECIAL)))


def test_shares_are_those_of_the_arguments():
    for share, to_mask, to_random in ((0.15, 0.8, 0.1), (0.5, 0.3, 0.6), (0.3, 0.0, 1.0), (0.4, 1.0, 0.0)):
        batch, clean = collated(mlm_probability=share, mask_replace_prob=to_mask, random_replace_prob=to_random)
        maskable = ~torch.isin(clean, torch.tensor(SPECIAL))
        asked = batch["labels"] != -100
        assert is_share(asked[maskable], share)
        seen, true = batch["input_ids"][asked], clean[asked]
        words = V - len(SPECIAL)
        assert is_share(seen == MASK, to_mask)
        changed = (seen != MASK) & (seen != true)
        assert is_share(changed, to_random * (words - 1) / words)  # a random word may be the word itself
        assert not torch.isin(seen[changed], torch.tensor(SPECIAL)).any()


def test_whole_words():
    """Words of one to three tokens: all of a word or nothing, each word by a coin of its own."""
    examples = [{"input_ids": e["input_ids"]} for e in lab.examples(300)]
    words = []
    for row, example in enumerate(examples):
        offsets, word, place, ids = [], [], 0, example["input_ids"]
        for i, token in enumerate(ids):
            is_new = token in SPECIAL or i == 1 or (row + 3 * i) % 5 < 2
            place += is_new
            offsets.append((0, 0) if token in SPECIAL else (place, place + 1))
            place += 1
            word.append(-1 if token in SPECIAL else len(set(word)) + is_new)
        example["offset_mapping"] = offsets
        words.append(word)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="Random token replacement is not supported"):
        collator = hf.MaskCollator(lab.tokenizer(), whole_word_mask=True, mlm_probability=0.3)
    length = max(len(e["input_ids"]) for e in examples)
    for example in examples:  # the tokenizer pads ids alone
        example["offset_mapping"] += [(0, 0)] * (length - len(example["offset_mapping"]))
    batch = collator(examples)
    chosen = []
    for word, asked in zip(words, (batch["labels"] != -100).tolist(), strict=True):
        assert not any(asked[len(word) :])
        for number in set(word):
            states = {a for w, a in zip(word, asked, strict=False) if w == number}
            assert len(states) == 1
            assert number >= 0 or states == {False}
            if number >= 0:
                chosen += states
    assert is_share(torch.tensor(chosen), 0.3)
    assert (batch["input_ids"][batch["labels"] != -100] == MASK).all()


def test_what_a_wrapper_takes():
    (labelled, clean), (own, _), (drawn, _) = (collated(20, gives=g) for g in ("labels", "is_masked", "maskable"))
    assert torch.equal(own["masked_ids"], labelled["input_ids"])
    assert torch.equal(own["is_masked"], labelled["labels"] != -100)
    for batch in (own, drawn):
        assert torch.equal(batch["input_ids"], clean)
        assert torch.equal(batch["attention_mask"], clean != 0)
    assert torch.equal(drawn["maskable"], ~torch.isin(clean, torch.tensor(SPECIAL)))
    for kind, batch in (("mean", own), ("weighted", drawn)):
        assert lab.build(kind)(batch.pop("input_ids"), **batch).loss > 0


@pytest.mark.parametrize("seed", [None, 5])
def test_masks_are_reproducible_under_workers(seed):
    def epoch(workers: int, torch_seed: int = 0) -> list[list[list[int]]]:
        torch.manual_seed(torch_seed)
        collator = hf.MaskCollator(lab.tokenizer(), seed=seed)
        loader = DataLoader([lab.examples(1)[0]] * 24, batch_size=8, collate_fn=collator, num_workers=workers)
        return [batch["labels"].tolist() for batch in loader]

    for workers in (0, 2):
        once = epoch(workers)
        assert once == epoch(workers)
        assert once[0] != once[1]  # of two workers too
        assert (once == epoch(workers, torch_seed=1)) == (seed is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gives": "both"}, "gives"),
        ({"mlm": False}, "expected mlm=True"),
        ({"return_tensors": "np"}, "return_tensors"),
    ],
    ids=str,
)
def test_collators_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hf.MaskCollator(lab.tokenizer(), **options)
    with pytest.raises(ValueError, match="return_tensors='pt'"):
        hf.MaskCollator(lab.tokenizer())(lab.examples(2), return_tensors="np")


# ---- the loss of labels ----


class Rows(TorchDispatchMode):
    """The most rows of logits that any operation makes."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (V,):
            self.most = max(self.most, out.numel() // V)
        return out


def by_hand(loss: torch.Tensor, model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def assert_equal_to(rtol: float, ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=0)
    total = sum(g.norm() ** 2 for g in theirs[1].values() if g is not None) ** 0.5
    for name, gradient in theirs[1].items():
        if gradient is None:
            assert ours[1][name] is None or not ours[1][name].any()
        else:
            assert (ours[1][name] - gradient).norm() <= rtol * total, name


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_the_models_own(tied):
    model = lab.bert(tie_word_embeddings=tied)
    batch, _ = collated(100)
    net = hf.Backbone(model)
    with Rows() as rows:
        ours = by_hand(hf.masked_lm_loss(net, **batch), model)
    assert V < rows.most == (batch["labels"] != -100).sum()  # the head's gradient has V rows
    assert_equal_to(1e-12, ours, by_hand(model(**batch).loss, model))


def test_the_loss_of_a_model_whose_head_is_not_linear():
    model = lab.bert()
    batch, _ = collated(6)
    net = hf.Backbone(model)
    model.cls.register_forward_hook(lambda *_: None)
    assert net.linear_head() is None
    assert_equal_to(1e-12, by_hand(hf.masked_lm_loss(net, **batch), model), by_hand(model(**batch).loss, model))


@pytest.mark.parametrize("name", ["Gemma2", "Cohere"])
def test_labels_of_a_decoder_are_of_their_own_positions(name):
    """Under a softcap, and scaled; of all logits, from the formula."""
    sizes = {**lab.SIZES, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    own = {"Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5}, "Cohere": {"logit_scale": 0.3}}[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**sizes, **own, attn_implementation="eager")
    ).double()
    net = hf.Backbone(model, bidirectional=True)
    batch, _ = collated(6)
    ids, labels, mask = (batch[key] for key in ("input_ids", "labels", "attention_mask"))
    logits = model(input_ids=ids, attention_mask=mask, is_causal=False).logits.double()
    expected = F.cross_entropy(logits[labels != -100], labels[labels != -100])
    ours = hf.masked_lm_loss(net, **batch)
    assert_equal_to(1e-12, by_hand(ours, model), by_hand(expected, model))


def test_parts_of_labels_add_up():
    model = hf.MaskedLM(hf.Backbone(lab.bert()))
    batch, _ = collated(6)
    count = (batch["labels"] != -100).sum()
    whole = model(**batch).loss
    for number in (count, int(count)):
        parts = [
            model(**{name: x[part] for name, x in batch.items()}, num_items_in_batch=number).loss
            for part in (slice(0, 2), slice(2, 6))
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    batch["labels"].fill_(-100)
    assert model(**batch).loss == 0


def test_a_bare_model_is_refused():
    with pytest.raises(TypeError, match=r"expected net to be a fastmask\.hf\.Backbone, received BertForMaskedLM"):
        hf.masked_lm_loss(lab.bert(), **collated(2)[0])


# ---- Trainer ----


def assert_is_the_formula(kind: str, found: dict[str, Any], batches: list[dict[str, torch.Tensor]]) -> None:
    loss, expected = lab.gradients(kind, batches)
    # Trainer adds up what it logs in float32.
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_equal_to(1e-12, (loss, found["fall"]), (loss, expected))


@pytest.mark.parametrize("kind", lab.KINDS)
@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_is_the_whole_batchs(kind, parts, tmp_path):
    found = lab.step(kind, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=parts)
    assert len(found["batches"]) == parts
    assert len({batch["x"].shape for batch in found["batches"]}) == min(parts, 2) or parts == 1
    assert_is_the_formula(kind, found, found["batches"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """What two processes did, in a folder."""
    folder = tmp_path_factory.mktemp("ranks")
    printed_by("tests/hf_training.py", str(folder), processes=2)
    return folder


@pytest.mark.parametrize("kind", lab.KINDS)
def test_a_step_of_two_processes_is_the_whole_batchs(kind, ranks):
    """Three parts of two sequences on each."""
    one, other = (torch.load(ranks / f"{kind} {rank}.pt") for rank in range(2))
    for name, fall in one["fall"].items():
        assert torch.equal(fall, other["fall"][name])
    assert_is_the_formula(kind, one, one["batches"] + other["batches"])
    if kind == "weighted":  # the same places in rows of two ranks would be the same draws
        masks = [[(b["seen"] == MASK).tolist() for b in each["batches"]] for each in (one, other)]
        assert masks[0] != masks[1]


@pytest.mark.parametrize("kind", lab.KINDS)
def test_evaluation_is_the_formulas(kind, tmp_path):
    """One batch; logits are made of asked rows alone. Masks that a wrapper draws are the same each time."""
    trained = lab.trainer(kind, tmp_path, per_device_eval_batch_size=9)
    with lab.recording(trained.model) as batches, Rows() as rows:
        losses = [trained.evaluate()["eval_loss"] for _ in range(2)]
    for batch, loss in zip(batches, losses, strict=True):
        assert loss == pytest.approx(lab.gradients(kind, [batch])[0].item(), rel=1e-6)
    assert (losses[0] == losses[1]) == (kind == "weighted")
    assert 0 < rows.most < batches[0]["x"].numel()


@pytest.mark.parametrize("kind", lab.KINDS)
def test_evaluation_of_unequal_batches_is_the_whole_sets(kind, tmp_path):
    """Of 6 and of 3 sequences, of other lengths."""
    trained = lab.trainer(kind, tmp_path, per_device_eval_batch_size=6)
    with lab.recording(trained.model) as batches:
        loss = trained.evaluate()["eval_loss"]
    assert len(batches) == 2
    expected = lab.gradients(kind, batches)[0].item()
    assert loss == pytest.approx(expected, rel=1e-6)
    means = [lab.gradients(kind, [batch])[0].item() for batch in batches]
    assert abs((2 * means[0] + means[1]) / 3 - expected) > 1e-4  # by rows, as Trainer has it


@pytest.mark.parametrize("kind", lab.KINDS)
def test_gradient_checkpointing_changes_nothing(kind, tmp_path):
    """Each layer runs a second time, in backward."""
    passes = []

    def step(**options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = lab.bert()
        model.bert.encoder.layer[0].attention.register_forward_pre_hook(lambda *_: passes.append(1))
        wrapped = lab.build(kind, model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trained = lab.trainer(kind, tmp_path, wrapped, max_steps=1, per_device_train_batch_size=4, **options)
        passes.clear()
        trained.train()
        assert not hasattr(wrapped, "get_input_embeddings")
        fall = {name: before[name] - p.detach() for name, p in model.named_parameters()}
        return torch.tensor(trained.state.log_history[0]["loss"]), fall

    plain = step()
    assert len(passes) == 1
    checkpointed = step(gradient_checkpointing=True)
    assert len(passes) == 2
    assert_equal_to(1e-12, checkpointed, plain)


@pytest.mark.parametrize("kind", ["weighted", "labels"])
def test_neftunes_noise_is_on_the_embeddings(kind, tmp_path):
    plain, noisy = (
        lab.step(kind, tmp_path, per_device_train_batch_size=4, **options)
        for options in ({}, {"neftune_noise_alpha": 5.0})
    )
    assert 0 < abs(noisy["loss"] - plain["loss"]) < 1


def test_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "transformers.md").read_text(encoding="utf-8")
    block = page.partition("```py\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    lab.bert().float().save_pretrained("model")
    namespace = {"path": "model", "tokenizer": lab.tokenizer(), "data": lab.examples(8)}
    exec(compile(block, "docs/transformers.md", "exec"), namespace)
    assert namespace["trainer"].state.global_step == 3


def test_a_run_goes_on_where_its_checkpoint_was(tmp_path):
    model = lab.build("weighted", self_token_critic=True).double()
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    whole = lab.trainer("weighted", tmp_path, model, **options)
    whole.train()
    other = lab.build("weighted", self_token_critic=True).double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    resumed = lab.trainer("weighted", tmp_path, other, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert any(name.startswith("token_critic.to_logits") for name, _ in other.named_parameters())


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """At a rate of 1 that is the first, of two."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trained = lab.trainer("weighted", tmp_path, max_steps=2, load_best_model_at_end=True, **options)
    trained.train()
    assert trained.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = transformers.BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-1", dtype=torch.float64)
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, trained.model.net.model.get_parameter(name)), name


def test_what_needs_logits_or_counts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.0, received 0\.1"):
        lab.trainer("labels", tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="expected compute_metrics=None"):
        lab.MaskedTrainer(lab.build("labels"), compute_metrics=len)
    with pytest.raises(TypeError, match=r"received BertForMaskedLM; MaskedLM\(Backbone\(model\)\) is for labels"):
        lab.MaskedTrainer(lab.bert())
    trained = lab.trainer("weighted", tmp_path, max_steps=1)
    trained.data_collator = transformers.DataCollatorWithPadding(lab.tokenizer())
    with pytest.raises(ValueError, match=r"maskable or is_masked beside an attention_mask.*gives='maskable'"):
        trained.train()
    trained = lab.trainer("labels", tmp_path, max_steps=1)
    trained.data_collator = hf.MaskCollator(lab.tokenizer(), gives="maskable")
    with pytest.raises(TypeError, match=r"expected labels, received .*'maskable'.*gives='labels'"):
        trained.train()
    trained = lab.trainer("mean", tmp_path, max_steps=1, gradient_accumulation_steps=2)
    trained.data_collator = hf.MaskCollator(lab.tokenizer(), gives="maskable")
    with pytest.raises(ValueError, match="expected masks that the data have, for the mean loss of parts"):
        trained.train()


# ---- checkpoints ----


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_transformers_own(tied, tmp_path):
    model = lab.bert(tie_word_embeddings=tied)
    wrapper = hf.Backbone(model)
    hf.save_pretrained(wrapper, tmp_path)
    assert not (tmp_path / "fastmask.safetensors").exists()
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.arange(10)[None]
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    assert (again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight) == tied


def test_what_a_wrapper_adds_is_saved_beside_it(tmp_path):
    class Ratio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.power = nn.Parameter(torch.tensor(1.0))

        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return 1 - t**self.power

    options = {"self_token_critic": True, "schedule": Ratio()}
    wrapper = lab.build("weighted", **options)
    with torch.no_grad():
        wrapper.token_critic.to_logits.weight.normal_()
        wrapper.schedule_fn.power.fill_(1.25)
    hf.save_pretrained(wrapper, tmp_path)
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    again = lab.build("weighted", model, **(options | {"schedule": Ratio()}))
    hf.load_added_weights(again, tmp_path)
    state = again.state_dict()
    for name, value in wrapper.state_dict().items():
        assert torch.equal(value, state[name]), name
    with pytest.raises(ValueError, match="build the wrapper as it was when it was saved"):
        hf.load_added_weights(lab.build("weighted"), tmp_path)


def test_other_networks_are_not_saved(tmp_path):
    with pytest.raises(
        TypeError, match=r"expected a fastmask\.hf\.Backbone, or a wrapper around one, received Linear"
    ):
        hf.save_pretrained(nn.Linear(2, 2), tmp_path)


def test_doctests():
    """CI's other steps have no transformers, so that they leave them out."""
    for name in ("collator", "masked_lm", "checkpoints"):
        module = importlib.import_module(f"fastmask.hf.{name}")
        found = doctest.testmod(module)
        assert found.attempted >= 5
        assert found.failed == 0
