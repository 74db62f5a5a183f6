from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.sharedray import SharedRay
from tests.tiny import save_tiny

# A busy machine is slow, which is no failure of what is tested.
settings.register_profile("safeft", deadline=None)
settings.load_profile("safeft")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has an empty cache of its own, so that no test leans on another's downloads."""
    monkeypatch.setenv("SAFEFT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of the tiny random Llama, shared and never written to."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


_SHARED = pytest.StashKey[SharedRay]()


@pytest.fixture(scope="session")
def shared_ray(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedRay]:
    shared = SharedRay(tmp_path_factory.mktemp("cache-of-ray"))
    request.config.stash[_SHARED] = shared
    yield shared
    shared.stop()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Files that need no Ray do not run beside one: idle, it takes a twentieth of a processor."""
    if nextitem is None or nextitem.path == item.path or _SHARED not in item.config.stash:
        return
    following = (one for one in item.session.items if one.path == nextitem.path)
    if not any("local_ray" in getattr(one, "fixturenames", ()) for one in following):
        item.config.stash[_SHARED].stop()


@pytest.fixture
def local_ray(shared_ray: SharedRay) -> None:
    """A Ray of two processors, which others have used before."""
    shared_ray.start()


@pytest.fixture
def no_ray(shared_ray: SharedRay) -> None:
    """This process is connected to no Ray."""
    shared_ray.stop()
