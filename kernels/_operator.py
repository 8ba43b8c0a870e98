"""Kernels as operators of PyTorch, which torch.compile takes as they are.

Registered with the dispatcher itself: what torch.library's custom_op and register_autograd do in Python besides takes
the host longer, at every call, than most of these kernels should take a GPU. A call that nobody watches (no tracing,
mode, transform or profiler; plain tensors) does without the dispatcher as well, which takes as long as all the rest.

A record (``fastmask/records.py``) crosses as one parameter: the schema has its fields, the function gets it whole.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame as _eval_frame

P = ParamSpec("P")
R = TypeVar("R")
Overload: TypeAlias = "torch._ops.OpOverload[P, R]"
_NO_TENSORS = (type(None), bool, int, float, str)  # asked first: most arguments are of these
_libraries: dict[str, torch.library.Library] = {}  # an operator lives as long as its own


class _Signature:
    """A function's parameters as a schema has them: records by their fields."""

    def __init__(self, function: Callable[..., Any]) -> None:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
        self.records = [hints[name] if _is_record(hints[name]) else None for name in parameters]
        self.has_records = any(self.records)
        self.result = hints["return"]
        self.returns_record = _is_record(self.result)
        self._types: dict[str, dict[str, Any]] = {}  # of each parameter: the schema's names and their types
        for name, record in zip(parameters, self.records, strict=True):
            fields = {name: hints[name]}
            if record is not None:
                fields = {f"{name}_{field}": of for field, of in typing.get_type_hints(record).items()}
            self._types[name] = fields

    def schema(self, mutates: Sequence[str]) -> str:
        """As torch.library writes it."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [
            inspect.Parameter(name, kind, annotation=of)
            for fields in self._types.values()
            for name, of in fields.items()
        ]
        returns = None if self.result is type(None) else self.result
        if self.returns_record:
            fields = typing.get_type_hints(self.result).values()
            returns = tuple.__class_getitem__(tuple(Tensor if of == Tensor | None else of for of in fields))

        def prototype() -> None: ...

        prototype.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
        return torch.library.infer_schema(prototype, mutates_args=self.written(mutates))

    def written(self, mutates: Sequence[str]) -> list[str]:
        """The schema's names of tensors that are written to: of a record all, or ``record_field`` alone."""
        types = {name: of for fields in self._types.values() for name, of in fields.items()}
        names = [name for part in mutates for name in self._types.get(part, [part])]
        return [name for name in names if "Tensor" in str(types[name])]

    def flat(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """A call's arguments as the schema has them."""
        flat: list[Any] = []
        for argument, record in zip(arguments, self.records, strict=True):
            if record is None:
                flat.append(argument)
            else:
                flat.extend(argument)
        return flat

    def whole(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """The arguments of a schema as the function has them."""
        whole, first = [], 0
        for record in self.records:
            if record is None:
                whole.append(arguments[first])
                first += 1
            else:
                whole.append(record._make(arguments[first : first + len(record._fields)]))
                first += len(record._fields)
        return whole

    def returned(self, outputs: Any) -> Any:
        """What the function returns, from what its operator does."""
        return self.result._make(outputs) if self.returns_record else outputs

    def filled(self, outputs: Any) -> Any:
        """What an operator returns, from what its function does: a schema's outputs are tensors, empty for None."""
        if not self.returns_record:
            return outputs
        return tuple(outputs[0].new_empty(0) if output is None else output for output in outputs)


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


class Operator(Generic[P, R]):
    """The operator of a function, called as the function is; ``overload`` is what PyTorch knows."""

    def __init__(
        self,
        function: Callable[P, R],
        signature: _Signature,
        overload: Overload[..., Any],
        written: Sequence[int],
    ) -> None:
        self.function, self.signature, self.overload, self.written = function, signature, overload, written
        self.differentiated: Callable[..., Any] | None = None
        self.num_gradients = 0  # of the leading tensors

    def __call__(self, *arguments: P.args, **nothing: P.kwargs) -> R:
        signature = self.signature
        flat = signature.flat(arguments) if signature.has_records else arguments
        if _is_watched(flat):
            return cast(R, signature.returned(self.overload(*flat, **nothing)))
        if self.differentiated is not None and _needs_gradient(flat[: self.num_gradients]):
            return cast(R, self.differentiated(flat, arguments, self.function))
        if self.written:
            _count_versions([flat[place] for place in self.written])
        return self.function(*arguments, **nothing)

    def below(self, *arguments: Any) -> R:
        """What the function gives, with no derivative, by the dispatcher, which tells whoever watches."""
        with torch._C._AutoDispatchBelowAutograd():
            return cast(R, self.signature.returned(self.overload(*self.signature.flat(arguments))))


def _is_watched(flat: Sequence[Any]) -> bool:
    """Whether anything but the function itself is to know of a call: then the dispatcher tells it."""
    if (
        torch.compiler.is_compiling()
        or _eval_frame.get_eval_frame_callback() is not None  # torch.compile would look into the function
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return True
    for x in flat:
        kind = type(x)
        if kind in _NO_TENSORS:
            continue
        if kind is Tensor or kind is torch.nn.Parameter:
            if x.is_meta or x.is_neg() or x._is_zerotensor():  # whose memory is not what it holds
                return True
        elif isinstance(x, Tensor):
            return True
    return False


def _needs_gradient(tensors: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])


def _count_versions(written: Sequence[Any]) -> None:
    """Tells autograd what is written to: a tensor saved for backward must not change unseen."""
    counted = [x for x in written if x is not None and not x.is_inference()]
    if counted:
        torch.autograd.graph.increment_version(counted)


def _nothing(*arguments: Any) -> None:
    """What an operator returns that only writes."""


def operator(
    name: str, fake: Callable[..., Any] = _nothing, mutates: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Makes a function, by its type hints, the operator ``torch.ops.fastmask.<name>``.

    It takes its arguments by position, and has no derivative; see :func:`differentiable`.

    Args:
        fake: gives outputs like the function's, of the same arguments, with nothing in them, for tracing.
        mutates: names of parameters that the function writes to; of a record all tensors, or "record_field" alone.
    """

    def register(function: Callable[P, R]) -> Operator[P, R]:
        signature = _Signature(function)

        def run(*arguments: Any) -> Any:
            return signature.filled(function(*signature.whole(arguments)))  # type: ignore[call-arg]

        def trace(*arguments: Any) -> Any:
            return signature.filled(fake(*signature.whole(arguments)))

        if name in _libraries:  # its module is loaded anew
            _libraries[name]._destroy()
        library = _libraries[name] = torch.library.Library("fastmask", "FRAGMENT")
        library.define(name + signature.schema(mutates), tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, torch._disable_dynamo(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastmask::{name}", trace, lib=library)
        overload: Overload[..., Any] = getattr(torch.ops.fastmask, name).default
        names = [argument.name for argument in overload._schema.arguments]
        written = [names.index(name) for name in signature.written(mutates)]
        if written:
            library.impl(name, _counting_versions(overload, written), "ADInplaceOrView", with_keyset=True)
        operation = Operator[P, R](function, signature, overload, written)
        functools.update_wrapper(operation, function)
        return operation

    return register


def _counting_versions(overload: Overload[..., Any], written: Sequence[int]) -> Callable[..., Any]:
    """What the dispatcher does for tensors that autograd may have saved."""

    def counting(keys: Any, *arguments: Any) -> Any:
        _count_versions([arguments[place] for place in written])
        return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return counting


def differentiable(
    operation: Operator[..., Any],
    num_gradients: int,
    gradients: Callable[..., Sequence[Any]],
    setup_context: Callable[..., Any],
) -> None:
    """Gives an operator its derivative: ``backward`` and ``setup_context`` of a torch.autograd.Function.

    Its first output alone is differentiable. Autograd is shown no other, for which it would ask, and so fill, a
    gradient of zeros, and of what a call has nothing but what may have a gradient.

    Args:
        num_gradients: how many of the schema's leading tensors have one.
        gradients: theirs.
        setup_context: gets arguments and outputs as the function does.
    """
    signature = operation.signature
    assert signature.returns_record, "its first output is differentiable, the others are not"

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *shown: Any) -> Tensor:
            *_, arguments, run, others = shown
            outputs = run(*arguments)
            setup_context(ctx, arguments, outputs)
            others.extend(outputs[1:])
            return outputs[0]

        @staticmethod
        def backward(ctx: Any, *incoming: Any) -> Any:
            return *gradients(ctx, *incoming), None, None, None

    def differentiated(flat: Sequence[Any], arguments: Sequence[Any], run: Callable[..., Any]) -> Any:
        others: list[Any] = []
        first = Derivative.apply(*flat[:num_gradients], arguments, run, others)
        return signature.returned((first, *others))

    def dispatched(*flat: Any) -> Any:
        arguments = signature.whole(flat)
        if not _needs_gradient(flat[:num_gradients]):
            return operation.below(*arguments)
        return differentiated(flat, arguments, operation.below)

    operation.differentiated, operation.num_gradients = differentiated, num_gradients
    _libraries[operation.overload._schema.name.removeprefix("fastmask::")].impl(
        operation.overload, dispatched, "Autograd"
    )
