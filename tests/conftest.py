"""Settings for all tests, and the one build of llama.cpp that is made for those that need it.

Hypothesis judges results, not the speed of a busy machine. No test sees the builds of the user who runs it.
"""

import ast
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "steady", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.register_profile("quick", settings.get_profile("steady"), max_examples=10)
settings.load_profile("quick" if "--quick" in sys.argv else "steady")

_NO_BUILDS = tempfile.TemporaryDirectory(prefix="step35-data-")
os.environ["XDG_DATA_HOME"] = _NO_BUILDS.name
os.environ.pop("LLAMA_CPP_LIB_PATH", None)

_BACKEND = "our_backend_folder"


TESTS = Path(__file__).parent
NOT_QUICK = {"torch", "transformers", "tokenizers", "selenium", "openai", "anthropic", "schemathesis", "matplotlib"}
NOT_QUICK |= {"live_server", "our_backend", "tiny_model", "upstream"}
"""What a quick test does without: big libraries, a server's process, upstream's programs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="Every folder in under a minute; see NOT_QUICK.")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out, with --quick, the files that import what is not quick, themselves or by a helper."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if config.getoption("--quick") and is_test and _needs(collection_path) & NOT_QUICK else None


@cache
def _needs(path: Path) -> frozenset[str]:
    """Returns the top-level modules that a file of the tests imports, inside functions too, and those of its helpers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            found |= {name.partition(".")[0]} | _needs_of_helper(name)
    return frozenset(found)


def _needs_of_helper(name: str) -> frozenset[str]:
    places = (TESTS / f"{name.replace('.', '/')}.py", TESTS / "support" / f"{name}.py")
    return next((_needs(place) for place in places if place.is_file()), frozenset())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the tests that need the build last, and starts to make it meanwhile; leaves slow ones out of a quick run."""
    if config.getoption("--quick"):
        slow = [item for item in items if item.get_closest_marker("slow") or _needs_backend(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    items.sort(key=_needs_backend)
    if any(map(_needs_backend, items)) and not config.option.collectonly:
        import our_backend

        started = our_backend.start()
        config.stash[_STARTED] = started
        config.add_cleanup(lambda: our_backend.stop(started))


_STARTED = pytest.StashKey()


def _needs_backend(item: pytest.Item) -> bool:
    return _BACKEND in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def our_backend_folder(pytestconfig: pytest.Config) -> Iterator[Path]:
    """The folder of a build with our patches."""
    import our_backend

    yield our_backend.folder_of(pytestconfig.stash[_STARTED])
