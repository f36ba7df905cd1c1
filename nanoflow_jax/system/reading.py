"""Files that others wrote: JSON, TOML and YAML as plain data of bounded size and depth, or one line that says why not.

Nothing that is read here can run code, refer to other files, or grow when it is read.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

MESSAGE = 500  # characters of a message; values of any size may be quoted in it
MOST_BYTES = 64 * 2**20  # of a file; the longest that is known, a list of a large model's tensors, has a few MiB
DEPTH = 64
LARGEST = 1e308  # what is smaller can be made a float


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line naming the field and the fix. most: characters."""

    def __init__(self, message: str, most: int = MESSAGE):
        super().__init__(one_line(message, most))


class Malformed(ValueError):
    """Text that is no such data. field: the name at fault, where there is one."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def one_line(text: str, most: int = MESSAGE) -> str:
    """Without line ends and what else moves a terminal's cursor; of a long text the start and the end, because a value
    stands in the middle and what is accepted at the end."""
    text = "".join(c if c.isprintable() else " " for c in text.strip()) if not text.isprintable() else text
    if len(text) > most:
        text = f"{text[: most // 2 - 3]} ... {text[-most // 2 + 3 :]}"
    return text


def refused(name: str, value: Any, accepted: str) -> ValueError:
    return ValueError(one_line(f"{name}: {value!r} is not accepted; it must be {accepted}"))


def check_names(
    who: str, kind: str, given: Iterable[str], known: Collection[str], elsewhere: Mapping[str, str] | None = None
) -> None:
    """Raises TypeError, as Python does for an unexpected keyword, and names the nearest one; elsewhere: what names that
    others use are here."""
    for name in given:
        if name not in known:
            near = (elsewhere or {}).get(name) or next(iter(get_close_matches(name, known, 1, 0.7)), None)
            hint = f"did you mean {near}?" if near else f"accepted: {', '.join(known)}"
            raise TypeError(f"{who}: no {kind} {name!r}; {hint}")


def is_plain_name(name: Any) -> bool:
    """Whether it names a file or folder inside another, and nothing elsewhere."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name.encode("utf-8", "replace")) <= 200
        and not (set(name) & {"/", "\\", "\0"})
    )


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """Raises ConfigError for a file that cannot be read, is not UTF-8, or has more than `most` bytes."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > most:
        raise ConfigError(f"{path}: is not read; accepted: at most {most >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse_json(text: str) -> Any:
    """Raises Malformed, also for a name that is twice in an object."""
    return _parsed(lambda: json.loads(text, object_pairs_hook=_unique))


def parse_toml(text: str) -> Any:
    """Raises Malformed."""
    return _parsed(lambda: tomllib.loads(text))


def parse_yaml(text: str) -> Any:
    """Raises Malformed, also for anchors, aliases and tags: texts, numbers, lists and mappings are all that is read."""
    import yaml

    class Loader(yaml.SafeLoader):
        # Without dates, which stay texts, and merged mappings.
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("timestamp", "merge", "value")]
            for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            event: Any = self.peek_event()
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
                raise Malformed(f"line {line}: anchors and aliases (& and *) are not accepted")
            if event.tag is not None:
                raise Malformed(f"line {line}: tag {event.tag!r} is not accepted")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            return _unique([(self.construct_object(k, True), self.construct_object(v, True)) for k, v in node.value])

    def load() -> Any:
        try:
            return yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise Malformed(" ".join(str(error).split())) from None

    return _parsed(load)


def _parsed(parse: Callable[[], Any]) -> Any:
    try:
        value = parse()
    except Malformed:
        raise
    except RecursionError:
        raise Malformed("nested too deeply") from None
    except (ValueError, OverflowError, TypeError) as error:  # TypeError: of mappings with lists for names
        raise Malformed(str(error)) from None
    level: list[tuple[Any, Any]] = [(None, value)]
    for _ in range(DEPTH):
        inner: list[tuple[Any, Any]] = []
        for name, part in level:
            if isinstance(part, dict):
                inner.extend(part.items())
            elif isinstance(part, list):
                inner.extend((name, item) for item in part)
            elif isinstance(part, int | float) and not -LARGEST < part < LARGEST:
                raise Malformed("must be a finite number below 1e308", _field(name))
        if not inner:
            return value
        level = inner
    raise Malformed(f"nested more than {DEPTH} levels deep")


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[Any] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise Malformed(f"{twice!r} is there twice in one object", _field(twice))
    return found


def _field(name: Any) -> str | None:
    return name if isinstance(name, str) and name.isidentifier() else None


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ConfigError naming the file."""
    try:
        return parse_toml(read_text(path))
    except Malformed as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises ConfigError naming the file."""
    try:
        fields = parse_json(read_text(path))
    except Malformed as error:
        wrong = f"{error.field}: {error}" if error.field else f"not valid JSON ({error})"
        raise ConfigError(f"{path}: {wrong}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {type(fields).__name__}")
    return fields
