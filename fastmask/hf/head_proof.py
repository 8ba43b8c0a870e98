"""Proves that a model's logits are a linear head's: c tanh((s W e + b) / c), or s W e + b.

A hook on the head starts the proof: from its output on, every operation is seen by the dispatcher. Each that takes
the logits must be one whose effect on that law is known, and what the model returns must be the last of them. The law
is then compared with the numbers once more. What the head is given, its input e, is taken by a hook before it, which
leaves the head no rows to multiply.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmask._modes import keeping_modes
from fastmask.heads import Head, hooks, is_plain, logits_in
from fastmask.vocabulary_parallel import is_split

_aten = torch.ops.aten
# Rows keep their order and their columns: whether they keep their number is seen from the shapes.
_SAME_NUMBERS = (_aten.view, _aten._unsafe_view, _aten.alias, _aten.detach, _aten.clone, _aten.slice)


class _Law(NamedTuple):
    """Logits so far: s W e + b, or, after a tanh, c tanh(s W e + b); rational, so that x / c * c is x.

    scale: s. biases: names of parameters or buffers [V], each with its factor; b is their sum. softcap: c, or None.
    """

    scale: Fraction = Fraction(1)
    biases: tuple[tuple[str, Fraction], ...] = ()
    softcap: Fraction | None = None

    def times(self, factor: Fraction) -> _Law:
        if self.softcap is not None:
            return self._replace(softcap=self.softcap * factor)
        return _Law(self.scale * factor, tuple((name, own * factor) for name, own in self.biases))


class Proof(NamedTuple):
    """Where a model's head is, and what its logits are: c tanh((s W e + b) / c), or s W e + b.

    path: of the head. line: what lies on that path. scale: s. biases: names of parameters or buffers [V], each with
    its factor; b is their sum. softcap: c, or None.
    """

    path: str
    line: tuple[str, ...]
    scale: float
    biases: tuple[tuple[str, float], ...]
    softcap: float | None

    def holds_for(self, model: nn.Module) -> bool:
        """Whether the modules on the path are still those of the proof: no adapter or hook came in since."""
        return self.line == _line(model, self.path) and _objection(model, self.path) is None

    def head(self, model: nn.Module) -> Head:
        """The head, with the parameters that the model has now."""
        bias = None
        for name, factor in self.biases:
            term = operator.attrgetter(name)(model)
            term = term if factor == 1.0 else factor * term
            bias = term if bias is None else bias + term
        return Head(operator.attrgetter(self.path)(model).weight, bias, self.scale, self.softcap)


def _proof(model: nn.Module, path: str, law: _Law) -> Proof:
    softcap = None if law.softcap is None else float(law.softcap)
    if law.softcap is not None:  # c tanh(x) is c tanh((c x) / c)
        law = law._replace(softcap=None).times(law.softcap)
    biases = tuple((name, float(factor)) for name, factor in law.biases)
    return Proof(path, _line(model, path), float(law.scale), biases, softcap)


class _Hook:
    """A hook of this module's, which comes and goes, perhaps on another thread."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @torch.compiler.disable
    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


@contextmanager
def leaving_no_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """No gradients, and afterwards random numbers, modes and buffers are as before."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.no_grad(), keeping_modes(model), torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            for buffer, values in before:
                buffer.copy_(values)


def prove(model: nn.Module, call: Callable[[Tensor], Any], ids: Tensor) -> Proof | str:
    """The proof, or the reason why there is none. To be run where the model leaves no trace.

    Args:
        call: runs the model on ids.
        ids: [B, N] int64, a few.
    """
    heads = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    named = getattr(model, "get_output_embeddings", lambda: None)()
    width = getattr(getattr(model, "config", None), "vocab_size", None)
    heads = {path: head for path, head in heads.items() if head is named or head.out_features == width}
    try:
        model.eval()
        found = _follow(model, heads, call, ids)
        if isinstance(found, str):
            return found
        model.train()  # what only training does, such as a dropout of the logits
        if _follow(model, heads, call, ids) != found:
            return "its logits are another function of the head's in training"
        model.eval()
        return _confirmed(model, found, call, ids)
    except Exception as error:
        return f"a trial run failed: {type(error).__name__}: {error}"


@torch.compiler.disable(recursive=False)  # the hook comes and goes; what the model runs may be compiled
def embeddings(model: nn.Module, path: str, call: Callable[[], Any]) -> Tensor:
    """What the head is given in a call: [B, N, D]; the head itself then gets no rows, or one.

    Raises:
        RuntimeError: it was not run once.
    """
    given: list[Tensor] = []
    thread = threading.get_ident()

    def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != thread:  # others share the model
            return None
        given.append(arguments[0])
        return (arguments[0][:, :num_rows],)

    head: Any = model.get_submodule(path)
    num_rows = int(is_split(head.weight))  # torch's DTensor takes no empty tensor there
    handle = head.register_forward_pre_hook(_Hook(take))
    try:
        with _running(head.weight):
            call()
    finally:
        handle.remove()
    if len(given) != 1:
        raise RuntimeError(
            f"expected the model to run its head {path} once, as when that was proved, received {len(given)} runs; "
            "wrap it in fastmask.hf.Backbone anew"
        )
    return given[0]


def _running(weight: Tensor) -> AbstractContextManager[Any]:
    """What a head runs under: where its weight is split over ranks torch must be told that its input is whole."""
    if not is_split(weight):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def _confirmed(model: nn.Module, proof: Proof, call: Callable[[Tensor], Any], ids: Tensor) -> Proof | str:
    """The proof, if its numbers are the model's to within rounding."""
    logits: Any = logits_in(call(ids))
    given = embeddings(model, proof.path, lambda: call(ids))
    expected = proof.head(model).logits(given).of_rows(given)
    coarsest = max(torch.finfo(x.dtype).eps for x in (logits, given, expected))
    error = (logits.float() - expected.float()).norm()
    if not bool(error <= 16 * coarsest * expected.float().norm()):
        return f"its logits are not those of {proof.path}"
    return proof


def _follow(model: nn.Module, heads: dict[str, nn.Linear], call: Callable[[Tensor], Any], ids: Tensor) -> Proof | str:
    """The proof by one run, without a look at its numbers."""
    follower = _Follower(model)
    inputs: dict[str, list[Tensor]] = {path: [] for path in heads}
    thread = threading.get_ident()
    with ExitStack() as stack:
        for path, head in heads.items():

            def start(module: nn.Linear, arguments: Any, output: Tensor, path: str = path) -> None:
                if threading.get_ident() != thread:
                    return
                if not any(inputs.values()):
                    stack.enter_context(follower)
                inputs[path].append(arguments[0])
                follower.start(output, path, module)

            handle = head.register_forward_hook(_Hook(start))
            stack.callback(handle.remove)
        logits = logits_in(call(ids))

    if not isinstance(logits, Tensor):
        return f"it returned a {type(logits).__name__} without logits (config.return_dict=True gives them)"
    fate = follower.fate(logits)
    if fate is None:
        return "its logits come from no nn.Linear of one row an id"
    path, law = fate
    objection = _objection(model, path) or follower.objection
    if objection is not None:
        return objection
    if isinstance(law, str):
        return f"between {path} and the logits lies {law}"
    weight = heads[path].weight
    if not is_plain(weight):
        return f"the weight of {path} is a {type(weight).__name__}, no plain tensor"
    if len(inputs[path]) != 1 or inputs[path][0].shape[:-1] != ids.shape or logits.shape[:-1] != ids.shape:
        return f"{path} is not run once, on a row for each id"
    if law.softcap is not None and law.softcap <= 0:
        return f"the softcap after {path} is not above 0"
    return _proof(model, path, law)


class _Follower(TorchDispatchMode):
    """Sees every operation, and keeps the law of each tensor that came from a head's output, or why it has none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.objection: str | None = None  # to what is done with the logits beside their way to the output
        self._names = {id(value): name for name, value in (*model.named_parameters(), *model.named_buffers())}
        self._laws: dict[int, tuple[str, _Law | str]] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets their ids

    def start(self, output: Tensor, path: str, head: nn.Linear) -> None:
        biases = () if head.bias is None else ((f"{path}.bias", Fraction(1)),)
        self._keep(output, path, _Law(biases=biases))

    def fate(self, logits: Tensor) -> tuple[str, _Law | str] | None:
        """The head that a tensor comes from, and its law, or what has none."""
        return self._laws.get(id(logits))

    def _keep(self, x: Tensor, path: str, law: _Law | str) -> None:
        self._laws[id(x)] = path, law
        self._alive.append(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in inputs if id(x) in self._laws]
        if not ours:
            return out
        path, before = self._laws[id(ours[0])]
        after: _Law | str = f"the operation {func}"
        if isinstance(before, str):
            after = before
        elif len(ours) == 1 and isinstance(out, Tensor):
            after = self._after(func.overloadpacket, before, ours[0], args, kwargs, out) or after
        if func._schema.is_mutable:  # it may write into what other tensors share
            self.objection = f"the logits of {path} are written to ({func})"
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._keep(x, path, after)
            elif x is not None:
                self.objection = f"the model looks at the logits of {path} itself ({func})"
        return out

    def _after(
        self, packet: Any, law: _Law, x: Tensor, args: Any, kwargs: dict[str, Any], out: Tensor
    ) -> _Law | None:
        """The law of an operation's result; None where it is not known to have one."""
        if out.numel() != x.numel() or out.shape[-1:] != x.shape[-1:] or not out.is_floating_point():
            return None
        if packet in _SAME_NUMBERS:
            return law
        if packet is _aten._to_copy:
            return law if torch.finfo(out.dtype).eps <= torch.finfo(x.dtype).eps else None
        if packet is _aten.tanh and law.softcap is None:
            return law._replace(softcap=Fraction(1))
        others = [other for other in args if other is not x]
        if kwargs or len(args) != 2 or len(others) != 1:  # a rounding mode, a multiple
            return None
        other = others[0]
        if isinstance(other, int | float):  # a tensor may be another one tomorrow
            if packet in (_aten.mul, _aten.div) and math.isfinite(other) and other != 0:
                return law.times(Fraction(other) if packet is _aten.mul else 1 / Fraction(other))
        elif packet is _aten.add and law.softcap is None and isinstance(other, Tensor):
            name = self._names.get(id(other))
            if name is not None and other.shape == x.shape[-1:]:
                return law._replace(biases=(*law.biases, (name, Fraction(1))))
        return None


def _modules_to(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The model, what lies on the path, and its end, with their names."""
    names = path.split(".")
    for i in range(len(names) + 1):
        name = ".".join(names[:i])
        yield name, model.get_submodule(name)


def _line(model: nn.Module, path: str) -> tuple[str, ...]:
    """What kinds of modules lie on the path; () where it leads nowhere."""
    try:
        return tuple(f"{type(m).__module__}.{type(m).__qualname__}" for _, m in _modules_to(model, path))
    except AttributeError:
        return ()


def _objection(model: nn.Module, path: str) -> str | None:
    """What could change the logits from one run to the next, on the path to a head; None for nothing."""
    for name, module in _modules_to(model, path):
        where = name or type(model).__name__
        altered = any(not isinstance(hook, _Hook) for table in hooks(module) for hook in tuple(table.values()))
        if altered or "forward" in vars(module):
            return f"hooks on {where}, or a forward of its own"
        if getattr(module, "_compiled_call_impl", None) is not None:
            return f"{where} is compiled; compile the trunk alone (model.base_model.compile())"
        if getattr(module, "base_layer", None) is not None:
            return f"the head carries an adapter ({type(module).__name__})"
    return None
