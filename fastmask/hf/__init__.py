"""Hugging Face models as networks for ``NonAutoregressiveWrapper``.

Needs transformers: ``pip install 'fastmask[hf]'``.
"""

from fastmask.hf.backbone import Backbone

__all__ = ["Backbone"]
