"""The one door to a network: its logits, or its embeddings where its head is linear (``fastmask/heads.py``).

Any callable ``net(ids, **kwargs) -> logits`` will do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from fastmask import _check, _devices, functional
from fastmask.heads import Heads, gives_embeddings, logits_in
from fastmask.records import CrossEntropy, LinearLogits, MaskedTokens
from fastmask.vocabulary_parallel import is_split


class Output(NamedTuple):
    """What a network gave for [B, N] ids.

    logits: [B, N, V], under guidance perhaps [M, V] of the rows that are sampled; or those of a linear head that
    nobody has computed yet. embeddings: [B, N, D]; None where it was not asked for them. exclude_id: a column that
    the loss leaves out, None for none.
    """

    logits: Tensor | LinearLogits
    embeddings: Tensor | None
    exclude_id: int | None = None

    @property
    def num_tokens(self) -> int:
        """V."""
        return self.logits.shape[-1] if isinstance(self.logits, Tensor) else self.logits.num_ids

    def of_tokens(self, net: Any, num_tokens: int, mask_id: int) -> Output:
        """The output for num_tokens ids of which mask_id is no prediction: columns that pad the head are cut off.

        Raises:
            ValueError: columns lack for ids other than mask_id and what follows it, or they are no logits.
        """
        width = self.num_tokens
        lacks = width < num_tokens
        if (lacks and (width > mask_id or width in _embedding_widths(net))) or self._are_embeddings_of(net):
            raise ValueError(
                f"expected logits of net.num_tokens = {num_tokens} columns (more are cut off as padding, "
                f"the last may lack from mask_id {mask_id} on), received {width}; return logits, no embeddings, "
                "and give the head a column for each id"
            )
        if lacks:
            return self
        logits = self.logits
        if width > num_tokens:
            logits = logits[..., :num_tokens] if isinstance(logits, Tensor) else logits.of_ids(num_tokens)
        return Output(logits, self.embeddings, mask_id)

    def _are_embeddings_of(self, net: Any) -> bool:
        return isinstance(self.logits, Tensor) and gives_embeddings(net)

    def loss(
        self,
        targets: Tensor,
        masked: MaskedTokens,
        weights: Tensor | None,
        denominator: Tensor | float,
        num_masked: int | None,
        with_correct: bool = False,
    ) -> CrossEntropy:
        """Masked cross-entropy, "mean"; arguments as in :func:`fastmask.functional.linear_masked_cross_entropy`."""
        logits = self.logits
        if isinstance(logits, Tensor):
            return functional.masked_cross_entropy(
                logits,
                targets,
                masked.is_masked,
                weights,
                denominator=denominator,
                exclude_id=self.exclude_id,
                with_correct=with_correct,
            )
        return functional.linear_masked_cross_entropy(
            logits.scaled(logits.embeddings),
            logits.weight,
            targets,
            weights=weights,
            bias=logits.bias,
            row_indices=masked.row_indices,
            num_masked=num_masked,
            denominator=denominator,
            softcap=logits.softcap,
            num_tokens=logits.num_tokens,
            exclude_id=self.exclude_id,
            with_correct=with_correct,
        )

    def logits_of(self, row_indices: Tensor) -> Tensor:
        """The logits [M, V] of the rows ``row_indices`` [M]."""
        if isinstance(self.logits, Tensor):
            return rearrange(self.logits, "b n v -> (b n) v")[row_indices]
        if is_split(self.logits.weight):
            raise ValueError(
                "expected a head's weight that is a plain tensor, for guidance under a softcap and for compat, "
                "received a DTensor, of which no rank makes whole rows of logits; leave cfg_scale or compat out"
            )
        return self.logits.of_rows(rearrange(self.logits.embeddings, "b n d -> (b n) d")[row_indices])

    def of_rows(self, row_indices: Tensor) -> Output:
        """The same of these rows alone, compact, [M, V] or [M, D]; -1 is no row. Itself where it is so already."""
        rows = row_indices.clamp(min=0)
        if isinstance(self.logits, Tensor):
            return self if self.logits.ndim == 2 else Output(self.logits_of(rows), None, self.exclude_id)
        embeddings = rearrange(self.logits.embeddings, "b n d -> (b n) d")[rows]
        return Output(self.logits._replace(embeddings=embeddings), None, self.exclude_id)

    def to_guide(self, row_indices: Tensor) -> Output:
        """What guidance combines: the embeddings where the logits are linear in them, else these rows' logits [M, V];
        -1 is no row."""
        if isinstance(self.logits, LinearLogits) and self.logits.softcap is None:
            return self
        return self._replace(logits=self.logits_of(row_indices.clamp(min=0)))

    def guided(self, unconditional: Output, scale: float) -> Output:
        """The logits (1 + scale) z - scale z_u, by what :meth:`to_guide` gave of both."""
        logits, other = self.logits, unconditional.logits
        if isinstance(logits, Tensor):
            assert isinstance(other, Tensor)
            return self._replace(logits=_away_from(other, logits, scale))
        assert isinstance(other, LinearLogits)
        return self._replace(
            logits=logits._replace(embeddings=_away_from(other.embeddings, logits.embeddings, scale))
        )


def _away_from(start: Tensor, end: Tensor, scale: float) -> Tensor:
    """end + scale (end - start), rounded once; equal infinities stay."""
    return end.where(end == start, torch.lerp(start, end, 1.0 + scale))


def _embedding_widths(net: Any) -> set[object]:
    """How wide a network's embeddings are, as far as it tells."""
    modules = net.modules() if isinstance(net, nn.Module) else []
    return {getattr(net, "emb_dim", None), *(m.embedding_dim for m in modules if isinstance(m, nn.Embedding))}


def run(
    net: Any,
    heads: Heads,
    ids: Tensor,
    *,
    with_embeddings: bool = False,
    place: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Output:
    """The network on ids [B, N]: embeddings and head where the head is linear, else logits.

    Args:
        with_embeddings: embeddings are wanted even beside logits (self-conditioning).
        place: more arguments of the network, which say where the ids lie in a cache (docs/caches.md).
        kwargs: passed to the network.
    """
    heads.warn_of_borrowed(net)
    heads.prove(net, ids, kwargs)
    kwargs = {**kwargs, **(place or {})}
    ids = ids.clone()  # a network may write into them
    # x-transformers cuts prepended embeddings off again on its way to logits only.
    head = None if kwargs.get("excise_prepend_embeds") else heads.way(net).head
    if head is not None:
        embeddings = _of_each_token("embeddings", "D", net(ids, return_embeddings=True, **kwargs), ids)
        return Output(head.logits(embeddings), embeddings)
    if with_embeddings:
        logits, embeddings = net(ids, return_logits_and_embeddings=True, **kwargs)
        return Output(_of_each_token("logits", "V", logits, ids), embeddings)
    return Output(_of_each_token("logits", "V", logits_in(net(ids, **kwargs)), ids), None)


def embeddings(net: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """The network's embeddings [B, N, D] of ids [B, N]."""
    out: Tensor = net(ids.clone(), return_embeddings=True, **kwargs)  # it may write into them
    return out


def _of_each_token(name: str, letter: str, output: object, ids: Tensor) -> Tensor:
    if not isinstance(output, Tensor) or output.shape[:-1] != ids.shape:
        received = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"expected net(ids {list(ids.shape)}) to return {name} [B, N, {letter}], received {received}"
        )
    return output


def device_of(net: Any) -> torch.device:
    """The device of the network's first parameter or buffer; torch's default where it has none."""
    return _devices.device_of(net, torch.get_default_device())


def check_network(net: Any, *, needs_embeddings: bool) -> None:
    """A network says how many ids and positions it has, and, for self-conditioning, how wide its embeddings are.

    Raises:
        TypeError, ValueError: it does not.
    """
    config = getattr(net, "config", None)
    if not hasattr(net, "num_tokens") and hasattr(config, "vocab_size"):
        name = type(net).__name__
        raise TypeError(
            f"expected a network with num_tokens and max_seq_len, received {name}, a Hugging Face model; wrap it in "
            "fastmask.hf.Backbone, or set net.num_tokens = net.config.vocab_size and net.max_seq_len = "
            "net.config.max_position_embeddings (a model that sees both sides, with the mask among its ids)"
        )
    for name, low in (("num_tokens", 2), ("max_seq_len", 1)) + (("emb_dim", 1),) * needs_embeddings:
        if not hasattr(net, name):
            raise TypeError(
                f"expected a network with net.{name}, received {type(net).__name__} without; set that attribute "
                "(docs/networks.md)"
            )
        _check.integer(f"net.{name}", getattr(net, name), low)


def check_head(net: Any, head: object) -> None:
    """``head=`` of the wrapper is a linear layer of the network, whose embeddings can be had.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"expected head to be an nn.Linear of the network, received {type(head).__name__}; for another linear "
            "head give the network a method linear_head() that returns fastmask.Head(weight, bias, scale, softcap)"
        )
    if isinstance(net, nn.Module) and all(module is not head for module in net.modules()):
        raise ValueError("expected head to be a module of net, received another; make it one, so that it is trained")
