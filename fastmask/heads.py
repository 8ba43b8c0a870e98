"""The head of a network, where its logits are a linear function of its embeddings.

A network is then asked for embeddings only, and head and loss (or sampler) see the masked rows alone. A head is
declared by the network (``linear_head()``), named to the wrapper (``head=``), proved by a run (a ``to_logits`` beside
``return_embeddings=``), or provable from what x-transformers' TransformerWrapper is. Anything else gives logits.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmask.records import LinearLogits
from fastmask.vocabulary_parallel import is_split

# No attribute of Heads, which is copied and pickled. Reentrant, for a network that has a wrapper in it.
_proving = threading.RLock()


class Head(NamedTuple):
    """A linear head: ``logits = F.linear(scale * embeddings, weight, bias)``, or softcap * tanh(logits / softcap).

    weight: [V, D]. bias: [V] or None. softcap: above 0, or None.

    Example:
        A network declares one by ``def linear_head(self): return fastmask.Head(self.out.weight, self.out.bias)``, and
        returns embeddings [B, N, D] for ``forward(ids, return_embeddings=True)``.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, embeddings: Tensor) -> LinearLogits:
        """The logits of embeddings [B, N, D]; nothing is computed yet."""
        return LinearLogits(embeddings, *self)


class Way(NamedTuple):
    """How a network is run: by its head, or by its logits where that is None; and why."""

    head: Head | None
    reason: str


class Heads:
    """Finds a network's head, and remembers what a run has proved or a warning has said.

    No module, so that a head named to the wrapper is not in its state_dict a second time.

    Args:
        head: ``head=`` of the wrapper, a module of the network, or None.
    """

    def __init__(self, head: nn.Linear | None = None) -> None:
        self.head = head
        self._tried: nn.Linear | None = None  # a bare to_logits that a run was to prove
        self._disproof: str | None = None
        self._has_warned = False

    def way(self, net: Any) -> Way:
        """The way that the next call takes. A bare to_logits that has not been tried gives logits."""
        way = self._declared(net)
        if way is None:
            way = of_transformer(net)
        if way.head is None or is_plain(way.head.weight):
            return way
        if is_split(way.head.weight):
            obstacle = _no_split_head(net, way.head.weight)
            return Way(None, obstacle) if obstacle else Way(way.head, f"{way.reason}, split over ranks")
        return Way(None, f"the head's weight is a {_kind(way.head.weight)}, no plain tensor")

    def _declared(self, net: Any) -> Way | None:
        if self.head is not None:
            return Way(_head_of(self.head), "head= of the wrapper")
        if callable(getattr(net, "linear_head", None)):
            head = net.linear_head()
            if head is not None and not isinstance(head, Head):
                raise TypeError(
                    f"expected net.linear_head() to return fastmask.Head(weight, bias), or None, "
                    f"received {type(head).__name__}"
                )
            absent = f"{type(net).__name__}.linear_head() is None"
            return Way(head, getattr(net, "head_reason", absent if head is None else "net.linear_head()"))
        if not has_bare_head(net):
            return None
        linear: nn.Linear = net.to_logits
        if self._tried is not linear:
            return Way(None, "net.to_logits is tried at the first call")
        if self._disproof is not None:
            return Way(None, self._disproof)
        return Way(_head_of(linear), "net.to_logits, as a run has shown")

    @torch.no_grad()
    def prove(self, net: Any, ids: Tensor, arguments: dict[str, Any]) -> None:
        """Finds out once, by the first row of ids [B, N], whether a bare to_logits is all that makes the logits.

        Arguments of B rows are cut likewise. The two runs draw the same random numbers, and leave no trace of them.
        Of several threads the first finds out, and the others wait for it.
        """
        if self.head is not None or callable(getattr(net, "linear_head", None)) or not has_bare_head(net):
            return
        if self._tried is net.to_logits or not len(ids):
            return
        with _proving:
            if self._tried is not net.to_logits:
                self._prove(net, ids, arguments)

    def _prove(self, net: Any, ids: Tensor, arguments: dict[str, Any]) -> None:
        row = {
            name: value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == len(ids) else value
            for name, value in arguments.items()
        }
        devices = [] if ids.device.type == "cpu" else [ids.device]
        runs = []
        for options in ({}, {"return_embeddings": True}):
            with torch.random.fork_rng(devices, device_type="cuda" if not devices else ids.device.type):
                runs.append(net(ids[:1].clone(), **options, **row))
        self._disproof = _disproof(net.to_logits, *runs)
        self._tried = net.to_logits  # last: from here on another thread believes it
        if self._disproof is not None:
            warnings.warn(
                f"fastmask takes the logits of {type(net).__name__}, although it has to_logits and "
                f"return_embeddings=: {self._disproof}; "
                "declare the head with linear_head() or head=, or rename to_logits",
                stacklevel=3,
            )

    def warn_of_borrowed(self, net: Any) -> None:
        """Says once that a deep copy of a tied network multiplies with the original's weights."""
        if not self._has_warned and _is_borrowed_lambda(getattr(net, "to_logits", None), net):
            self._has_warned = True
            warnings.warn(
                "the tied head of this deep copy multiplies with the original's embedding, which this copy does not "
                "train; untie it (tie_embedding=False), or build the network anew and load its state_dict",
                stacklevel=2,
            )


def _head_of(linear: nn.Linear) -> Head:
    return Head(linear.weight, linear.bias)


def has_bare_head(net: Any) -> bool:
    """Whether a network of one's own has an nn.Linear called to_logits, and a forward with return_embeddings=."""
    is_linear = type(getattr(net, "to_logits", None)) is nn.Linear
    if not is_linear or _is_transformer_wrapper(getattr(net, "_orig_mod", net)):
        return False
    return "return_embeddings" in inspect.signature(getattr(net, "forward", net)).parameters


def _disproof(head: nn.Linear, logits: object, embeddings: object) -> str | None:
    """Why logits are not the head's of these embeddings, to within their dtype's rounding; None if they are."""
    if not isinstance(embeddings, Tensor) or embeddings.shape[-1:] != head.weight.shape[1:]:
        received = list(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        return f"return_embeddings=True gave {received}, no input of to_logits"
    logits = logits_in(logits)
    expected = torch.nn.functional.linear(embeddings.to(head.weight.dtype), head.weight, head.bias)
    if not isinstance(logits, Tensor) or logits.shape != expected.shape:
        return "its logits are not to_logits' of its embeddings"
    error = (logits.float() - expected.float()).norm()
    coarsest = max(torch.finfo(x.dtype).eps for x in (logits, embeddings, expected))
    if not bool(error <= 16 * coarsest * expected.float().norm()):
        return "its logits are not to_logits' of its embeddings"
    return None


def logits_in(output: object) -> object:
    """The logits in what a network returned: itself, or, of a Hugging Face model, its field of that name."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def is_plain(weight: object) -> bool:
    """Whether a weight is a tensor of numbers, neither quantised nor split over devices."""
    return type(weight) in (Tensor, nn.Parameter) and not weight.is_quantized  # type: ignore[attr-defined]


def _no_split_head(net: Any, weight: Any) -> str | None:
    """Why a head's weight that is a DTensor is not split over ranks by ids, for each rank to work on its own; None if
    it is.

    fully_shard makes DTensors too, of weights that a run needs whole: a module of the network gathers them while it
    runs itself, the wrapper for all of a call.
    """
    if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
        return f"the head's weight is a DTensor {list(weight.placements)}, not Shard(0) on a mesh of one dimension"
    modules = net.modules() if isinstance(net, nn.Module) else []
    shards = [module for module in modules if hasattr(module, "unshard")]
    if any(parameter is weight for shard in shards for parameter in shard.parameters()):
        return "fully_shard has split the head's weight within the network; call it on the wrapper"
    return None


def _kind(weight: object) -> str:
    return "quantised tensor" if getattr(weight, "is_quantized", False) else type(weight).__name__


# x-transformers


def of_transformer(net: Any) -> Way:
    """The head of a TransformerWrapper whose logits are provably linear in its embeddings, and else why not.

    Anything that could come between the two (another class or forward, hooks, parametrisations,
    several heads, pooling, mixtures) refuses the short way; the logits are then the network's own.
    """
    compiled, net = net, getattr(net, "_orig_mod", net)  # torch.compile's wrapping, which can have hooks too
    if compiled is not net and any(hooks(compiled)):
        return Way(None, "hooks on the compiled network")
    if not _is_transformer_wrapper(net):
        return Way(None, f"{type(net).__name__} declares no head")
    if _has_own_forward(net):
        return Way(None, f"{type(net).__name__} has a forward of its own")
    if _altered(net):
        return Way(None, "hooks on the network, or a forward of its own")
    flags = (
        "output_is_log_prob",
        "sigsoftmax_logits",
        "squeeze_out_last_dim",
        "average_pool_embed",
        "has_multiple_heads",
    )
    modules = ("to_mixture", "combine_mixture", "cls_token", "attn_pool")
    between = [flag for flag in flags if getattr(net, flag, False)]
    between += [module for module in modules if getattr(net, module, None) is not None]
    if between:
        return Way(None, f"{', '.join(between)} between embeddings and logits")

    head: Any = net.to_logits
    if type(head) is nn.Linear:
        if _altered(head):
            return Way(None, "hooks on to_logits, or a forward of its own")
        return Way(_head_of(head), "TransformerWrapper's to_logits")
    embedding = getattr(net.token_emb, "emb", None)
    if not _is_tied_lambda(head):
        return Way(None, f"to_logits is a {type(head).__name__}")
    if _is_borrowed_lambda(head, net):
        return Way(None, "the tied head is another network's (a deep copy keeps the original's)")
    if type(embedding) is not nn.Embedding:
        return Way(None, f"the tied embedding is a {type(embedding).__name__}")
    return Way(
        Head(embedding.weight, None, getattr(net, "tie_embedding_scale", 1.0)), "TransformerWrapper's tied embedding"
    )


def gives_embeddings(net: Any) -> bool:
    """Whether it is a TransformerWrapper without a head (``return_only_embed=True``)."""
    net = getattr(net, "_orig_mod", net)
    if not _is_transformer_wrapper(net) or net.to_logits is not None:
        return False
    return not _has_own_forward(net) and not _altered(net)


def _is_transformer_wrapper(net: object) -> bool:
    x_transformers = sys.modules.get("x_transformers.x_transformers")
    return x_transformers is not None and isinstance(net, x_transformers.TransformerWrapper)


def _has_own_forward(net: nn.Module) -> bool:
    """Whether the class of a TransformerWrapper is a subclass with another forward."""
    return type(net).forward is not sys.modules["x_transformers.x_transformers"].TransformerWrapper.forward


def _altered(module: nn.Module) -> bool:
    """Whether hooks or a forward of its own stand between a module and its class."""
    return any(hooks(module)) or "forward" in vars(module)


def hooks(module: nn.Module) -> tuple[Any, ...]:
    """The tables of a module's hooks."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _is_tied_lambda(head: object) -> bool:
    """Whether ``head`` is a tied head that a TransformerWrapper.__init__ made."""
    if not isinstance(head, FunctionType) or head.__qualname__ != "TransformerWrapper.__init__.<locals>.<lambda>":
        return False
    return head.__code__.co_freevars == ("self",)


def _is_borrowed_lambda(head: object, net: object) -> bool:
    """Whether it made that head for another network: a deep copy keeps the lambda, with the original's weights."""
    if not _is_tied_lambda(head):
        return False
    (cell,) = head.__closure__  # type: ignore[attr-defined]
    return cell.cell_contents is not getattr(net, "_orig_mod", net)
