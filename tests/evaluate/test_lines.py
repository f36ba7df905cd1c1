"""Reading lines, and the compact sets, against what Python's own would say."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate import lines as lines_module
from nanoflow_jax.evaluate.lines import FileIdentity, NumberSet, TextSet, identify, read_lines

pieces = st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b"\r", b"\0", b"\xff", b"bcdefgh" * 3, b"\xef\xbb\xbf"]))


@given(pieces, st.integers(1, 30))
def test_lines_are_those_of_the_file(tmp_path_factory, parts: list[bytes], limit: int) -> None:
    """Numbers, contents and count; a long line is told with its length and does not disturb the others."""
    path = tmp_path_factory.mktemp("lines") / "file"
    data = b"".join(parts)
    path.write_bytes(data)
    rest = data.removeprefix(b"\xef\xbb\xbf")
    expected = rest.split(b"\n")[: -1 if rest.endswith(b"\n") or not rest else None]
    found = list(read_lines(path, limit))
    assert [line.number for line in found] == list(range(1, len(expected) + 1))
    for line, wanted in zip(found, expected, strict=True):
        wanted = wanted.rstrip(b"\r\n")
        if line.problem is None:
            assert line.data == wanted
        else:
            assert line.data == b""
            assert len(wanted) > limit - 3  # ends of lines may count
            assert f"at most {limit}" in line.problem
    assert all(
        line.problem is not None for line, w in zip(found, expected, strict=True) if len(w.rstrip(b"\r\n")) > limit
    )
    assert identify(path) == FileIdentity(len(data), len(expected), hashlib.sha256(data).hexdigest())


@given(pieces, st.integers(1, 30), st.integers(1, 9))
def test_an_identified_file_is_read_the_same(tmp_path_factory, parts: list[bytes], limit: int, chunk: int) -> None:
    """However lines lie over chunks."""
    path = tmp_path_factory.mktemp("lines") / "file"
    path.write_bytes(b"".join(parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "_CHUNK", chunk)
        found, plain = identify(path), list(read_lines(path, limit))
        assert list(read_lines(path, limit, identity=found)) == plain


def grown(data: bytes) -> bytes:
    return data + b"x"


def shortened(data: bytes) -> bytes:
    return data[:-1]


def other_bytes(data: bytes) -> bytes:
    return data[:45] + b"?" + data[46:]


@pytest.mark.parametrize("change", [grown, shortened, other_bytes])
def test_no_changed_line_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Whatever has been done to the file since: the lines before may be given, then one line says it."""
    path, data = tmp_path / "file", b"".join(b"%04d\n" % i for i in range(10))
    monkeypatch.setattr(lines_module, "_CHUNK", 8)
    path.write_bytes(data)
    found = identify(path)
    path.write_bytes(change(data))
    read: list[bytes] = []
    with pytest.raises(ConfigError, match=r"file was changed during the run, after byte \d+; the results so") as error:
        for line in read_lines(path, identity=found):
            read += [line.data]
    assert "\n" not in str(error.value)
    assert len(read) >= 7
    assert read == data.split()[: len(read)]


def test_a_line_of_100_mb_costs_no_memory(tmp_path: Path) -> None:
    """It is passed over in pieces, and the next line is read."""
    import tracemalloc

    path = tmp_path / "big"
    with open(path, "wb") as file:
        file.write(b'{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"prompt": "after"}\n')
    tracemalloc.start()
    first, second = read_lines(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first.problem == f"the line has {100 * 2**20 + 15} bytes; accepted: at most {4 * 2**20}"
    assert second.data == b'{"prompt": "after"}'
    assert peak < 16 * 2**20, peak


@given(st.lists(st.integers(0, 70_000)))
def test_numbers(numbers: list[int]) -> None:
    found, expected = NumberSet(), set()
    for number in numbers:
        assert found.add(number) == (number not in expected)
        expected.add(number)
        assert number in found
    assert len(found) == len(expected)
    assert [n in found for n in range(0, 70_000, 17)] == [n in expected for n in range(0, 70_000, 17)]


def test_texts_of_many_runs() -> None:
    """Every text is new once, also after its digest has moved to the sorted runs; 8 bytes each."""
    found = TextSet()
    count = 5 * TextSet.RECENT + 100
    assert all(found.add(f"request-{i}") for i in range(count))
    assert not any(found.add(f"request-{i}") for i in range(0, count, 7))
    assert found.add("\ud800")
    assert not found.add("\ud800")
    assert found.nbytes == 8 * 5 * TextSet.RECENT
    assert len(found._runs) <= 4, "few runs to search"
