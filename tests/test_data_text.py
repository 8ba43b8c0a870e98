"""Data sets of text: tokenizers, files joined, and what is refused in which words."""

from __future__ import annotations

import functools
import types
from collections import UserDict

import numpy as np
import pytest
import torch
from data_sets import VOCABULARY, refuses

from fastmask.data import from_text


class FakeTokenizer:
    """As transformers: called, gives a UserDict of lists, with special tokens unless told otherwise."""

    def __init__(self):
        self.calls = 0

    def __call__(self, text, add_special_tokens=True):
        self.calls += 1
        ids = [ord(letter) % 90 for letter in text]
        if add_special_tokens:
            ids = [90, *ids, 91]
        return UserDict(input_ids=ids, attention_mask=[1] * len(ids))


class FakeRustTokenizer:
    """As tokenizers: not callable, encode gives an object with ids."""

    def encode(self, text):
        return types.SimpleNamespace(ids=[ord(letter) % 90 for letter in text])


def test_text_keeps_every_character_of_every_file_in_order(tmp_path):
    texts = ["one\r\ntwo\n\n", "", "déjà vu"]
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    for source in (paths, iter(paths), [str(path) for path in paths]):
        data = from_text(source, str.encode, 1, num_tokens=257, mask_id=256)
        assert bytes(torch.cat(list(data)).tolist()).decode() == "".join(texts)


def test_a_hugging_face_tokenizer_works_as_it_is(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text("!!\n!", encoding="utf-8")
    paths[1].write_text("#", encoding="utf-8")
    tokenizer = FakeTokenizer()
    data = from_text(paths, tokenizer, 9, **VOCABULARY)
    assert tokenizer.calls == 2  # special tokens around each file, once
    assert data[0].tolist() == [90, 33, 33, 10, 33, 91, 90, 35, 91]
    bare = from_text(paths, functools.partial(tokenizer, add_special_tokens=False), 5, **VOCABULARY)
    assert bare[0].tolist() == [33, 33, 10, 33, 35]


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda text: [ord(letter) for letter in text],
        lambda text: np.array([ord(letter) for letter in text], "u2"),
        lambda text: torch.tensor([ord(letter) for letter in text], dtype=torch.int16),
        str.encode,
        FakeRustTokenizer(),
        types.SimpleNamespace(encode=lambda text: [ord(letter) for letter in text]),
    ],
)
def test_any_tokenizer_works(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("()*+,-", encoding="utf-8")
    data = from_text(tmp_path / "a.txt", tokenizer, 4, stride=2, **VOCABULARY)
    assert [item.tolist() for item in data] == [[40, 41, 42, 43], [42, 43, 44, 45]]


def test_text_refuses_bad_ids_at_once_with_the_file(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("AAAA", encoding="utf-8")
    bad.write_text("AAcA", encoding="utf-8")  # ord("c") is 99, the mask
    with refuses(ValueError, "received 99 at", "bad.txt, position 2"):
        from_text([good, bad], str.encode, 2, **VOCABULARY)
    bad.write_text("AAd", encoding="utf-8")
    with refuses(ValueError, "received 100 at", "bad.txt, position 2"):
        from_text([good, bad], str.encode, 2, **VOCABULARY)


def test_text_refuses_what_it_cannot_use(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"AA\xffA")
    with refuses(ValueError, "expected UTF-8", "a.txt", "byte 0xff in position 2", "convert"):
        from_text(path, str.encode, 2, **VOCABULARY)
    path.write_text("AAAAA", encoding="utf-8")
    with refuses(TypeError, "can be called or has encode", "received int", "give a function"):
        from_text(path, 5, 2, **VOCABULARY)
    with refuses(TypeError, "expected ids of", "a.txt", "received str"):
        from_text(path, str.lower, 2, **VOCABULARY)
    with refuses(TypeError, "expected ids of", "received NoneType"):
        from_text(path, lambda text: {"tokens": [1]}, 2, **VOCABULARY)
    with refuses(ValueError, "expected ids of", "1 dimension", "received shape (1, 5)"):
        from_text(path, lambda text: torch.ones(1, 5, dtype=torch.int64), 5, **VOCABULARY)
    with refuses(ValueError, "received 5 ids, of which the last 1 fill none"):
        from_text(path, str.encode, 2, **VOCABULARY)
    assert len(from_text(path, str.encode, 2, tail="drop", **VOCABULARY)) == 2
    with refuses(ValueError, "at least seq_len = 2 ids", "received 0"):
        from_text([], str.encode, 2, **VOCABULARY)
    with refuses(ValueError, "mask_id in [0, num_tokens)"):
        from_text(path, str.encode, 2, num_tokens=100, mask_id=100)
    with pytest.raises(FileNotFoundError):
        from_text(tmp_path / "none.txt", str.encode, 2, **VOCABULARY)


@pytest.mark.parametrize("paths", [987, None, b"text.txt", [987], [None]])
def test_paths_that_name_no_file_are_refused(paths):
    """An int would be read as an open file, and closed."""
    with refuses(TypeError, "expected paths", "give a str or a Path"):
        from_text(paths, str.encode, 2, **VOCABULARY)


def test_text_ids_past_four_bytes_do_not_wrap(tmp_path):
    (tmp_path / "a.txt").write_text("A", encoding="utf-8")
    ids = [2**31, 2**32 + 5]
    data = from_text(tmp_path / "a.txt", lambda text: ids, 2, num_tokens=2**40, mask_id=0)
    assert data[0].tolist() == ids
