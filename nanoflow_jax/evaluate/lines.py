"""Lines of a file of any size, in bounded memory: reading them, and remembering which are done and which ids came."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanoflow_jax.config import ConfigError

MAX_LINE_BYTES = 4 * 2**20  # a prompt of 131,072 tokens, written as ids or as escaped text, takes less
_CHUNK = 2**20
_DIGEST = 16  # bytes kept of each chunk's


@dataclass(frozen=True)
class Line:
    """One line, without its end. problem: why it could not be read; `data` is then empty."""

    number: int  # from 1
    data: bytes
    problem: str | None = None


def read_lines(path: Path, max_bytes: int = MAX_LINE_BYTES, identity: FileIdentity | None = None) -> Iterator[Line]:
    """The lines of a file; "\\n" or "\\r\\n" end one, the last needs none. A byte order mark at the beginning is left
    out. A line longer than `max_bytes` is passed over and told as a problem.

    identity  of the file when it was identified: no line of another content is given. Raises ConfigError
    """
    with open(path, "rb") if identity is None else io.BufferedReader(_Checked(path, identity), _CHUNK) as file:
        file.seek(3 if file.read(3) == b"\xef\xbb\xbf" else 0)
        number = 0
        while data := file.readline(max_bytes + 2):
            number, length = number + 1, len(data)
            if not data.endswith(b"\n"):
                while rest := file.readline(_CHUNK):
                    length += len(rest)
                    if rest.endswith(b"\n"):
                        break
            if length > max_bytes + 2 or len(data.rstrip(b"\r\n")) > max_bytes:
                yield Line(number, b"", f"the line has {length} bytes; accepted: at most {max_bytes}")
            else:
                yield Line(number, data.rstrip(b"\r\n"))


@dataclass(frozen=True)
class FileIdentity:
    """size in bytes, lines, and sha256 of the contents. chunks: digests of their MiBs, one after another."""

    size: int
    lines: int
    sha256: str
    chunks: bytes = field(default=b"", repr=False, compare=False)


def identify(path: Path) -> FileIdentity:
    """Reads the file once. Raises OSError."""
    digest, size, lines, last, chunks = hashlib.sha256(), 0, 0, b"\n", bytearray()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            chunks += _digest(chunk)
            size += len(chunk)
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    bom_only = size == 3 and digest.digest() == hashlib.sha256(b"\xef\xbb\xbf").digest()
    return FileIdentity(size, lines + (last != b"\n" and not bom_only), digest.hexdigest(), bytes(chunks))


def _digest(chunk: bytes) -> bytes:
    return hashlib.blake2b(chunk, digest_size=_DIGEST).digest()


class _Checked(io.RawIOBase):
    """A file that gives no byte which it did not have when it was identified. Raises ConfigError."""

    def __init__(self, path: Path, identity: FileIdentity):
        self._path, self._identity, self._file = path, identity, open(path, "rb", buffering=0)  # noqa: SIM115
        self._position, self._index, self._chunk = 0, -1, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        assert whence == io.SEEK_SET
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        index, at = divmod(self._position, _CHUNK)
        if index != self._index:
            self._index, self._chunk = index, self._read(index)
        part = self._chunk[at : at + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _read(self, index: int) -> bytes:
        self._file.seek(index * _CHUNK)
        chunk = b""
        while len(chunk) < _CHUNK and (more := self._file.read(_CHUNK - len(chunk))):
            chunk += more
        known = self._identity.chunks[index * _DIGEST : (index + 1) * _DIGEST]
        if (_digest(chunk) if chunk else b"") != known:
            raise ConfigError(
                f"--input: {self._path} was changed during the run, after byte {index * _CHUNK}; the results so far "
                "are kept: put the file back and start again, or go on with the changed one by --allow-changed"
            )
        return chunk


class NumberSet:
    """A set of whole numbers from 0, one bit each: 1.25 MB for ten million."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def add(self, number: int) -> bool:
        """False when it was there."""
        at, bit = number >> 3, 1 << (number & 7)
        if at >= len(self._bits):
            self._bits.extend(bytes(max(at + 1 - len(self._bits), len(self._bits) // 2, 1024)))
        if self._bits[at] & bit:
            return False
        self._bits[at] |= bit
        self._count += 1
        return True

    def __contains__(self, number: int) -> bool:
        at = number >> 3
        return at < len(self._bits) and bool(self._bits[at] & (1 << (number & 7)))

    def __len__(self) -> int:
        return self._count


class TextSet:
    """Which texts came before, by 64-bit digest: 8 bytes each, beside a few thousand recent ones in a Python set.

    Two of ten million different texts share a digest with a probability of 3 in a million; the later one is then taken
    for known.
    """

    RECENT = 4096

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._runs: list[np.ndarray] = []  # sorted, each at least twice as long as the next

    def add(self, text: str) -> bool:
        """False when it was there."""
        data = text.encode("utf-8", "surrogatepass")
        digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        if digest in self._recent or any(_holds(run, digest) for run in self._runs):
            return False
        self._recent.add(digest)
        if len(self._recent) == self.RECENT:
            self._settle()
        return True

    @property
    def nbytes(self) -> int:
        """Of the sorted runs."""
        return sum(run.nbytes for run in self._runs)

    def _settle(self) -> None:
        run = np.sort(np.fromiter(self._recent, np.uint64, len(self._recent)))
        self._recent.clear()
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]))
        self._runs.append(run)


def _holds(run: np.ndarray, digest: int) -> bool:
    at = int(run.searchsorted(np.uint64(digest)))
    return at < len(run) and int(run[at]) == digest
