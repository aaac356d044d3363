"""Fixtures that every test shares: folders of its own, and the data where it is at hand."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest


def _set_folders(patch: pytest.MonkeyPatch, factory: pytest.TempPathFactory) -> None:
    home = factory.getbasetemp()
    patch.setenv("SUANLI_CACHE", os.environ.get("SUANLI_TEST_CACHE", str(home / "cache")))
    patch.setenv("SUANLI_CONFIG", str(home / "config"))


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache or keys."""
    _set_folders(monkeypatch, tmp_path_factory)


@pytest.fixture(scope="session")
def quick_ceilings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The processor's ceilings in the tests' cache, measured in a few seconds and never again.

    Beside another test they come out rough, and each of the next verbs would measure them anew.
    """
    from suanli.base import codec
    from suanli.base.files import write_atomic
    from suanli.devices import device
    from suanli.measure import ceilings

    with pytest.MonkeyPatch.context() as patch:
        _set_folders(patch, tmp_path_factory)
        path = ceilings.cache_path(device("cpu"))
        if not path.exists():
            found = ceilings.measure_ceilings("cpu", seconds=4)
            found = replace(found, rounds=ceilings._MOST_ROUNDS)
            write_atomic(path, codec.dumps(found))


@pytest.fixture(scope="module")
def quick_search(
    quick_ceilings: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pytest.MonkeyPatch]:
    """Searches of this module race for two seconds: what they find is looked at, not how fast."""
    with pytest.MonkeyPatch.context() as patch:
        _set_folders(patch, tmp_path_factory)
        patch.setattr("suanli.engines.spending._LEAST_RACE_S", 2.0)
        patch.setattr("suanli.engines.spending._MOST_RESERVE_S", 3.0)
        patch.setattr("suanli.engines.own_module._SECONDS", 1.0)
        yield patch


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches try their plans in this process: what they find is looked at, not that it is apart.

    `test_optimize`, `test_planted_backends` and the READMEs' search have processes of their own.
    """
    from tests.workers_here import WorkerHere

    for module in ("session", "evaluate", "confirm"):
        monkeypatch.setattr(f"suanli.engines.{module}.Worker", WorkerHere)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with `mnist` and `cifar10`, by SUANLI_DATA."""
    root = os.environ.get("SUANLI_DATA")
    if root and Path(root).is_dir():
        return Path(root)
    if os.environ.get("SUANLI_REQUIRE_DATA"):
        pytest.fail("SUANLI_DATA names no folder, and here the data must not be missing")
    pytest.skip("set SUANLI_DATA to a folder with mnist/ and cifar10/")


@pytest.fixture(scope="session")
def measured() -> Path:
    """Folder with `measured`, the published measurements, by SUANLI_DATA."""
    root = os.environ.get("SUANLI_DATA")
    if root and (Path(root) / "measured").is_dir():
        return Path(root)
    if os.environ.get("SUANLI_REQUIRE_DATA"):
        pytest.fail("SUANLI_DATA names no folder with measured/, and here it must not be missing")
    pytest.skip("set SUANLI_DATA to a folder with measured/")
