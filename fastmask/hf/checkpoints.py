"""Weights of a model in a wrapper, in files that transformers loads."""

from __future__ import annotations

import os
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from fastmask.hf.backbone import Backbone

ADDED_WEIGHTS = "fastmask.safetensors"


def inner_model(model: nn.Module) -> Any:
    """The Hugging Face model in a Backbone, or in what has one as its ``net``; None where there is none."""
    net = model if isinstance(model, Backbone) else getattr(model, "net", None)
    return net.model if isinstance(net, Backbone) else None


def added_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a state_dict has beside the Hugging Face model, each tensor under one name."""
    inner = inner_model(model)
    seen = set() if inner is None else {_place(x) for x in inner.state_dict().values()}
    added = {}
    for name, value in model.state_dict().items():
        if _place(value) not in seen:
            seen.add(_place(value))
            added[name] = value.contiguous()
    return added


def _place(x: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common."""
    return x.device, x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride()


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> None:
    """Saves the Hugging Face model as its own save_pretrained does, so that its from_pretrained loads it.

    What a wrapper adds (a critic, a schedule with parameters) goes into ``fastmask.safetensors`` beside it; a tensor
    that has several names is saved once.

    Args:
        model: a :class:`Backbone`, or a wrapper or :class:`MaskedLM` around one.
        directory: made where it is not there.
        options: of the model's save_pretrained.

    Raises:
        TypeError: there is no Backbone in it.

    Example:
        >>> import tempfile, transformers
        >>> from fastmask.hf import Backbone, save_pretrained
        >>> config = transformers.BertConfig(
        ...     vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        ... )
        >>> net = Backbone(transformers.BertForMaskedLM(config))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_pretrained(net, directory)
        ...     again = Backbone(transformers.BertForMaskedLM.from_pretrained(directory))
        >>> bool((again.linear_head().weight == net.linear_head().weight).all())
        True
    """
    inner = inner_model(model)
    if inner is None:
        raise TypeError(
            f"expected a fastmask.hf.Backbone, or a wrapper around one, received {type(model).__name__}; save its "
            "state_dict()"
        )
    inner.save_pretrained(directory, **options)
    save_added_weights(model, directory)


def save_added_weights(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """``fastmask.safetensors``, where there is anything to put into it."""
    added = added_weights(model)
    if added:
        safetensors.torch.save_file(added, os.path.join(directory, ADDED_WEIGHTS))


def load_added_weights(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Loads what a wrapper adds to its Hugging Face model, from where :func:`save_pretrained` has put it.

    The model itself comes from from_pretrained, and the wrapper is built around it as it was built before.

    Raises:
        ValueError: the directory's weights are not those that this wrapper adds.
    """
    path = os.path.join(directory, ADDED_WEIGHTS)
    saved = safetensors.torch.load_file(path) if os.path.exists(path) else {}
    expected = added_weights(model).keys()
    if saved.keys() != expected:
        raise ValueError(
            f"expected weights {sorted(expected)} in {path}, received {sorted(saved)}; build the wrapper as it was "
            "when it was saved"
        )
    model.load_state_dict(saved, strict=False)
