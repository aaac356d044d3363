"""Pages in a real browser: Chromium through Playwright, where both are installed."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from suanli import api_report
from suanli.base.events import Event
from suanli.base.events_log import EventsLog
from suanli.reports.html import report
from suanli.reports.html.page import LIMIT_BYTES
from suanli.reports.subjects import Subject
from tests import planted_results as planted
from tests import report_parts as parts

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome")
SIZES = {"wide": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = os.environ.get("SUANLI_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.skip("no Chromium: apt-get install chromium, or name it in SUANLI_CHROMIUM")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        yield made
        made.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of results on one page, a step of ResNet-50's size among them."""
    records = [
        parts.profile_result(300),
        parts.train_result(),
        planted.optimize_result(ceilings=parts.roof()),
        planted.doctor_result(ceilings=parts.roof()),
    ]
    target = tmp_path_factory.mktemp("pages") / "page.html"
    subjects = [Subject(record=r, source="x", history=parts.history()) for r in records]
    assert report.write(subjects, target) < LIMIT_BYTES
    return target


class Opened:
    """A page with what the browser complained of."""

    def __init__(self, browser: Any, url: str, size: str = "wide", scheme: str = "light") -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("dialog", lambda d: self.wrong.append(f"dialog: {d.message}"))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(url)

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *error: object) -> None:
        self.context.close()
        if error[0] is None:
            assert self.wrong == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_without_a_complaint(
    browser: Any, page_file: Path, size: str, scheme: str
) -> None:
    opened = Opened(browser, page_file.as_uri(), size, scheme)
    with opened as page:
        over = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(over) == 0
        seen = page.evaluate(
            "[...document.querySelectorAll('svg.drawing')].filter(s => s.getClientRects().length)"
            ".map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height,"
            " s.querySelectorAll('.mark').length])"
        )
        assert len(seen) >= 12
        assert all(w > 250 and h > 30 for w, h, _ in seen)
        assert sum(marks for _, _, marks in seen) > 300
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(20, 23, 26)") == (scheme == "dark")
        assert opened.asked == [page_file.as_uri()]  # nothing else is loaded


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: Any, page_file: Path, scheme: str) -> None:
    """Contrast of 4.5 at least between every kind of text and its paper (WCAG 2.2, 1.4.3)."""
    script = """() => {
      const light = (c) => { const v = c.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
        .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
      const paper = (e) => { for (; e; e = e.parentElement) {
        const c = getComputedStyle(e).backgroundColor;
        if (!/, 0\\)$|transparent/.test(c)) return c; } return "rgb(255,255,255)"; };
      const poor = new Set();
      const texts = "p, td, th, dt, dd, li, summary, h1, h2, h3, .t:not(.on), a";
      for (const e of document.querySelectorAll(texts)) {
        if (!e.textContent.trim() || !e.getClientRects().length) continue;
        const style = getComputedStyle(e), svg = e instanceof SVGElement;
        const a = light(svg ? style.fill : style.color), b = light(paper(e));
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const name = `${e.tagName}.${e.className.baseVal ?? e.className}`;
        if (ratio < 4.5) poor.add(`${name} ${ratio.toFixed(2)}`);
      }
      return [...poor];
    }"""
    with Opened(browser, page_file.as_uri(), scheme=scheme) as page:
        assert page.evaluate(script) == []


def test_tables_sort_filter_and_unfold(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file.as_uri()) as page:
        card = page.locator(".card", has=page.get_by_role("heading", name="Operators", exact=True))
        times = card.locator("tbody tr:visible td:nth-child(5)")
        assert times.count() == 15
        heading = card.locator("th", has_text="time")
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == "descending"
        heading.locator("button").press("Enter")
        assert heading.get_attribute("aria-sort") == "ascending"
        by = [float(cell.get_attribute("data-by")) for cell in times.all()]
        assert by == sorted(by)
        card.locator("button.more").click()
        assert card.locator("tbody tr:visible").count() == 300
        card.locator("input").fill("batch_norm")
        shown = card.locator("tbody tr:visible")
        assert 0 < shown.count() < 100
        assert all("batch_norm" in text for text in shown.all_text_contents())


def test_the_keyboard_reaches_every_mark(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file.as_uri()) as page:
        drawing = page.locator("figure", has_text="Roofline").first.locator(".wide svg")
        drawing.focus()
        seen = set()
        for _ in range(5):
            page.keyboard.press("ArrowRight")
            seen.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
            assert page.locator("#tip").is_visible()
        assert len(seen) == 5
        page.keyboard.press("End")
        assert page.evaluate("document.activeElement.matches('.mark:last-child')")
        page.keyboard.press("Escape")
        assert not page.locator("#tip").is_visible()
        page.reload()  # Tab alone comes to every picture in turn
        stops = page.locator("svg.drawing:visible").count()
        inner = "[...document.querySelectorAll('svg.drawing')].indexOf(document.activeElement)"
        reached = {-1}
        for _ in range(400):
            page.keyboard.press("Tab")
            reached.add(page.evaluate(inner))
            if len(reached) == stops + 1:
                break
        assert len(reached) == stops + 1


def test_the_timeline_zooms(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file.as_uri()) as page:
        lanes = page.locator(".lanes-inner").first
        before = lanes.bounding_box()["width"]
        page.get_by_role("button", name="Zoom in").first.click()
        assert lanes.bounding_box()["width"] == pytest.approx(2 * before, rel=0.01)
        page.get_by_role("button", name="Show all").first.click()
        assert lanes.bounding_box()["width"] == pytest.approx(before, rel=0.01)


def test_the_button_turns_the_light(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file.as_uri()) as page:
        paper = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(paper)
        page.get_by_role("button", name="Dark").click()
        assert page.evaluate(paper) != light
        page.get_by_role("button", name="Light").click()
        assert page.evaluate(paper) == light


def test_without_scripts_everything_is_there(browser: Any, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator("svg.drawing:visible").count() >= 12
    assert page.locator(".needs-script:visible").count() == 0
    assert page.locator(".card tbody tr:visible").count() > 300
    context.close()


def test_the_live_view_follows_a_search(browser: Any, tmp_path: Path) -> None:
    result = planted.optimize_result()
    with api_report.ui(tmp_path) as server:
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        with Opened(browser, server.url) as page:
            assert "key" not in page.url
            with EventsLog(tmp_path / "engine", verb="optimize", workload=parts.EVIL) as log:
                log(Event(kind="step", text="trying the first", spent_s=1.0, budget_s=60.0))
                page.get_by_role("link", name="engine").click(timeout=10_000)
                page.get_by_text("Going on: trying the first").wait_for()
                for trial in result.trials[:5]:
                    log(Event(kind="trial", text="", trial=trial))
                log(Event(kind="step", text="trying the last"))
                page.get_by_text("Going on: trying the last").wait_for(timeout=10_000)
                assert page.get_by_text("openvino int8").count() > 0
                log.finish(result)
            heading = page.get_by_role("heading", name="Confirmed at each batch size")
            heading.wait_for(timeout=10_000)
            page.goto("about:blank")
        server.close()
        thread.join(timeout=5)
