"""Triton's interpreter, quicker: what it does in vain or again and again it does once. Its answers stay the same."""

from __future__ import annotations

import dataclasses

from triton import language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Does nothing where Triton's own functions are other ones than expected."""
    if hasattr(interpreter, "_LangPatchScope"):
        _replace_the_language_once_a_launch()
    if hasattr(interpreter, "_get_np_dtype"):
        _look_dtypes_up_in_one_table()
    if hasattr(interpreter, "interpreter_builder"):
        _check_no_overflow_in_vain()


def _replace_the_language_once_a_launch() -> None:
    """At each call of a device function the interpreter replaces triton.language anew, at a millisecond or more. It
    is the same as before until the launch ends: once for each module of such functions is enough."""
    replace, replaced = interpreter._patch_lang, set()

    def once(function):
        module = id(function.__globals__)
        if module in replaced:
            return interpreter._LangPatchScope()
        replaced.add(module)
        scope = replace(function)
        restore = scope.restore

        def at_the_launchs_end():
            replaced.clear()
            restore()

        scope.restore = at_the_launchs_end
        return scope

    interpreter._patch_lang = once


def _look_dtypes_up_in_one_table() -> None:
    """For each operation the interpreter makes a table of all dtypes to look one up."""
    look_up, table = interpreter._get_np_dtype, {}

    def cached(dtype):
        if type(dtype) is not tl.dtype:  # a block, a pointer
            return look_up(dtype)
        if dtype.name not in table:
            table[dtype.name] = look_up(dtype)
        return table[dtype.name]

    interpreter._get_np_dtype = cached


def _check_no_overflow_in_vain() -> None:
    """Of each sum and product of integers it finds whether it overflows, and tells that under ``debug`` alone."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
