"""Hugging Face models as networks for ``NonAutoregressiveWrapper``, and what their training needs.

Needs transformers: ``pip install 'fastmask[hf]'``; the trainer needs accelerate: ``'fastmask[train]'``.
"""

import importlib
from typing import Any

from fastmask.hf.backbone import Backbone

# Imported when asked for: the drop-ins beside them say themselves which transformers they need.
_TRAINING = {
    "MaskCollator": "collator",
    "MaskedLM": "masked_lm",
    "MaskedTrainerMixin": "trainer",
    "load_added_weights": "checkpoints",
    "masked_lm_loss": "masked_lm",
    "save_pretrained": "checkpoints",
}
__all__ = ["Backbone", *_TRAINING]


def __getattr__(name: str) -> Any:
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastmask.hf.{_TRAINING[name]}"), name)
