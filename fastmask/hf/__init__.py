"""Hugging Face models as networks for ``NonAutoregressiveWrapper``, and what their training needs.

Needs transformers: ``pip install 'fastmask[hf]'``; the trainer needs accelerate: ``'fastmask[train]'``.
"""

from fastmask.hf.backbone import Backbone
from fastmask.hf.checkpoints import load_added_weights, save_pretrained
from fastmask.hf.collator import MaskCollator
from fastmask.hf.masked_lm import MaskedLM, masked_lm_loss
from fastmask.hf.trainer import MaskedTrainerMixin

__all__ = [
    "Backbone",
    "MaskCollator",
    "MaskedLM",
    "MaskedTrainerMixin",
    "load_added_weights",
    "masked_lm_loss",
    "save_pretrained",
]
