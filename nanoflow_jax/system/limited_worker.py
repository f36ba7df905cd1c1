"""Templates and regular expressions of others, in a process that may be ended: `nanoflow_jax.system.limited` starts it.

Reads a JSON object per line from standard input, does what it asks, and answers with {"found": ...} or {"error": ...}
on standard output. A piece of work that takes more processor time than the program's argument says (seconds) ends the
process; one that takes more than MEMORY fails. Imports nothing of this project: it is started by its path.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from functools import cache
from typing import Any

MEMORY = 2 * 2**30  # bytes of address space, libraries included


@cache
def _template(text: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)


def render(template: str, fields: dict[str, Any]) -> str:
    """A task's template over the fields of a document."""
    return _template(template).render(**fields)


def chat(template: str, messages: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """A conversation as transformers renders it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts: Any = render_jinja_template(conversations=[messages], chat_template=template, **settings)
    return texts[0][0]


def groups(regex: str) -> int:
    return re.compile(regex).groups


def find(regex: str, text: str, group: int, last: bool) -> str | None:
    """The first or last match, or its group."""
    found = None
    for match in re.finditer(regex, text):
        found = match[group]
        if not last:
            break
    return found


WORK = {"render": render, "chat": chat, "groups": groups, "find": find}


def _answer(job: dict[str, Any], seconds: float) -> dict[str, Any]:
    if job["do"] == "chat":
        import transformers.utils.chat_template_utils  # noqa: F401 - takes longer than a template may

    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signal ends the process
        return {"found": WORK[job.pop("do")](**job)}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 30} GiB of memory"}
    except Exception as error:  # whatever it does wrong
        told = str(error) or "failed"
        return {"error": told if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: {told}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with whoever started it
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = sys.stdout
    sys.stdout = sys.stderr  # for what libraries print
    for line in sys.stdin.buffer:
        try:
            answer = json.dumps(_answer(json.loads(line), float(sys.argv[1])))
        except MemoryError:
            answer = json.dumps({"error": "what it makes is too large"})
        out.write(answer + "\n")
        out.flush()


if __name__ == "__main__":
    main()
