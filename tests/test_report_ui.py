"""The server of results: who may ask, what for, and what it tells while work goes on."""

import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from suanli import api_report
from suanli.base import codec, events_log
from suanli.base.errors import BadInputError
from suanli.base.events import Event
from suanli.base.events_log import EventsLog
from suanli.reports.ui import listing, views
from suanli.reports.ui.server import Server
from tests import planted_results as planted
from tests import report_parts as parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    inside = root / "inside"
    inside.mkdir()
    (inside / "a<b>.json").write_text(codec.dumps(planted.optimize_result()), encoding="utf-8")
    (inside / "other.json").write_text('{"x": 1}', encoding="utf-8")
    (root / "secret.json").write_text(codec.dumps(parts.profile_result(3)), encoding="utf-8")
    (inside / "link.json").symlink_to(root / "secret.json")
    (inside / "out").symlink_to(root)
    return inside


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with api_report.ui(folder) as made:
        thread = threading.Thread(target=made.serve, daemon=True)
        thread.start()
        yield made
        made.close()
        thread.join(timeout=5)


def ask(
    server: Server, path: str, *, host: str = "", cookie: str | None = None, method: str = "GET"
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    given = f"{server.cookie}={server.key}" if cookie is None else cookie
    headers = {"Host": host or f"127.0.0.1:{server.port}", "Cookie": given}
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = dict(answer.getheaders()), answer.read().decode()
    connection.close()
    return answer.status, *found


def test_the_list_and_a_result(server: Server) -> None:
    status, headers, text = ask(server, "/")
    assert status == 200
    assert "a&lt;b&gt;.json" in text
    assert "other.json" not in text
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    (entry,) = listing.entries(server.folder)
    status, _, text = ask(server, f"/result/{entry.ident}")
    assert status == 200
    assert "Confirmed at each batch size" in text


def test_the_key_is_needed_and_leaves_the_address(server: Server) -> None:
    assert ask(server, "/", cookie="")[0] == 403
    assert ask(server, "/", cookie=f"{server.cookie}=wrong")[0] == 403
    assert ask(server, "/?key=wrong", cookie="")[0] == 403
    status, headers, _ = ask(server, f"/?key={server.key}", cookie="")
    assert (status, headers["Location"]) == (303, "/")
    assert "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "localhost:1"])
def test_other_names_are_refused(server: Server, host: str) -> None:
    status, headers, text = ask(server, f"/?key={server.key}", host=host)
    assert status == 403
    assert "Set-Cookie" not in headers
    assert "a&lt;b" not in text


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.json",
        "/result/../../secret.json",
        "/result/%2e%2e%2fsecret.json",
        "/result/" + "0" * 16,
        "/result/",
        "/live/x",
        "/etc/passwd",
        "//etc/passwd",
        "/result/out/secret.json",
    ],
)
def test_no_address_leads_out_of_the_folder(server: Server, path: str) -> None:
    status, _, text = ask(server, path)
    assert status == 404
    assert "root:" not in text


def test_links_are_not_followed(server: Server) -> None:
    names = [entry.name for entry in listing.entries(server.folder)]
    assert names == ["a<b>.json"]


def test_only_reading(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert ask(server, "/", method=method)[0] == 501


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    assert server._http.server_address[0] == "127.0.0.1"
    assert server.url.startswith("http://127.0.0.1:")


def test_what_cannot_be_served(tmp_path: Path, server: Server) -> None:
    with pytest.raises(BadInputError, match="no folder"):
        api_report.ui(tmp_path / "absent")
    with pytest.raises(BadInputError, match="cannot listen"):
        api_report.ui(tmp_path, port=server.port)
    with pytest.raises(BadInputError, match="--port"):
        api_report.ui(tmp_path, port=70000)


def first_parts(server: Server, path: str) -> list[str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    headers = {"Cookie": f"{server.cookie}={server.key}"}
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream"
    while not (line := answer.readline()).startswith(b"data: "):
        assert line
    connection.close()
    found: list[str] = json.loads(line.removeprefix(b"data: "))
    return found


def test_the_stream_sends_the_parts_of_the_page(server: Server) -> None:
    (entry,) = listing.entries(server.folder)
    sent = first_parts(server, f"/live/{entry.ident}")
    assert any("Confirmed at each batch size" in part for part in sent)
    assert any("a&lt;b&gt;.json" in part for part in first_parts(server, "/live"))


def text_of(root: Path) -> str:
    (entry,) = listing.entries(root)
    return "".join(map(str, views.result_parts(entry)))


def test_a_search_that_goes_on(tmp_path: Path) -> None:
    result = planted.optimize_result()
    with EventsLog(tmp_path / "engine", verb="optimize", workload=parts.EVIL) as log:
        log(Event(kind="step", text="trying eager", spent_s=3.0, budget_s=120.0))
        for trial in result.trials[:5]:
            log(Event(kind="trial", text="", trial=trial))
        path = events_log.path_of(tmp_path / "engine")
        while not path.exists() or len(events_log.read(path)) < 7:
            time.sleep(0.01)  # the writer has a thread of its own
        going = text_of(tmp_path)
        assert "Going on: trying eager" in going
        assert "of 120 s" in going
        assert "openvino int8" in going
        assert "<script>alert" not in going
        log.finish(result)
    done = text_of(tmp_path)
    assert "Confirmed at each batch size" in done


def test_a_training_that_was_killed(tmp_path: Path) -> None:
    path = events_log.path_of(tmp_path / "run")
    with EventsLog(tmp_path / "run", verb="train", workload="cifar10-fast") as log:
        for at in parts.history(5):
            log(Event(kind="progress", text="training", progress=at))
    lines = path.read_text(encoding="utf-8").splitlines()
    begin = json.loads(lines[0])
    begin["begin"]["pid"] = 2**22 + 1  # beyond any process
    path.write_text("\n".join([json.dumps(begin), *lines[1:-1]]), encoding="utf-8")
    said = text_of(tmp_path)
    assert "left no result" in said
    assert "<h3>Loss</h3>" in said
    assert listing.state_of(events_log.read(path)) == "broken off"


def test_a_damaged_result_is_said_and_no_more(tmp_path: Path) -> None:
    record = codec.dumps(planted.optimize_result())
    (tmp_path / "x.json").write_text(record[: len(record) // 2], encoding="utf-8")
    assert "is not JSON" in text_of(tmp_path)


def test_odd_names_and_pipes(tmp_path: Path) -> None:
    """A name in another encoding is shown as far as it is text; a pipe is no result."""
    record = codec.dumps(parts.profile_result(3))
    (tmp_path / os.fsdecode(b"caf\xe9 one.json")).write_text(record, encoding="utf-8")
    os.mkfifo(tmp_path / "pipe.events.jsonl")
    (listed,) = listing.entries(tmp_path)
    said = "".join(map(str, views.list_parts(tmp_path)))
    assert "caf\ufffd one.json" in said.encode().decode()
    assert "".join(map(str, views.result_parts(listed))).encode()


def test_events_keep_every_character(tmp_path: Path) -> None:
    """Some characters end a line for Python and not for JSON; halves of surrogates are no UTF-8."""
    odd = "a\u2028b\x85c\udce9"
    with EventsLog(tmp_path / "x", verb="optimize", workload=odd) as log:
        log(Event(kind="step", text=odd))
    lines = events_log.read(events_log.path_of(tmp_path / "x"))
    assert [line.begin is not None for line in lines] == [True, False, False]
    assert lines[-1].end is not None


def test_a_resumed_run_is_live_although_a_line_was_torn(tmp_path: Path) -> None:
    path = events_log.path_of(tmp_path / "x")
    path.write_text('{"at": 1.0, "begin": {"verb": "tra', encoding="utf-8")
    with EventsLog(tmp_path / "x", verb="train", workload="w", append=True) as log:
        log(Event(kind="step", text="again"))
        for _ in range(1000):
            if len(path.read_text(encoding="utf-8").split("\n")) >= 4:
                break
            time.sleep(0.01)
        assert listing.state_of(events_log.read(path)) == "live"


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "Nothing here yet" in "".join(map(str, views.list_parts(tmp_path)))
