"""Pages of results: nothing in them can become markup, every picture has its table, sizes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from suanli import api_report
from suanli.base import codec, events_log, schema
from suanli.base.errors import BadInputError
from suanli.base.events import Event
from suanli.base.events_log import EventsLog
from suanli.base.plan import Plan
from suanli.base.trial import Trial, ValueCheck
from suanli.reports import subjects
from suanli.reports.html import page as pages
from suanli.reports.html import report
from suanli.reports.html.drawing import cut, cut_left
from suanli.reports.html.markup import el
from suanli.reports.html.pictures.curves import Moment, thinned
from suanli.reports.html.pictures.timeline import Slice, merged
from suanli.reports.html.scales import Linear, Log, linear_around, linear_to, log_around
from suanli.reports.html.verbs import trials as trial_parts
from suanli.reports.subjects import Subject
from tests import planted_results as planted
from tests import report_parts as parts

ATTRIBUTES = {"onerror", "onclick", "onload", "style", "src", "srcdoc"}


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "input", "br", "hr", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def every_record() -> list[Any]:
    return [
        parts.profile_result(40),
        parts.train_result(),
        planted.optimize_result(ceilings=parts.roof()),
        planted.doctor_result(),
    ]


@pytest.fixture(scope="module")
def whole() -> str:
    given = [Subject(record=r, source="x", history=parts.history()) for r in every_record()]
    return report.html(given)


# -- names of an attacker -------------------------------------------------------------------------


def test_no_name_becomes_markup(whole: str) -> None:
    page = Page(whole)
    assert page.open == []
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not ATTRIBUTES & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "</script><script>alert(1)" in "".join(page.text)  # shown, as text


def test_nothing_is_loaded_and_only_our_script_runs(whole: str) -> None:
    assert "http-equiv" in whole
    (rules,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', whole)
    assert "default-src &#39;none&#39;" in rules
    assert "unsafe" not in rules
    assert "connect-src &#39;none&#39;" in rules
    links = [value or "" for name, value in Page(whole).attributes if name in ("href", "action")]
    assert all(link.startswith("#") for link in links)
    assert "url(" not in whole.split("</style>", maxsplit=1)[0]
    assert "@import" not in whole


def test_the_policy_names_the_script_as_it_stands(whole: str) -> None:
    import base64
    import hashlib

    script = re.findall(r"<script>(.*?)</script>", whole, re.DOTALL)[-1]
    style = re.findall(r"<style>(.*?)</style>", whole, re.DOTALL)[0]
    for text in (script, style):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"sha256-{digest}" in whole


@pytest.mark.parametrize(
    ("tag", "attributes"),
    [
        ("script", {}),
        ("style", {}),
        ("a b", {}),
        ("a", {"onclick": "x"}),
        ("a", {"style": "x"}),
        ("img", {"src": "x"}),
        ("a", {"href": "javascript:alert(1)"}),
        ("a", {"href": "https://example.org"}),
        ("a", {"href": "//example.org"}),
        ("a", {"x y": "z"}),
    ],
)
def test_markup_refuses_what_a_page_may_not_have(tag: str, attributes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"no |leads"):
        el(tag, **attributes)


def test_unseen_characters_are_shown() -> None:
    assert "\u202e" not in str(el("p", "a\u202eb\x00c"))
    assert str(el("p", "a\u202eb")) == "<p>a\ufffdb</p>"
    hidden = str(el("p", "a\u200b\ufeff\u2028b", title="caf\udce9"))
    assert hidden.encode().decode() == '<p title="caf\ufffd">a\ufffd\ufffd\ufffdb</p>'
    assert str(el("p", title='"><b>')) == '<p title="&quot;&gt;&lt;b&gt;"></p>'


# -- what a page shows ----------------------------------------------------------------------------


def test_every_picture_has_its_table(whole: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", whole, re.DOTALL)
    assert len(figures) >= 10
    for figure in figures:
        assert "<table" in figure, figure[:300]
        assert "<h3>" in figure


def test_every_mark_says_what_it_is(whole: str) -> None:
    marks = re.findall(r'<g class="mark[^>]*>', whole)
    assert len(marks) > 200
    for mark in marks:
        assert re.search(r'aria-label="[^"]+"', mark)
        assert 'tabindex="-1"' in mark


def test_a_profile_shows_its_parts() -> None:
    result = parts.profile_result(40)
    text = report.html([Subject(record=result, source="x")])
    for words in (
        "Roofline",
        "Timeline of one step",
        "From the measured step down to the limit",
        "Memory by kind",
        "What to change first",
        "run the products in bf16",
        "failed: out of memory",
        "garbage collection",
    ):
        assert words in text


def test_a_profile_with_nothing_optional_still_gives_a_page() -> None:
    result = parts.profile_result(
        3, sol=None, lost=(), advice=(), memory=None, profiler=None, ceilings=(), trace=()
    )
    text = report.html([Subject(record=result, source="x")])
    assert "Roofline" not in text
    assert "No change is known" in text


def test_figures_that_no_measurement_gives_are_refused() -> None:
    no_time = parts.profile_result(3, step_ms=planted.estimate(0.0))
    peak = replace(no_time.ceilings[0], what="matmul", dtype="fp32", hardware=1e308)
    endless = parts.profile_result(3, ceilings=(peak, *no_time.ceilings))
    for odd in (no_time, endless):
        with pytest.raises(BadInputError, match="holds figures that cannot be shown"):
            report.html([Subject(record=odd, source="odd.json")])


def test_a_busy_machine_is_said() -> None:
    loaded = replace(planted.ENVIRONMENT, load_average=7.5)
    for result in (parts.profile_result(3, environment=loaded), parts.train_result()):
        text = report.html([Subject(record=result, source="x")])
        assert ("The machine was busy (load 7.5 on 2 cores)" in text) == (
            result.environment == loaded
        )


def test_a_run_without_its_folder_has_no_curves() -> None:
    text = report.html([Subject(record=parts.train_result(), source="x")])
    assert "<h3>Loss</h3>" not in text
    with_course = Subject(record=parts.train_result(), source="x", history=parts.history())
    assert "<h3>Loss</h3>" in report.html([with_course])
    assert "target 90.83\u00a0%" in report.html([with_course])


def test_a_large_profile_stays_small() -> None:
    """ResNet-50's step has about 300 operator calls in training; here are 600, all of them."""
    size = len(report.html([Subject(record=parts.profile_result(600), source="x")]).encode())
    assert size < pages.LIMIT_BYTES


def test_reasons_of_rejected_trials_are_there() -> None:
    text = report.html([Subject(record=planted.optimize_result(), source="x")])
    assert "channel 7 is off by [red]1\u00a0%[/red]" in text
    assert "RuntimeError: [bold]no[/bold] tiles" in text


def test_the_front_holds_only_what_nothing_beats() -> None:
    def trial(step: float, error: float, status: str = "verified") -> Trial:
        values = ValueCheck(ok=True, k=2.0, relative_rms=error)
        plan = Plan(backend="eager", threads=int(step * 10))
        return Trial(plan=plan, status=status, step_ms=planted.estimate(step), values=values)  # type: ignore[arg-type]

    tried = [trial(1, 1e-2), trial(2, 1e-3), trial(3, 5e-3), trial(0.5, 0.9, "rejected")]
    front = trial_parts._front(tried, by_quality=False)
    assert front == [(1, 1e-2), (2, 1e-3)]


# -- scales and thinning --------------------------------------------------------------------------


def test_scales() -> None:
    assert Linear(0, 10)(2.5) == 0.25
    assert Linear(0, 10)(99) == 1.0
    assert Linear(0, 1).ticks(5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert Log(1, 100)(10) == pytest.approx(0.5)
    assert Log(1, 1000).ticks(4) == [1, 10, 100, 1000]
    assert Log(20, 60).ticks(5) == [20.0, 30.0, 40.0, 50.0, 60.0]
    for scale in (linear_to([]), linear_around([]), linear_around([3.0]), log_around([])):
        assert scale.high > scale.low
    assert log_around([5.0], 4).high / log_around([5.0], 4).low >= 4


def test_thinning_keeps_the_extremes() -> None:
    moments = [Moment(x=float(i), y=100.0 if i == 777 else float(i % 7)) for i in range(5000)]
    thin = thinned(moments)
    assert len(thin) < 300
    assert max(m.y for m in thin) == 100.0
    assert thin[-1] is moments[-1]
    assert [m.x for m in thin] == sorted(m.x for m in thin)


def test_short_slices_are_merged_and_counted() -> None:
    def piece(begin: float, end: float, kind: str) -> Slice:
        return Slice(name="x", begin_ms=begin, end_ms=end, kind=kind)

    short = [piece(i * 0.01, i * 0.01 + 0.009, "c0") for i in range(10)]
    found = merged([*short, piece(1, 5, "c0"), piece(6, 6.001, "c1")], 0.5)
    assert [s.name for s in found] == ["10 short operators", "x", "x"]
    assert found[0].end_ms == pytest.approx(0.099)


def test_cutting_names() -> None:
    assert cut("abcdefghijkl", 40) == "abcde…"
    assert cut_left("abcdefghijkl", 40) == "…hijkl"
    assert cut("abc", 400) == "abc"


# -- reading --------------------------------------------------------------------------------------


def test_every_verb_with_a_report_is_read_back(tmp_path: Path) -> None:
    for record in every_record():
        path = tmp_path / f"{record.verb}.json"
        path.write_text(codec.dumps(record), encoding="utf-8")
        assert subjects.read(path).record == record
        assert subjects.schema_of(path) == record.schema.name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no result"),
        ('{"schema": {"name": "suanli.run", "version": 1}}', "has no report"),
        ('{"schema": {"name": "suanli.optimize", "version": 9}}', "version 9"),
        ('{"schema": {"name": "suanli.optimize", "version": 1}}', "not a OptimizeResult"),
        ('{"schema": {"name": "suanli.error", "version": 1}, "error": "no"}', "failed: no"),
    ],
)
def test_what_is_no_result_is_said(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInputError, match=says):
        subjects.read(path)


def test_a_run_is_read_with_its_course(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}", encoding="utf-8")
    (run / "plan.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BadInputError, match="no result yet"):
        subjects.read(run)
    record = codec.to_json(parts.train_result()) | {"loss": None}  # NaN has no word in JSON
    (run / "result.json").write_text(json.dumps(record), encoding="utf-8")
    lines = [json.dumps(codec.to_json(at)) for at in parts.history(20)]
    (run / "metrics.jsonl").write_text(
        "\n".join(
            [*lines, '{"torn'],
        ),
        encoding="utf-8",
    )
    found = subjects.read(run)
    assert len(found.history) == 20
    assert "<h3>Loss</h3>" in report.html([found])


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no engine and no run"):
        subjects.read(tmp_path)
    with pytest.raises(BadInputError, match="no file or folder"):
        subjects.read(tmp_path / "absent")


# -- events ---------------------------------------------------------------------------------------


def test_events_are_kept_with_the_result(tmp_path: Path) -> None:
    heard: list[Event] = []
    result = planted.optimize_result()
    with EventsLog(tmp_path / "e", verb="optimize", workload="w", listener=heard.append) as log:
        log(Event(kind="step", text="begin"))
        log(Event(kind="trial", text="", trial=result.trials[0]))
        log.finish(result)
    assert [event.kind for event in heard] == ["step", "trial"]
    path = events_log.path_of(tmp_path / "e")
    with path.open("a", encoding="utf-8") as file:
        file.write('{"at": 1, "ev')  # a killed process
    lines = events_log.read(path)
    assert [bool(x.begin) for x in lines] == [True, False, False, False]
    assert lines[2].event is not None
    assert lines[2].event.trial == result.trials[0]
    assert lines[-1].end is not None
    assert lines[-1].end.state == "done"
    assert subjects.read(path).record == result


def test_events_say_how_it_ended(tmp_path: Path) -> None:
    def ended(error: BaseException) -> tuple[str, str]:
        with pytest.raises(type(error)), EventsLog(tmp_path / "e", verb="v", workload="w") as log:
            log(Event(kind="step", text="begin"))
            raise error
        end = events_log.read(events_log.path_of(tmp_path / "e"))[-1].end
        assert end is not None
        return end.state, end.error

    assert ended(KeyboardInterrupt()) == ("stopped", "")
    assert ended(ValueError("a\nb")) == ("failed", "a b")


def test_what_is_refused_before_any_work_leaves_earlier_events_alone(tmp_path: Path) -> None:
    path = events_log.path_of(tmp_path / "e")
    path.write_text("earlier", encoding="utf-8")
    with pytest.raises(ValueError), EventsLog(tmp_path / "e", verb="v", workload="w"):
        raise ValueError
    assert path.read_text(encoding="utf-8") == "earlier"


def test_events_that_cannot_be_kept_are_said_once(tmp_path: Path) -> None:
    heard: list[Event] = []
    (tmp_path / "file").write_text("", encoding="utf-8")
    target = tmp_path / "file" / "e"
    with EventsLog(target, verb="v", workload="w", listener=heard.append) as log:
        for _ in range(3):
            log(Event(kind="step", text="x"))
    assert [event.kind for event in heard] == ["step", "step", "step", "note"]
    assert "not kept" in heard[-1].text


# -- the verb -------------------------------------------------------------------------------------


def test_report_writes_one_page_of_several_results(tmp_path: Path) -> None:
    one = tmp_path / "one.json"
    one.write_text(codec.dumps(planted.optimize_result()), encoding="utf-8")
    found = api_report.report([one, parts.profile_result(5)], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert found.size_bytes == len(text.encode())
    assert len(found.results) == 2
    assert 'href="#result-2"' in text
    import jsonschema

    jsonschema.validate(codec.to_json(found), json.loads(schema.text("report")))


def test_a_page_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    for target, says in ((tmp_path, "is a folder"), (tmp_path / "x.txt", "must end in")):
        with pytest.raises(BadInputError, match=says):
            api_report.report([parts.profile_result(3)], target)
    with pytest.raises(BadInputError, match="needs a result"):
        api_report.report([], tmp_path / "x.html")


def test_the_command(tmp_path: Path) -> None:
    source = tmp_path / "profile.json"
    source.write_text(codec.dumps(parts.profile_result(5)), encoding="utf-8")
    program = (
        "import sys; from suanli.reports.html import report; from suanli.reports import subjects; "
        "from pathlib import Path; "
        "report.write([subjects.read(Path(sys.argv[1]))], Path(sys.argv[2])); "
        "assert 'torch' not in sys.modules"
    )
    page = tmp_path / "page.html"
    subprocess.run([sys.executable, "-c", program, str(source), str(page)], check=True)
    assert page.stat().st_size > 10_000


def test_optimize_takes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from suanli import api, cli

    monkeypatch.setattr(api, "optimize_workload", lambda *a, **k: planted.optimize_result())
    page = tmp_path / "page.html"
    assert cli._run(["optimize", "resnet50", "--json", "--report", str(page)]) == 0
    assert "over the best baseline" in page.read_text(encoding="utf-8")
    assert cli._run(["optimize", "resnet50", "--report", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_an_engine_gives_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from suanli.engines import manifest as manifests
    from suanli.reports import engine_numbers

    result = planted.optimize_result()
    numbers = manifests.Numbers(
        baseline=result.baseline,
        chosen=result.chosen,
        speedup_vs_eager=result.speedup_vs_eager,
        speedup_vs_best_baseline=result.speedup_vs_best_baseline,
        confirmations=result.confirmations,
        sol=result.sol,
    )

    class Known:
        name, device, environment = "net", result.device, result.environment
        max_batch, notes = 32, ()

        def __init__(self, numbers: manifests.Numbers) -> None:
            self.numbers = numbers

    monkeypatch.setattr(engine_numbers, "read_manifest", lambda folder: (Known(numbers), b""))
    assert engine_numbers.result_of_engine(tmp_path).chosen == result.chosen
    bare = Known(replace(numbers, chosen=None))
    monkeypatch.setattr(engine_numbers, "read_manifest", lambda folder: (bare, b""))
    with pytest.raises(BadInputError, match="no measurements"):
        engine_numbers.result_of_engine(tmp_path)
