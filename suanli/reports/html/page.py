"""The page: one file without any other, which runs nothing but the script that ships with it."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from suanli import __version__
from suanli.reports.html.markup import Element, el, escaped
from suanli.reports.html.section import Section

LIMIT_BYTES = 2_000_000  # a page that is sent around must stay small


@cache
def asset(name: str, package: str = "suanli.reports.html") -> str:
    """The text of a file in the `assets/` of a package."""
    return (files(package) / "assets" / name).read_text(encoding="utf-8")


def policy(*scripts: str, style: str, live: bool = False) -> str:
    """The content security policy: these texts may run and style, nothing may be loaded.

    Args:
        *scripts: Whole texts of the inline scripts.
        style: The same of the style sheet.
        live: Whether the page may listen to the server that it came from.
    """
    allowed = " ".join(_digest(text) for text in scripts)
    server = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_digest(style)}; "
        f"connect-src {server}; base-uri 'none'; form-action 'none'"
    )


def page(sections: Sequence[Section], *, made: str = "") -> str:
    """The page of some results.

    Args:
        sections: One per result, top to bottom.
        made: When the page was made, as it is to be read.

    Returns:
        HTML.
    """
    single = len(sections) == 1
    titles = [f"{s.title} · suanli {s.verb}" for s in sections]
    head = None if single else _contents(sections)
    bodies = [
        s.body(f"result-{number}", "h1" if single else "h2")
        for number, s in enumerate(sections, start=1)
    ]
    title = titles[0] if single else f"{len(sections)} results · suanli"
    when = f" on {made}" if made else ""
    foot = f"Made by suanli {__version__}{when}. This page is one file and loads nothing."
    return document(title, [head, *bodies], foot=foot)


def document(
    title: str,
    parts: Sequence[Element | None],
    *,
    foot: str,
    more_script: str = "",
    live: bool = False,
) -> str:
    """A whole document around the parts, with the style sheet and the script in it.

    Args:
        title: Of the window.
        parts: What stands in it.
        foot: The last line.
        more_script: Text of one more script that ships.
        live: Whether it may listen to its server.
    """
    style, script = asset("page.css"), asset("page.js")
    scripts = [script, more_script] if more_script else [script]
    rules = policy(*scripts, style=style, live=live)
    body = el(
        "body",
        el("a", "To the results", href="#results", class_="skip"),
        el("div", _bar(), el("main", *parts, id="results"), _foot(foot), class_="page"),
        el("div", id="tip", role="tooltip", aria_hidden="true", hidden=True),
    )
    inline = "".join(f"<script>{text}</script>" for text in scripts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(rules)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><meta name="robots" content="noindex">'
        f"<title>{escaped(title)}</title><style>{style}</style></head>\n"
        f"{str(body).removesuffix('</body>')}{inline}</body></html>\n"
    )


def _bar() -> Element:
    return el(
        "header",
        el("div", "suanli", class_="brand"),
        el("button", "Dark", type="button", class_="theme needs-script"),
        class_="bar",
    )


def _foot(words: str) -> Element:
    return el("footer", words, class_="foot")


def _contents(sections: Sequence[Section]) -> Element:
    entries = [
        el("li", el("a", f"{s.title} ({s.verb})", href=f"#result-{number}"))
        for number, s in enumerate(sections, start=1)
    ]
    return el(
        "nav",
        el("h1", f"{len(sections)} results"),
        el("ul", *entries, class_="contents"),
        aria_label="Contents",
    )


def _digest(text: str) -> str:
    """How a policy names an inline text (Content Security Policy Level 3, 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
