"""Kernels as operators of PyTorch, which torch.compile takes as they are.

Registered with the dispatcher itself: what torch.library's custom_op and register_autograd do in Python besides takes
the host longer, at every call, than most of these kernels should take a GPU.

A record (``fastmask/records.py``) crosses as one parameter: the schema has its fields, the function gets it whole.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Overload: TypeAlias = "torch._ops.OpOverload[P, R]"
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
            returns = tuple.__class_getitem__(tuple(typing.get_type_hints(self.result).values()))

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


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


class Operator(Generic[P, R]):
    """The operator of a function, called as the function is; ``overload`` is what PyTorch knows."""

    def __init__(self, signature: _Signature, overload: Overload[..., Any]) -> None:
        self.signature, self.overload = signature, overload

    def __call__(self, *arguments: P.args, **nothing: P.kwargs) -> R:
        signature = self.signature
        outputs: Any = self.overload(*(signature.flat(arguments) if signature.has_records else arguments), **nothing)
        return signature.returned(outputs) if signature.returns_record else outputs


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
            return function(*signature.whole(arguments))  # type: ignore[call-arg]

        def trace(*arguments: Any) -> Any:
            return fake(*signature.whole(arguments))

        if name in _libraries:  # its module is loaded anew
            _libraries[name]._destroy()
        library = _libraries[name] = torch.library.Library("fastmask", "FRAGMENT")
        library.define(name + signature.schema(mutates), tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(
            name, torch._disable_dynamo(run if signature.has_records else function), "CompositeExplicitAutograd"
        )
        torch.library.register_fake(f"fastmask::{name}", trace, lib=library)
        overload: Overload[..., Any] = getattr(torch.ops.fastmask, name).default
        if mutates:
            counting = _counting_versions(overload, signature.written(mutates))
            library.impl(name, counting, "ADInplaceOrView", with_keyset=True)
        operation = Operator[P, R](signature, overload)
        functools.update_wrapper(operation, function)
        return operation

    return register


def _counting_versions(overload: Overload[..., Any], mutates: Sequence[str]) -> Callable[..., Any]:
    """Tells autograd what an operator writes to: a tensor saved for backward must not change unseen."""
    names = [argument.name for argument in overload._schema.arguments]
    places = [names.index(name) for name in mutates]

    def counting(keys: Any, *arguments: Any) -> Any:
        torch.autograd.graph.increment_version([arguments[i] for i in places if arguments[i] is not None])
        return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return counting


def differentiable(
    operation: Operator[..., Any], gradients: Callable[..., Sequence[Any]], setup_context: Callable[..., Any]
) -> None:
    """Gives an operator its derivative: ``backward`` and ``setup_context`` of a torch.autograd.Function.

    Args:
        gradients: of the leading tensors of the schema; the rest has none.
        setup_context: gets arguments and outputs as the function does.
    """
    signature, overload = operation.signature, operation.overload

    def below(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            outputs = below(*arguments)
            setup_context(ctx, signature.whole(arguments), signature.returned(outputs))
            ctx.num_arguments = len(arguments)
            return outputs

        @staticmethod
        def backward(ctx: Any, *incoming: Any) -> Any:
            found = gradients(ctx, *incoming)
            return *found, *[None] * (ctx.num_arguments - len(found))

    def run(*arguments: Any) -> Any:
        needs = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
        return Derivative.apply(*arguments) if needs else below(*arguments)

    _libraries[overload._schema.name.removeprefix("fastmask::")].impl(overload, run, "Autograd")
