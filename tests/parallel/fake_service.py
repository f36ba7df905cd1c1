"""JAX's coordination service in memory, for tests of what is built on it."""

from __future__ import annotations

import threading

import jax


class FakeService:
    """The calls of jaxlib's client that the library uses, with what they do in jaxlib 0.11.2."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.reachable = True
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        self._reach()
        with self._changed:
            if key in self.values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: Config key {key} already exists.")
            self.values[key] = value
            self._changed.notify_all()

    def key_value_increment(self, key: str, by: int) -> int:
        self._reach()
        self.values[key] = str(int(self.values.get(key, 0)) + by)
        return int(self.values[key])

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        self._reach()
        return sorted((key, value) for key, value in self.values.items() if key.startswith(folder))

    def key_value_delete(self, key: str) -> None:
        for name in [name for name in self.values if name == key or name.startswith(key)]:
            del self.values[name]

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: GetKeyValue() timed out with key: {key}")
            return self.values[key]

    def _reach(self) -> None:
        if not self.reachable:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")
