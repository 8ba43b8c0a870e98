"""What the tests of data sets share: a vocabulary, windows of it, and what is refused in which words."""

from __future__ import annotations

import builtins
import re

import pytest

from fastmask.data import TokenWindows

VOCABULARY = {"num_tokens": 100, "mask_id": 99}


def windows(ids, seq_len, **options):
    return TokenWindows(ids, seq_len, **{**VOCABULARY, **options})


def refuses(error, *words):
    """Expects `error` with these words in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


def without(monkeypatch, package):
    """From here on in the test, `import package` fails as if it were not installed."""
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
