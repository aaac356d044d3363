"""HTML and SVG as a tree in which text can only ever be text.

Names of modules, plans and reasons come from whoever wrote the model. Nothing here takes finished
markup, so there is no place at which one of them could become a tag, an attribute or a script.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Child = "Element | str | None"
Value = str | int | float | bool | None

_VOID = {"meta", "br", "input", "hr", "link"}
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")
# C0 and C1 controls, and the marks that turn the direction of what follows: a name may not
# change how its neighbours read (Unicode Technical Report 36, 2.10). What has no width hides in a
# name; halves of surrogates, which names of files in another encoding hold, are no text at all.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ufeff\ud800-\udfff]"
)
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}
_SPECIAL = re.compile("[&<>\"']")


@dataclass(frozen=True)
class Element:
    """A tag with its attributes and children; made by `el`."""

    tag: str
    attributes: tuple[tuple[str, Value], ...]
    children: tuple["Element | str", ...]

    def __str__(self) -> str:
        """The markup."""
        return "".join(_pieces(self))


@dataclass(frozen=True)
class Asset:
    """The text of a file that ships with the package, for `<style>` and `<script>` only."""

    text: str


def el(tag: str, *children: "Element | str | None", **attributes: Value) -> Element:
    """An element.

    Args:
        tag: Its name.
        *children: Elements, and text that is shown as it is. None is left out.
        **attributes: `class_` is "class", `aria_label` is "aria-label". None and False are left
            out, True is an attribute without a value.

    Raises:
        ValueError: The tag or an attribute is none that a page may have: a script, an event
            handler, an inline style, or a link that leads out of the page.
    """
    named = tuple((_attribute(name), value) for name, value in attributes.items())
    if not _NAME.fullmatch(tag) or tag in ("script", "style"):
        raise ValueError(f"no element {tag!r} here")
    for name, value in named:
        if name.startswith("on") or name in ("style", "srcdoc", "src"):
            raise ValueError(f"no attribute {name!r} here")
        if name == "href" and not re.match(r"#|/([\w-]|$)", str(value)):
            raise ValueError(f"a link leads within the page, not to {value!r}")
    return Element(tag, named, tuple(child for child in children if child is not None))


def group(children: Iterable["Element | str | None"], **attributes: Value) -> Element:
    """An SVG group of marks."""
    return el("g", *children, **attributes)


def text(value: str) -> str:
    """What is shown of a text: the unseen becomes a replacement mark, and % never wraps."""
    return _UNSEEN.sub("\ufffd", value).replace(" %", "\u00a0%")


def escaped(value: str) -> str:
    """Text as it stands in markup, between tags or within quotes."""
    return _SPECIAL.sub(lambda found: _ESCAPES[found[0]], text(value))


def _attribute(name: str) -> str:
    plain = name.rstrip("_").replace("_", "-")
    if not _NAME.fullmatch(plain):
        raise ValueError(f"no attribute {name!r} here")
    return plain


def _pieces(node: "Element | str") -> Iterator[str]:
    if isinstance(node, str):
        yield escaped(node)
        return
    yield f"<{node.tag}"
    for name, value in node.attributes:
        if value is None or value is False:
            continue
        yield f" {name}" if value is True else f' {name}="{escaped(_shown(value))}"'
    yield ">"
    if node.tag in _VOID:
        return
    for child in node.children:
        yield from _pieces(child)
    yield f"</{node.tag}>"


def _shown(value: Value) -> str:
    """A coordinate to a hundredth of a pixel, everything else as it is."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
    return str(value)
