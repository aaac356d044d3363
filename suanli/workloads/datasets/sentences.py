"""English sentences that are on every machine: the documentation inside Python's own library."""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from suanli.base.errors import BadInputError

_MODULES = (
    *("argparse", "asyncio.tasks", "calendar", "collections", "configparser", "csv", "datetime"),
    *("difflib", "doctest", "email.message", "ftplib", "functools", "gettext", "heapq", "imaplib"),
    *("http.client", "http.cookiejar", "inspect", "ipaddress", "json.encoder", "locale"),
    *("logging", "mailbox", "mimetypes", "optparse", "os", "pathlib", "pdb", "pickle", "platform"),
    *("random", "sched", "selectors", "shutil", "smtplib", "socket", "sqlite3.dbapi2", "ssl"),
    *("statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading"),
    *("timeit", "tokenize", "trace", "turtle", "typing", "unittest.case", "unittest.mock"),
    *("urllib.parse", "urllib.request", "uuid", "warnings", "wave", "weakref", "zipfile"),
)
_SIZES = (256, 256, 512)
_SEED = 26


@cache
def read_sentences() -> tuple[list[str], list[str], list[str]]:
    """Training (256), search (256) and acceptance (512) sentences, by a fixed permutation.

    Which ones they are depends on the version of Python.

    Raises:
        BadInputError: This Python carries no sources.
    """
    found: dict[str, None] = {}
    for name in _MODULES:
        for text in _documentation(name):
            found.update(dict.fromkeys(_sentences(text)))
    sentences = list(found)
    if len(sentences) < sum(_SIZES):
        raise BadInputError(f"only {len(sentences)} sentences in this Python's library")
    order = np.random.default_rng(_SEED).permutation(len(sentences))
    edges = np.cumsum((0, *_SIZES))
    train, search, acceptance = (
        [sentences[i] for i in order[edges[k] : edges[k + 1]]] for k in range(3)
    )
    return train, search, acceptance


def _documentation(name: str) -> list[str]:
    try:
        spec = find_spec(name)
    except ImportError:
        return []
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return []
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in texts if text]


def _sentences(text: str) -> list[str]:
    plain = " ".join(text.split())
    pieces = re.split(r"(?<=[.!?])\s+(?=[A-Z])", plain)
    return [piece for piece in pieces if re.fullmatch(r"[A-Z][\w ,;:'()\-/]{30,200}[.!?]", piece)]
