"""Pages that verbs write at once with `--report`, and the limit that every page keeps to."""

from pathlib import Path

import pytest

from suanli.reports.html import page as pages
from suanli.reports.html import report
from suanli.reports.html.verbs import profile as profile_section
from suanli.reports.subjects import Subject
from tests import planted_results as planted
from tests import report_parts as parts


def test_a_page_that_would_be_too_large_leaves_the_smallest_rows_out() -> None:
    large = parts.profile_result(4000)
    text = report.html([Subject(record=large, source="x")])
    assert len(text.encode()) < pages.LIMIT_BYTES
    assert "smallest of 4,000 operators" in text
    assert "are left out to keep the page small" in text
    kept = profile_section.shortened(large, 100)
    assert kept.operators == large.operators[:100], "the longest stay"
    assert len(kept.trace) == 400
    assert [e.start_ms for e in kept.trace] == sorted(e.start_ms for e in kept.trace)
    assert profile_section.shortened(large, 4001).notes[-1:] != kept.notes[-1:]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("doctor", "--device", "cpu"), "Planted Processor"),
        (("predict", "worked-784-128-10", "--gpu", "h100-sxm"), "worked-784-128-10"),
        pytest.param(
            ("predict", "worked-784-128-10", "--choose"),
            "worked-784-128-10",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_doctor_and_predict_take_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    from suanli import api, cli

    monkeypatch.setattr(api, "doctor", lambda **_: planted.doctor_result())
    page = tmp_path / "page.html"
    assert cli._run([*arguments, "--json", "--report", str(page)]) == 0
    assert words in page.read_text(encoding="utf-8")
    assert cli._run([*arguments, "--report", str(tmp_path)]) == 2


def test_train_takes_a_report(tmp_path: Path) -> None:
    from suanli import cli

    job = tmp_path / "job.py"
    job.write_text(
        "from tests import train_parts\n\n\ndef job():\n    return train_parts.WORKLOAD\n"
    )
    page = tmp_path / "page.html"
    train = ["train", f"{job}:job", "--plan", "default", "--epochs", "2", "--device", "cpu"]
    assert cli._run([*train, "-o", str(tmp_path / "run"), "--report", str(page), "--json"]) == 0
    text = page.read_text(encoding="utf-8")
    assert "<h3>Loss</h3>" in text, "the run's own curves"
    assert "stripes" in text
