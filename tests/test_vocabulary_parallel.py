"""A vocabulary split over ranks, as one process has it whole: losses, gradients, samples; and fastmask's shard."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import report_of_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training import MASK, Recorder, V, clean, transformer
from x_transformers import Encoder, TransformerWrapper

from benchmarks import distributed_plan
from fastmask import Head, NonAutoregressiveWrapper, vocabulary_parallel
from fastmask.distributed import padded_vocabulary, shard
from fastmask.functional import LinearLogits, linear_masked_cross_entropy, masked_cross_entropy, sample_tokens
from fastmask.reference import linear_masked_cross_entropy as linear_reference
from fastmask.reference import masked_cross_entropy as reference

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

# ---- two and four ranks, in processes of their own ----


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, float]:
    """By how much ranks differ from one process, by case."""
    return report_of_ranks("tests/vocabulary_cases.py", tmp_path_factory.mktemp("ranks"), timeout=300)


def limit(name: str) -> float:
    """Of losses and gradients the norm of what differs; of samples how many, and of these none."""
    if "float64" in name:
        return 1e-12
    if "float32" in name:
        return 1e-5
    return 1.0 if name.startswith("bfloat16") else 0.0


@pytest.mark.slow
def test_ranks_are_one_process(report):
    figures = {name: figure for name, figure in report.items() if not name.startswith("bytes")}
    kinds = ("linear", "dense", "few", "tied", "edges", "bfloat16", "sampling", "wrapper")
    assert [sum(name.startswith(kind) for name in figures) for kind in kinds] == [40, 20, 12, 2, 2, 2, 30, 8]
    assert {name: figure for name, figure in figures.items() if not figure <= limit(name)} == {}


@pytest.mark.slow
def test_bytes_that_a_rank_tells_of_a_row(report):
    """Those that the plan counts with, and docs/distributed.md says; the embeddings are float32, of width 8."""
    said = {name.removeprefix("bytes of "): figure for name, figure in report.items() if name.startswith("bytes")}
    assert said == {
        "loss": distributed_plan.LOSS_BYTES,
        "loss, smoothing": 16,
        "loss, argmax": 28,
        "loss, gradient": distributed_plan.LOSS_BYTES + 4 * 8,
        "sample": distributed_plan.SAMPLE_BYTES,
        "sample, min_p": distributed_plan.SAMPLE_BYTES,
        "sample, top_k": distributed_plan.SAMPLE_BYTES + 256,
        "sample, top_p": distributed_plan.SAMPLE_BYTES + 264,
    }


# ---- one rank, a mesh of its own ----


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    rendezvous = f"file://{tmp_path_factory.mktemp('group')}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


EMBEDDINGS, WEIGHT = torch.randn(4, 6, 8), torch.randn(50, 8)
TARGETS = torch.arange(24).view(4, 6)


def split(values, mesh, dim=0):
    return distribute_tensor(values, mesh, [Shard(dim)])


def test_a_mesh_of_one(mesh):
    weight = split(WEIGHT, mesh).requires_grad_()
    ours = linear_masked_cross_entropy(EMBEDDINGS, weight, TARGETS)
    ours.loss.backward()
    plain = WEIGHT.clone().requires_grad_()
    expected = linear_masked_cross_entropy(EMBEDDINGS, plain, TARGETS, backend="reference")
    expected.loss.backward()
    torch.testing.assert_close(ours.loss, expected.loss)
    assert weight.grad.placements == (Shard(0),)
    torch.testing.assert_close(weight.grad.full_tensor(), plain.grad)


def test_no_more_rows_than_a_chunk(mesh, monkeypatch):
    """Of logits in float32 there is one chunk."""
    sizes, chunk_losses_ = [], reference.chunk_losses_

    def recorded(logits, *arguments, **options):
        sizes.append(len(logits))
        return chunk_losses_(logits, *arguments, **options)

    for module in (reference, linear_reference):
        monkeypatch.setattr(module, "CHUNK_ROWS", 10)
        monkeypatch.setattr(module, "chunk_losses_", recorded)
    linear_masked_cross_entropy(EMBEDDINGS, split(WEIGHT, mesh).requires_grad_(), TARGETS).loss.backward()
    masked_cross_entropy(split(EMBEDDINGS @ WEIGHT.mT, mesh, -1), TARGETS)
    assert sizes == [10, 10, 4] * 2


def test_what_is_split_otherwise(mesh):
    replicated = distribute_tensor(WEIGHT, mesh, [Replicate()])
    for weight in (replicated, split(WEIGHT, mesh, 1), distribute_tensor(
        WEIGHT, init_device_mesh("cpu", (1, 1)), [Replicate(), Shard(0)]
    )):  # fmt: skip
        with pytest.raises(ValueError, match=r"placement Shard\(0\) on a mesh of one dimension"):
            linear_masked_cross_entropy(EMBEDDINGS, weight, TARGETS)
    with pytest.raises(ValueError, match=r"expected logits as a DTensor with the placement Shard\(2\)"):
        sample_tokens(split(EMBEDDINGS, mesh, 0))
    with pytest.raises(ValueError, match=r"as torch\.chunk splits 50 ids, 50 of them here, received 49"):
        masked_cross_entropy(
            torch.distributed.tensor.DTensor.from_local(
                torch.zeros(4, 6, 49), mesh, [Shard(2)], shape=(4, 6, 50), stride=(300, 50, 1)
            ),
            TARGETS,
        )


def test_what_goes_with_it_is_plain(mesh):
    weight = split(WEIGHT, mesh)
    with pytest.raises(TypeError, match=r"give embeddings.full_tensor\(\)"):
        linear_masked_cross_entropy(split(EMBEDDINGS, mesh), weight, TARGETS)
    with pytest.raises(TypeError, match=r"give embeddings.full_tensor\(\)"):
        sample_tokens(LinearLogits(split(EMBEDDINGS, mesh), weight))
    with pytest.raises(TypeError, match=r"give targets.full_tensor\(\)"):
        masked_cross_entropy(split(EMBEDDINGS @ WEIGHT.mT, mesh, -1), split(TARGETS, mesh))
    for run in (linear_masked_cross_entropy, lambda e, w, t, **k: sample_tokens(LinearLogits(e, w), **k)):
        with pytest.raises(RuntimeError, match="leave backend= out"):
            run(EMBEDDINGS, weight, TARGETS, backend="triton")


def test_guidance_under_a_softcap_is_refused(mesh):
    class Capped(nn.Module):
        num_tokens, max_seq_len = 50, 6

        def __init__(self):
            super().__init__()
            self.weight, self.embedding = nn.Parameter(split(WEIGHT, mesh)), nn.Embedding(50, 8)

        def linear_head(self):
            return Head(self.weight, softcap=3.0)

        def forward(self, ids, return_embeddings=False):
            return self.embedding(ids)

    model = NonAutoregressiveWrapper(Capped(), mask_id=49)
    assert model.generate(2, filter_thres=None).shape == (2, 6)
    with pytest.raises(ValueError, match="leave cfg_scale or compat out"):
        model.generate(2, cfg_scale=1.0, prompt=torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("num_tokens", "num_ranks", "padded"),
    [(1, 1, 4096), (4096, 1, 4096), (4097, 2, 8192), (126464, 8, 131072), (131073, 8, 163840)],
)
def test_padded_vocabulary(num_tokens, num_ranks, padded):
    assert padded_vocabulary(num_tokens, num_ranks) == padded
    whole = SimpleNamespace(shape=(padded, 8), device_mesh=SimpleNamespace(size=lambda: num_ranks))
    vocabulary_parallel.check_tiles(whole, 0)


def test_samples_of_parts_of_tiles_are_refused():
    uneven = SimpleNamespace(shape=(10000, 8), device_mesh=SimpleNamespace(size=lambda: 2))
    with pytest.raises(ValueError, match="10000 ids over 2 ranks; give the head 16384 rows"):
        vocabulary_parallel.check_tiles(uneven, 0)


# ---- a padded head ----


def test_padding_is_cut_off():
    """As of a head without it; padding gets gradient 0."""
    bias, options = torch.randn(50), {"label_smoothing": 0.1}
    leaves = [x.clone().requires_grad_() for x in (EMBEDDINGS, WEIGHT, bias)]
    padded = linear_masked_cross_entropy(*leaves[:2], TARGETS, bias=leaves[2], num_tokens=30, **options).loss
    padded.backward()
    fewer = [x.clone().requires_grad_() for x in (EMBEDDINGS, WEIGHT[:30], bias[:30])]
    expected = linear_masked_cross_entropy(*fewer[:2], TARGETS, bias=fewer[2], **options).loss
    expected.backward()
    assert torch.equal(padded, expected)
    for ours, theirs in zip(leaves, fewer, strict=True):
        assert torch.equal(ours.grad[: len(theirs)], theirs.grad)
        assert not ours.grad[len(theirs) :].any()
    logits = LinearLogits(EMBEDDINGS, WEIGHT, bias)
    dense = masked_cross_entropy(logits.of_rows(EMBEDDINGS), TARGETS, num_tokens=30, **options).loss
    torch.testing.assert_close(dense, expected)
    ours, theirs = sample_tokens(logits.of_ids(30), seed=0), sample_tokens(logits.of_ids(30).cut(), seed=0)
    assert torch.equal(ours.ids, theirs.ids)
    assert int(ours.ids.max()) < 30
    assert sample_tokens(logits, seed=0).ids.max() >= 30


@pytest.mark.parametrize("num_tokens", [0, 51])
def test_padding_out_of_range(num_tokens):
    for run in (
        lambda: linear_masked_cross_entropy(EMBEDDINGS, WEIGHT, TARGETS, num_tokens=num_tokens),
        lambda: masked_cross_entropy(EMBEDDINGS, TARGETS.clamp(max=7), num_tokens=num_tokens),
        lambda: sample_tokens(LinearLogits(EMBEDDINGS, WEIGHT, num_tokens=num_tokens)),
    ):
        with pytest.raises(ValueError, match="expected num_tokens of at least 1 and below"):
            run()


# ---- the plan on paper ----


def test_the_plan_is_that_of_the_page():
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert distributed_plan.table() in page


def test_the_plans_parameters():
    """8.02 billion, 6.98 without embeddings and head, as published; a block's as counted by torch."""
    model = distributed_plan.Model()
    assert round(model.total / 1e9, 2) == 8.02
    assert round(model.blocks / 1e9, 2) == 6.98
    with torch.device("meta"):
        width, inner = model.width, model.feed_forward
        matrices = [nn.Linear(width, width, bias=False) for _ in range(4)]
        matrices += [nn.Linear(*sizes, bias=False) for sizes in ((width, inner), (width, inner), (inner, width))]
        block = nn.ModuleList([*matrices, nn.RMSNorm(width), nn.RMSNorm(width)])
    assert model.block == sum(parameter.numel() for parameter in block.parameters())


# ---- fully_shard ----


def sharded_names(module):
    return [name for name, each in module.named_modules() if isinstance(each, FSDPModule)]


def test_what_is_a_block(mesh):
    """Attention and feed-forward layers of x-transformers, the layers of Hugging Face's models, and the wrapper."""
    layers = "net.attn_layers.layers"
    critic = TransformerWrapper(num_tokens=V, max_seq_len=6, attn_layers=Encoder(dim=16, depth=1, heads=2))
    model = NonAutoregressiveWrapper(transformer(), mask_id=MASK, token_critic=critic)
    names = sharded_names(shard(model, mesh))
    of_critic = [f"token_critic.attn_layers.layers.{number}.1" for number in (0, 1)]
    assert sorted(names) == sorted(["", f"{layers}.0.1", f"{layers}.1.1", *of_critic])

    own = transformer()
    own.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])), nn.LayerNorm(4)])
    own.blocks.append(own.blocks[0])
    names = sharded_names(shard(NonAutoregressiveWrapper(own, mask_id=MASK), mesh))
    assert sorted(names) == sorted(["", f"{layers}.0.1", f"{layers}.1.1", "net.blocks.0"])


class InSequence(Recorder):
    """Layers that no nn.ModuleList lists."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_no_block_is_not_passed_over_in_silence(mesh):
    with pytest.warns(UserWarning, match=r"found none, .* at once; list them in an nn\.ModuleList .* before shard"):
        names = sharded_names(shard(NonAutoregressiveWrapper(InSequence(), mask_id=MASK), mesh))
    assert names == [""]

    net = InSequence()
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = sharded_names(shard(NonAutoregressiveWrapper(net, mask_id=MASK), mesh))
    assert names == ["", "net.layers.0", "net.layers.1"]


def test_a_network_that_gathers_its_own_head_gives_logits(mesh):
    """Its weight is a DTensor too, but of ranks that have rows of their own."""
    net = Recorder()
    model = NonAutoregressiveWrapper(net, mask_id=MASK, head=net.head)
    assert model.has_linear_head
    fully_shard(net, mesh=mesh)
    assert not model.has_linear_head
    assert "fully_shard has split the head's weight within the network" in model.extra_repr()
    assert model(clean(CPU)).loss.isfinite()
