"""The page of `--html` in a browser: what it says of each op, zooming, keys, both themes, and no request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.search.simulate import Simulation, simulate_step
from nanoflow_jax.timeline.html import Shown, page, page_data
from nanoflow_jax.timeline.timeline import Timeline
from nanoflow_jax.timeline.window import window
from tests.browser import Browser

PLANS = ("nanoflow_70b", "nanoflow_70b_streams", "sequential")
HOSTILE = "</script><img src=x onerror=boom()>"


@cache
def simulated(plan: str) -> Simulation:
    model = RooflineModel(load_hardware("h200"))
    load = StepLoad(1280, 768, 1024, 1024)
    return simulate_step(load_plan(plan), model_config("llama-3.1-70b")[1], model, 8, load)


def shown(plan: str) -> Shown:
    step = simulated(plan)
    findings = [{"kind": "weight_copy", "op": "O", "count": 3, "layers": [1, 2], "detail": HOSTILE}]
    memory = {"weights": 3 * 2**30, "pages": 2**30}
    return Shown(step, step.inner, {"layer us": f"{step.inner.us:.0f}"}, findings, memory, {"notes": ["a", "b"]})


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "page.html").write_text(page([shown(plan) for plan in PLANS], f"a {HOSTILE}", "about"), encoding="utf-8")
    with Browser(folder / "profile") as browser:
        browser.open(folder / "page.html")
        yield browser
        assert not browser.errors
        assert {url.partition(":")[0] for url in browser.requested} <= {"file", "data"}


def middle(browser: Browser, panel: int, label: str, kind: str) -> tuple[float, float]:
    """Where an op is in the window."""
    x, y = browser.evaluate(
        f"""(() => {{
            const panel = panels[{panel}], box = panel.canvas.getBoundingClientRect();
            const e = panel.plan.events.find(e => e.label === "{label}" && e.kind === "{kind}");
            return [box.x + (panel.x(e.start) + panel.x(e.end)) / 2, box.y + e.lane * LANE + BAR / 2];
        }})()"""
    )
    return x, y


def told(browser: Browser, element: str) -> dict[str, str]:
    pairs = browser.evaluate(
        f"[...document.querySelectorAll('#{element} dl div')].map(d => [...d.children].map(c => c.textContent))"
    )
    return dict(pairs)


def span(browser: Browser) -> float:
    return browser.evaluate("view.to - view.from")


def test_pointing_at_a_collective_tells_what_the_report_says(browser: Browser) -> None:
    browser.mouse("mouseMoved", *middle(browser, 0, "L2/GEMV.AG.1", "collective"))
    found = told(browser, "tip")
    row = next(c for c in simulated(PLANS[0]).collectives if (c.layer, c.op) == (2, "GEMV.AG"))
    assert (found["nano-batch"], found["layer"]) == ("1", "2")
    assert found["alone"] == f"{row.predicted_us:.1f} µs"
    assert found["actual"].startswith(f"{row.actual_us:.1f} µs, ")
    assert found["bytes"] == f"{row.bytes / 2**20:.1f} MiB" or found["bytes"] == f"{row.bytes / 2**20:.2f} MiB"
    beside = [name.partition(" (")[0] for name in found["beside"].split(", ")]
    assert tuple(name for name in beside if not name.startswith("small")) == row.beside == ("L2/KQV.3", "L2/KQV.4")
    browser.mouse("mouseMoved", 5, 5)
    assert browser.evaluate("document.getElementById('tip').hidden")


def test_beside_is_the_same_on_the_page_and_in_the_report(browser: Browser) -> None:
    for number, plan in enumerate(PLANS):
        found = browser.evaluate(
            f"""panels[{number}].plan.events.filter(e => e.kind === "collective").sort((a, b) => a.start - b.start).map(
                e => beside(panels[{number}], e).map(b => b.event).filter(b => !small(b)).map(b => b.label))"""
        )
        assert [list(dict.fromkeys(labels)) for labels in found] == [
            list(c.beside) for c in simulated(plan).collectives
        ]
        assert any(found) == (plan != "sequential")


def test_zoom_by_keys_wheel_and_buttons(browser: Browser) -> None:
    browser.key("0")
    whole = max(w.end_us - w.start_us for w in (window(simulated(plan)) for plan in PLANS))
    assert span(browser) == pytest.approx(whole)
    before = browser.screenshot()
    browser.key("+")
    assert span(browser) == pytest.approx(0.7 * whole)
    assert browser.screenshot() != before
    first = browser.evaluate("view.from")
    browser.key("ArrowRight")
    assert browser.evaluate("view.from") > first and span(browser) == pytest.approx(0.7 * whole)
    browser.key("0")
    x, y = middle(browser, 0, "L2/UG.2", "gemm")
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300)
    assert span(browser) == pytest.approx(whole)  # a wheel alone scrolls the page
    browser.evaluate("scrollTo(0, 0)")
    x, y = middle(browser, 0, "L2/UG.2", "gemm")
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300, modifiers=2)
    assert span(browser) < 0.6 * whole
    assert middle(browser, 0, "L2/UG.2", "gemm")[0] == pytest.approx(x, abs=1)  # what is under the pointer stays
    browser.evaluate("document.getElementById('whole').click()")
    assert span(browser) > max(simulated(plan).timeline.us for plan in PLANS) - 1
    browser.key("0")


def test_keys_go_from_op_to_op_and_a_click_keeps_one(browser: Browser) -> None:
    browser.key("Escape")
    browser.key("n")
    first = browser.evaluate("shown.event.label")
    browser.key("n")
    second = browser.evaluate("[shown.event.label, shown.event.start]")
    assert second[0] != first and told(browser, "picked")["layer"]
    browser.key("p")
    assert browser.evaluate("shown.event.label") == first
    browser.key("0")
    place = middle(browser, 1, "L2/GEMV.1", "attention")
    browser.mouse("mouseMoved", *place)
    assert browser.evaluate("shown.event.label") == first  # what is kept stays, whatever is pointed at
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, *place, button="left", clickCount=1)
    browser.mouse("mouseMoved", 5, 5)
    assert "on the stream 1 stream" in told(browser, "picked")["what"]
    browser.key("Escape")
    assert told(browser, "picked") == {} and browser.evaluate("shown") is None


def test_tables_findings_and_memory(browser: Browser) -> None:
    rows = browser.evaluate("[...document.querySelectorAll('#plans tbody tr')].map(r => r.innerText.split('\\t'))")
    assert [row[:2] for row in rows] == [[plan, f"{simulated(plan).inner.us:.0f}"] for plan in PLANS]
    text = browser.evaluate("document.getElementById('cards').innerText")
    assert text.count(f"O: weight copy \u00d7 3 in layers 1, 2: {HOSTILE}") == len(PLANS)  # text, not markup
    assert text.count("weights 3.00 GiB") == len(PLANS)
    assert browser.evaluate("document.querySelector('h1').textContent") == f"a {HOSTILE}"
    assert browser.evaluate("document.images.length") == 0


def contrasts(browser: Browser) -> list[float]:
    """Of the texts' colours with the card behind them, as WCAG has it."""
    colors = browser.evaluate(
        "['--ink', '--soft', '--card'].map(name => getComputedStyle(document.documentElement).getPropertyValue(name))"
    )

    def luminance(color: str) -> float:
        digits = color.strip().lstrip("#")
        digits = "".join(2 * c for c in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    ink, soft, card = map(luminance, colors)
    return [(max(a, card) + 0.05) / (min(a, card) + 0.05) for a in (ink, soft)]


def test_both_themes_are_readable(browser: Browser) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    corner = "[...panels[0].canvas.getContext('2d').getImageData(400, 20, 1, 1).data]"
    light, drawn = browser.evaluate(ground), browser.evaluate(corner)
    assert min(contrasts(browser)) >= 4.5
    browser.dark()
    assert browser.evaluate(ground) != light and browser.evaluate(corner) != drawn
    assert min(contrasts(browser)) >= 4.5


def test_nothing_to_show_is_an_error() -> None:
    step = simulated("sequential")
    bare = replace(step, timeline=Timeline((), (), 0.0, 0.0, ()))
    with pytest.raises(ConfigError, match="nothing to draw"):
        page_data([Shown(bare, step.inner, {}, None, {}, {})], "")


def data_of(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=.?https?:", text)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found.group(1))


def test_simulate_and_search_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "simulate.html"
    assert main(["simulate", "--plan", "nanoflow_70b", "--compare", "sequential", "--html", str(out)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    plans = data_of(out)["plans"]
    assert [[plan["name"], *plan["figures"].values()] for plan in plans] == rows
    assert all(plan["findings"] is None for plan in plans)
    small = ["--model", "tiny", "--devices", "2", "--tokens-per-step", "512", "--workload", "constant:64:64"]
    out = tmp_path / "search.html"
    assert main(["search", *small, "--quiet", "--workers", "1", "--name", "mine", "--html", str(out)]) == 0
    plans = data_of(out)["plans"]
    assert [plan["name"] for plan in plans] == ["mine", "sequential", "two_all_reduce", "nanoflow_70b"]
    assert "\n".join(plans[0]["more"]["plan file"]).strip() == capsys.readouterr().out.strip()
    assert main(["simulate", "--html", str(tmp_path)]) == 1
    assert "--html" in capsys.readouterr().err
