"""Settings for all tests, and the one build of llama.cpp that is made for those that need it.

Hypothesis judges results, not the speed of a busy machine. No test sees the builds of the user who runs it.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "steady", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("steady")

_NO_BUILDS = tempfile.TemporaryDirectory(prefix="step35-data-")
os.environ["XDG_DATA_HOME"] = _NO_BUILDS.name
os.environ.pop("LLAMA_CPP_LIB_PATH", None)

_BACKEND = "our_backend_folder"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the tests that need the build last, and starts to make it meanwhile."""
    items.sort(key=_needs_backend)
    if any(map(_needs_backend, items)) and not config.option.collectonly:
        import our_backend

        started = our_backend.start()
        config.stash[_STARTED] = started
        config.add_cleanup(lambda: (started.terminate(), started.communicate()))


_STARTED = pytest.StashKey()


def _needs_backend(item: pytest.Item) -> bool:
    return _BACKEND in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def our_backend_folder(pytestconfig: pytest.Config) -> Iterator[Path]:
    """The folder of a build with our patches."""
    import our_backend

    yield our_backend.folder_of(pytestconfig.stash[_STARTED])
