"""A Hugging Face masked language model, or a decoder without its causal mask, as a network."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastmask import _check, _devices
from fastmask.heads import Head, logits_in
from fastmask.hf import head_proof
from fastmask.hf.block_cache import (
    BlockCache,
    additive_mask,
    check_blocks,
    hide,
    refuse_growing_positions,
    refuse_windows,
)
from fastmask.hf.head_proof import Proof

# No attribute of a Backbone, which is copied and pickled.
_trying = threading.RLock()


class _Trial(NamedTuple):
    """What trial runs have shown of the head: its proof, or the reason why there is none."""

    proof: Proof | None
    reason: str


class Backbone(nn.Module):
    """Makes a Hugging Face model a network for :class:`fastmask.NonAutoregressiveWrapper`.

    Where its logits are provably a linear head's, perhaps scaled (Cohere, Granite) or under a softcap (Gemma2), they
    are then formed for masked positions only. That is found out once, by trial runs on a few ids when this is
    constructed (at the first call, if the model lies on the meta device), and again when an adapter, a hook or
    another head comes in. Otherwise, as with a LoRA adapter on the head, it gives logits; ``head_reason`` says why.
    The embeddings are what the head is given: the output of BERT's transform, where there is one.

    Args:
        model: such as transformers' BertForMaskedLM, ModernBertForMaskedLM or LlamaForCausalLM, or peft's around one.
            It is not copied.
        max_seq_len: the largest N; by default what the model's positions allow.
        bidirectional: run a decoder without its causal mask, by transformers' ``is_causal=False``. A run shows that
            the first position then sees later ones. Without it a causal decoder warns.
        block_length: run a decoder with block-causal attention (BD3-LM, SDAR, LLaDA2): a position sees its own block
            of so many and those before. Runs show that it does, and that a cache of earlier blocks gives the same.
        static_cache: that cache is transformers' StaticCache, whose shapes stay the same, as a compiled trunk wants
            them; by default it is a DynamicCache.

    Attributes:
        num_tokens: the model's vocab_size. Set a smaller one, the tokenizer's, where the vocabulary is padded.
        max_seq_len: as above.
        is_block_causal: whether block_length was given: ``generate(block_length=)`` then runs the block alone.

    Raises:
        TypeError: no Hugging Face language model, or one with an encoder and a decoder.
        ValueError: max_seq_len is not given and the model does not tell; a model that stays causal, or is not
            block-causal with block_length; ESM's token_dropout, which divides by the share of ids that are not
            masked.

    Example:
        >>> import torch, transformers
        >>> from fastmask import NonAutoregressiveWrapper
        >>> from fastmask.hf import Backbone
        >>> config = transformers.BertConfig(
        ...     vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        ...     max_position_embeddings=16,
        ... )
        >>> net = Backbone(transformers.BertForMaskedLM(config))
        >>> net.head_reason
        'cls.predictions.decoder, as a run has shown'
        >>> model = NonAutoregressiveWrapper(net, mask_id=99)
        >>> loss = model(torch.randint(99, (2, 16)), attention_mask=torch.ones(2, 16)).loss
    """

    def __init__(
        self,
        model: Any,
        max_seq_len: int | None = None,
        bidirectional: bool = False,
        block_length: int | None = None,
        static_cache: bool = False,
    ) -> None:
        super().__init__()
        _check.flag("bidirectional", bidirectional)
        _check.flag("static_cache", static_cache)
        config = _text_config(model)
        _refuse_token_dropout(model)
        self.model = model
        self.num_tokens: int = config.vocab_size
        self.max_seq_len = _positions(model, config) if max_seq_len is None else max_seq_len
        _check.integer("max_seq_len", self.max_seq_len, 1)
        self.bidirectional = bidirectional
        self.block_length = None if block_length is None else _check.integer("block_length", block_length, 1)
        if bidirectional and block_length is not None:
            raise ValueError("expected bidirectional=True or block_length=, received both; leave one out")
        self.static_cache = static_cache
        self._options: dict[str, Any] = {"is_causal": False} if bidirectional else {}
        if "use_cache" in self.parameters_of_model():
            self._options["use_cache"] = False
        if self.is_block_causal:
            self._check_takes_cache()
        self._trial: _Trial | None = None
        if not _is_meta(model):
            self._try(stacklevel=4)

    def linear_head(self) -> Head | None:
        """The head, with the parameters that the model has now; None where there is no proof of one."""
        proof = self._proof()
        return None if proof is None else proof.head(self.model)

    @property
    def head_reason(self) -> str:
        """Why there is a linear head, or why there is none."""
        self._proof()
        return "the model lies on the meta device" if self._trial is None else self._trial.reason

    @property
    def is_block_causal(self) -> bool:
        return self.block_length is not None

    def start_cache(self, length: int) -> BlockCache:
        """An empty cache of so many columns (docs/caches.md).

        Raises:
            ValueError: the model has none, or layers that see a window only.
        """
        self._check_takes_cache()
        return BlockCache(_text_config(self.model), length if self.static_cache else None)

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        return_embeddings: bool = False,
        positions: Tensor | None = None,
        blocks: Tensor | None = None,
        cache: BlockCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Logits [B, N, V] of ids [B, N], or, with return_embeddings, the head's input [B, N, D].

        Args:
            ids: [B, N] int32|int64.
            attention_mask: as the model takes it: [B, N], 0 where an id is padding. Beside a cache that of whole
                sequences, read at the positions.
            positions: [B, N] int64, where the ids stand in their sequences; by default one after the other.
            blocks: [B, N] int64, numbers of blocks: a position sees those that are not above its own. By default
                multiples of block_length.
            cache: of columns that are seen too, by the same rule.
            kwargs: passed to the model.

        Raises:
            TypeError: labels among kwargs.
            ValueError: embeddings are wanted of a model without a linear head.
        """
        if "labels" in kwargs:  # the model would make a loss of logits that are not there
            raise TypeError(
                "expected arguments of the model without its loss, received labels=; leave them out: the clean ids "
                "are the targets, and a collator's masks are is_masked= and masked_ids="
            )
        if positions is not None:
            kwargs["position_ids"] = positions
        if blocks is None and self.block_length is not None:
            blocks = (torch.arange(ids.shape[1], device=ids.device) // self.block_length)[None]
        if blocks is not None:
            kwargs |= self._in_blocks(blocks, attention_mask, positions, cache)
        elif attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        if not return_embeddings:
            return self._logits(ids, **kwargs)
        proof = self._proof()
        if proof is None:
            raise ValueError(
                f"expected a model with a linear head for return_embeddings=True, received "
                f"{type(self.model).__name__}: {self.head_reason}; take its logits"
            )
        return head_proof.embeddings(self.model, proof.path, lambda: self._logits(ids, **kwargs))

    def extra_repr(self) -> str:
        words = f"num_tokens={self.num_tokens}, max_seq_len={self.max_seq_len}"
        words += ", bidirectional=True" if self.bidirectional else ""
        words += "" if self.block_length is None else f", block_length={self.block_length}"
        return words + (", static_cache=True" if self.static_cache else "")

    # Blocks

    def _in_blocks(
        self, blocks: Tensor, attention_mask: Tensor | None, positions: Tensor | None, cache: BlockCache | None
    ) -> dict[str, Any]:
        """The model's arguments for queries in these blocks [B, N]."""
        if attention_mask is not None:
            _check.tensor("attention_mask", attention_mask, [torch.bool, *_check.INTEGER, *_check.FLOATING], ndim=2)
            blocks = hide(blocks, attention_mask, positions)
        if cache is None:
            return {"attention_mask": additive_mask(blocks, blocks, self.model.dtype)}
        names, first = self.parameters_of_model(), cache.num_kept
        arguments = {
            "attention_mask": additive_mask(blocks, cache.seen(blocks), self.model.dtype),
            "cache" if "cache" in names else "past_key_values": cache.key_values,
            "use_cache": True,
        }
        if "cache_position" in names:  # transformers 4
            arguments["cache_position"] = torch.arange(first, first + blocks.shape[1], device=blocks.device)
        return arguments

    def parameters_of_model(self) -> Mapping[str, inspect.Parameter]:
        """What the model's forward takes; of an adapter's, the model it is around."""
        model = self.model
        inner = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
        return inspect.signature(inner.forward).parameters

    def _check_takes_cache(self) -> None:
        names = self.parameters_of_model()
        if "use_cache" not in names or not ("cache" in names or "past_key_values" in names):
            raise ValueError(
                f"expected a decoder with a cache of keys and values, received {type(self.model).__name__}, whose "
                "forward takes none; generate with whole sequences (cache=False)"
            )
        config = _text_config(self.model)
        refuse_windows(self.model, config, self.max_seq_len, is_static=self.static_cache)
        refuse_growing_positions(self.model, config, self.max_seq_len)

    def _logits(self, ids: Tensor, **kwargs: Any) -> Any:
        return logits_in(self.model(input_ids=ids, **{**self._options, **kwargs}))

    def _proof(self) -> Proof | None:
        trial = self._trial
        if trial is None or (trial.proof is not None and not trial.proof.holds_for(self.model)):
            if _is_meta(self.model):
                return None
            with _trying:
                if self._trial is trial:
                    self._try(stacklevel=1)
        assert self._trial is not None
        return self._trial.proof

    @torch.compiler.disable
    def _try(self, stacklevel: int) -> None:
        ids, others = self._trial_ids()
        with head_proof.leaving_no_trace(self.model, ids.device):
            is_causal = False
            if self._trial is None and self.is_block_causal:
                check_blocks(self, ids, others)
            elif self._trial is None:
                is_causal = self._is_causal(ids, others)
            proof = head_proof.prove(self.model, self._logits, ids)
        if isinstance(proof, str):
            self._trial = _Trial(None, proof)
        else:
            self._trial = _Trial(proof, f"{proof.path}, as a run has shown")
        if is_causal:
            warnings.warn(
                f"the attention of {type(self.model).__name__} is causal: a masked token then sees what lies before "
                "it only; give bidirectional=True",
                stacklevel=stacklevel,
            )

    def _is_causal(self, ids: Tensor, others: Tensor) -> bool:
        """Whether the first position does not see the last, by two runs that differ there alone.

        Raises:
            ValueError: so it is, with bidirectional=True.
        """
        name = type(self.model).__name__
        try:
            self.model.eval()
            first, second = (self._logits(x)[:, 0] for x in (ids, others))
        except Exception as error:  # it may want arguments that only a call has
            if self.bidirectional:
                raise ValueError(
                    f"expected a decoder that runs with is_causal=False for bidirectional=True, received {name}, "
                    f"which raised {type(error).__name__}: {error}; leave bidirectional out if it sees both sides"
                ) from error
            return False
        if ids.shape[1] == 1 or not torch.equal(first, second):
            return False
        if self.bidirectional:
            raise ValueError(
                f"expected bidirectional=True to lift the causal mask, received {name}, whose first position does "
                "not see later ones even so: its attention does not know is_causal=False, as that of most decoders "
                "does in newer versions of transformers; take another attention or model"
            )
        return True

    def _trial_ids(self) -> tuple[Tensor, Tensor]:
        """Two sequences of ordinary ids, where there are any, and the same with another last id: [2, N] each."""
        config = _text_config(self.model)
        special = tree_leaves([value for name, value in config.to_dict().items() if name.endswith("_token_id")])
        ordinary = [i for i in range(min(config.vocab_size, 64)) if i not in special] or [0]
        length = min(3, self.max_seq_len)
        rows = [[ordinary[(i + j) % len(ordinary)] for j in range(length)] for i in range(2)]
        others = [[*row[:-1], ordinary[(i + length) % len(ordinary)]] for i, row in enumerate(rows)]
        device = _devices.device_of(self.model, torch.get_default_device())
        return torch.tensor(rows, device=device), torch.tensor(others, device=device)


def _is_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _text_config(model: Any) -> Any:
    """The configuration of a language model.

    Raises:
        TypeError: it has none, or is none that gives a row of logits for each id.
    """
    config = getattr(model, "config", None)
    if callable(getattr(config, "get_text_config", None)):
        config = config.get_text_config()  # type: ignore[union-attr]
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(config, "vocab_size"):
        raise TypeError(
            f"expected a Hugging Face language model, with config.vocab_size, received {name}; other networks "
            "declare a head themselves (docs/networks.md)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"expected a masked language model or a decoder alone, received {name}, an encoder and a decoder; give a "
            "model whose logits are of its input ids"
        )
    return config


def _positions(model: nn.Module, config: Any) -> int:
    """How many positions a model has: those of RoBERTa, XLM-R and ESM begin behind the padding's.

    Raises:
        ValueError: it does not tell.
    """
    counts = [getattr(config, "max_position_embeddings", None)]
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding):
            counts.append(table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))
    known = [count for count in counts if isinstance(count, int)]
    if not known:
        raise ValueError(
            f"expected max_seq_len, since the configuration of {type(model).__name__} has no "
            "max_position_embeddings, received None; give the longest sequence that it is to see"
        )
    return min(known)


def _refuse_token_dropout(model: nn.Module) -> None:
    """Refuses ESM's token_dropout.

    Raises:
        ValueError: it is on.
    """
    for name, module in model.named_modules():
        if getattr(module, "token_dropout", False) is True:
            raise ValueError(
                f"expected an ESM model without token_dropout, received {type(model).__name__} with it: it divides "
                "by the share of ids that are not masked, so that a sequence of masks, with which generation begins, "
                f"gives NaN; set model.{name}.token_dropout = False (and model.config.token_dropout, if it is saved)"
            )
