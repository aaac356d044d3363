"""Fixtures that every test shares: folders of its own, and the data where it is at hand."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache or keys."""
    home = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("SUANLI_CACHE", os.environ.get("SUANLI_TEST_CACHE", str(home / "cache")))
    monkeypatch.setenv("SUANLI_CONFIG", str(home / "config"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with `mnist` and `cifar10`, by SUANLI_DATA."""
    root = os.environ.get("SUANLI_DATA")
    if root and Path(root).is_dir():
        return Path(root)
    if os.environ.get("SUANLI_REQUIRE_DATA"):
        pytest.fail("SUANLI_DATA names no folder, and here the data must not be missing")
    pytest.skip("set SUANLI_DATA to a folder with mnist/ and cifar10/")
