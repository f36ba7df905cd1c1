"""What the site has beyond docs/: the README, pages made from the code, and a page for each file that a page links to.

Links in docs/ are those of the repository, so that they work on a code host, too; here they are led to these pages.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
LINK = re.compile(r"((?:!?\[[^\]]*)?\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")  # also of a picture that is a link
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sh": "bash"}

API = {
    "Generating": ("nanoflow_jax.api.LLM", "nanoflow_jax.api.generate", "nanoflow_jax.sampling_params.SamplingParams"),
    "What comes back": (
        "nanoflow_jax.engine.request.RequestOutput",
        "nanoflow_jax.engine.request.CompletionOutput",
        "nanoflow_jax.engine.feed.Work",
        "nanoflow_jax.engine.feed.Score",
    ),
    "Several processes": ("nanoflow_jax.distributed.join", "nanoflow_jax.distributed.follow"),
}
PLANS = {
    "A plan": ("nanoflow_jax.plan.file", "nanoflow_jax.plan.plan.SchedulePlan", "nanoflow_jax.plan.file.load_plan"),
    "Predicting": ("nanoflow_jax.search.simulate.simulate_step", "nanoflow_jax.search.simulate.Simulation"),
    "Proving": ("nanoflow_jax.inspect.step.inspect_step", "nanoflow_jax.inspect.compare.compare"),
    "Measuring": ("nanoflow_jax.profile.run.profile",),
    "Figures of GPUs": ("nanoflow_jax.hardware.Hardware", "nanoflow_jax.hardware.load_hardware"),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "readme.md": (ROOT / "README.md").read_text().replace("# nanoflow_jax\n", "# The README\n", 1),
        "reference/api.md": _reference("Python", API),
        "reference/plans.md": _reference("Plans, from Python", PLANS),
        "reference/options.md": _options(),
        "reference/commands.md": _commands(),
    }
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        pages[f"notebooks/{path.stem}.md"] = _notebook(path)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    texts = {_origin(f.src_uri): f.content_string for f in files.documentation_pages()}
    linked = {target for origin, text in texts.items() for target in _links(origin, text) if _is_source(target)}
    for target in sorted(linked):
        files.append(
            File.generated(config, f"source/{target}.md", content=_source(target), inclusion=InclusionLevel.NOT_IN_NAV)
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to other files of the repository lead to their pages here."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    origin = _origin(here)

    def led(found: re.Match[str]) -> str:
        target = _resolved(origin, found[2])
        if target is None:
            return found[0]
        name = _page(target)
        return f"{found[1]}{posixpath.relpath(name, posixpath.dirname(here) or '.')}{found[3]}"

    return _outside_code(markdown, lambda text: LINK.sub(led, text))


def _origin(name: str) -> str:
    """The file of the repository that a page is made from."""
    if name == "readme.md":
        return "README.md"
    if name.startswith("notebooks/"):
        return name.removesuffix(".md") + ".ipynb"
    return f"docs/{name}"


def _page(target: str) -> str:
    """The page of a file or folder of the repository."""
    if target == "README.md":
        return "readme.md"
    if target.startswith("docs/") and (ROOT / target).is_file():
        return target.removeprefix("docs/")
    if target == "docs":
        return "index.md"
    if target.startswith("notebooks/"):
        return target.removesuffix(".ipynb") + ".md"
    return f"source/{target}.md" if target != "docs/results" else "results/README.md"


def _is_source(target: str) -> bool:
    return _page(target).startswith("source/")


def _resolved(origin: str, link: str) -> str | None:
    """The file or folder that a link of `origin` names, from the repository's root; None: there is none."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return target if not target.startswith("..") and (ROOT / target).exists() else None


def _outside_code(markdown: str, change: Any) -> str:
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def _links(origin: str, text: str) -> set[str]:
    found: set[str] = set()

    def look(part: str) -> str:
        found.update(t for m in LINK.finditer(part) if (t := _resolved(origin, m[2])) is not None)
        return part

    _outside_code(text, look)
    return found


def _fence(text: str, language: str = "text") -> str:
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}\n"


def _source(target: str) -> str:
    """A file as it is, a folder as a list of its files with their first lines. The search leaves these pages out."""
    path, unsearched = ROOT / target, "---\nsearch: {exclude: true}\n---\n"
    if not path.is_dir():
        return f"{unsearched}# {target}\n\n{_fence(path.read_text(), LANGUAGES.get(path.suffix, 'text'))}"
    files = [inner for inner in sorted(path.iterdir()) if inner.suffix in LANGUAGES]
    return f"{unsearched}# {target}/\n\n" + "\n".join(f"- `{f.name}` {_about(f)}" for f in files) + "\n"


def _about(path: Path) -> str:
    """The first line of a module's docstring, or of a file's comments."""
    lines = path.read_text().splitlines()
    first = next((line for line in lines if line.startswith(('"""', "# "))), "")
    return first.strip('#" ').replace("<", "&lt;").replace("*", r"\*")


def _reference(title: str, sections: dict[str, tuple[str, ...]]) -> str:
    parts = [f"# {title}\n\nMade from the docstrings.\n"]
    for section, names in sections.items():
        modules = {name for name in names if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
        alone = "    options: {members: [], heading_level: 3}\n"  # its docstring
        parts += [f"## {section}\n", *(f"::: {name}\n{alone if name in modules else ''}" for name in names)]
    return "\n".join(parts)


def _options() -> str:
    from nanoflow_jax.commands.options import flag
    from nanoflow_jax.options import OPTIONS, LLMOptions

    rows = []
    for name, about in OPTIONS.items():
        default = getattr(LLMOptions, name, None)
        shown = about.none or "" if default is None else f"`{default!r}`"
        text = about.help.replace("|", r"\|").replace("<", "&lt;")
        shown = shown.replace("|", r"\|")
        rows.append(f"| `{name}` | {f'`{flag(name)}`' if about.flag else ''} | {shown} | {text} |")
    head = "| option | flag | default | what it is for |\n|---|---|---|---|\n"
    return (
        "# Options of `LLM`\n\nMade from `nanoflow_jax/options.py`; the commands have the same as flags. What vLLM "
        f"calls otherwise: [comparison](../comparison.md#vllms-names).\n\n{head}" + "\n".join(rows) + "\n"
    )


def _commands() -> str:
    from nanoflow_jax.cli import make_parser

    parser = make_parser()
    parts = ["# Commands\n\nWhat `--help` prints.\n", _fence(parser.format_help())]
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        if name == "lm-eval":
            place = "../scale_out.md#lm-evaluation-harness-nanoflow-lm-eval"
            parts.append(f"## nanoflow {name}\n\nlm-evaluation-harness's own options: [more processes]({place}).\n")
            continue
        parts.append(f"## nanoflow {name}\n\n{_fence(command.format_help())}")
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                parts += [f"### nanoflow {name} {n}\n\n{_fence(c.format_help())}" for n, c in action.choices.items()]
    return "\n".join(parts)


def _notebook(path: Path) -> str:
    """Its text and code, and the outputs that are stored with it."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text + "\n")
            continue
        parts.append(_fence(text, "python"))
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                png = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="output" src="data:image/png;base64,{png}">\n')
            elif "text" in output or "text/plain" in data:
                parts.append(_fence("".join(output.get("text", data.get("text/plain", "")))))
    return "\n".join(parts)
