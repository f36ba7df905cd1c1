"""Files that someone has damaged or written to do harm: mutants of valid ones, the same for the same seed."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import yaml

DEEP = 100_000  # levels of text that is nested in the bytes; structures are nested as deep as a writer can write them


def _nested(depth: int) -> Any:
    value: Any = []
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def hostile_values() -> list[Any]:
    """What a field may hold in place of what is expected."""
    return [
        None, True, False, 0, -1, 1, 2**31, 2**63, 10**9, 10**400, -(10**400), 0.5, -0.0, 1e308, math.inf, -math.inf,
        math.nan, "", "x", "\0", "../../x", "/etc/passwd", "a" * 300, "b" * 100_000, "\ud800", "\x1b[31m\nred", "1e999",
        "nan", "12", [], [[]], [None], [1, "a"], [{}], {}, {"": {}}, {"a": 1}, {"type": []}, [0] * 1000, _nested(200),
    ]  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a structure."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*at, key)
        yield from _places(part, (*at, key))


def _structure(value: Any, rng: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places or rng.random() < 0.02:
            return rng.choice(hostile_values())
        *at, last = rng.choice(places)
        parent = value
        for key in at:
            parent = parent[key]
        match rng.randrange(8):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(("unknown", "", "a" * 5000, "\n", "__class__"))] = rng.choice(hostile_values())
            case 1:
                parent.append(rng.choice(hostile_values()))
            case 2:
                parent[last] = [parent[last]] if rng.random() < 0.5 else {str(last): parent[last]}
            case 3:  # another field's value
                *other, end = rng.choice(places)
                taken = value
                try:
                    for key in other:
                        taken = taken[key]
                    parent[last] = copy.deepcopy(taken[end])
                except (KeyError, IndexError, TypeError):
                    parent[last] = None
            case _:
                parent[last] = rng.choice(hostile_values())
    return value


def _bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(9):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            flipped = bytearray(data)
            for _ in range(rng.randrange(1, 9)):
                flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 3:  # lines twice, and so keys
            lines = data.splitlines(keepends=True)
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            return b"".join(lines)
        case 4:
            other = rng.randrange(len(data) + 1)
            return data[:at] + data[min(at, other) : max(at, other)] + data[at:]
        case 5:
            mark = rng.choice((b"[", b'{"a":', b"{a: ", b"- ", b"("))
            return data[:at] + mark * DEEP + data[at:]
        case 6:
            return (
                data[:at] + rng.choice((b"\xff\xfe", b"\0", b"9" * 5000, b"*a", b"&a ", b"1e999", b"NaN")) + data[at:]
            )
        case 7:
            return rng.choice(
                (b"", b"\xef\xbb\xbf" + data, b"null", b"[" * DEEP, b"\0" * 64, b"\n\n", b'"', b"9" * 5000)
            )
        case _:
            return data[::-1]


def mutants(data: bytes, rng: random.Random, parse: Callable[[bytes], Any], write: Callable[[Any], bytes]) -> bytes:
    """One mutant of `data`, of its structure (as `parse` and `write` have it) or of its bytes."""
    if rng.random() < 0.3:
        return _bytes(data, rng)
    return write(_structure(parse(data), rng))


def write_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def write_lines(values: Any) -> bytes:
    """JSON lines."""
    return b"".join(json.dumps(v).encode() + b"\n" for v in (values if isinstance(values, list) else [values]))


def read_lines(data: bytes) -> Any:
    return [json.loads(line) for line in data.splitlines()]


def write_yaml(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, RecursionError):
        return json.dumps(value).encode()


def write_toml(value: Any) -> bytes:
    """Tables inline, which is enough for a reader."""
    if not isinstance(value, dict):
        return f"value = {_toml(value)}\n".encode("utf-8", "surrogatepass")
    return "".join(f"{_text(k)} = {_toml(v)}\n" for k, v in value.items()).encode("utf-8", "surrogatepass")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    if value is None:  # which TOML lacks; it has dates instead
        return "1979-05-27"
    return str(value).lower()


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
