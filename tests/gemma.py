"""A small DiffusionGemma, for those that decode one, and candidates handed in."""

from __future__ import annotations

import pytest
import torch

from fastmask import functional


def small_gemma():
    """transformers' model with random weights, the same each time: 40 ids, canvases of 8."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    if not hasattr(transformers, "DiffusionGemmaConfig"):
        pytest.skip("needs transformers of at least 5.11, which has DiffusionGemma")
    torch.manual_seed(0)
    text = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 8, "num_experts": 2,
        "top_k_experts": 1, "moe_intermediate_size": 8, "sliding_window": 16, "max_position_embeddings": 128,
        "layer_types": ["sliding_attention", "full_attention"], "num_global_key_value_heads": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=8, boi_token_id=37, eoi_token_id=38, image_token_id=39
    )
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    model.model.decoder.embed_tokens.weight.data *= 40.0  # sure of something
    return model


def draw_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest ids are drawn, by torch and by us, and nothing is taken from a generator for it."""
    sample_tokens = functional.sample_tokens

    def likeliest(logits, **options):
        return sample_tokens(logits, **{**options, "temperature": 0.0, "seed": 0})

    monkeypatch.setattr(functional, "sample_tokens", likeliest)
    monkeypatch.setattr(torch, "multinomial", lambda p, *a, **k: p.argmax(dim=-1, keepdim=True))
