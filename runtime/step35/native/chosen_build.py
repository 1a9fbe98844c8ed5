"""Which libraries run: the user's LLAMA_CPP_LIB_PATH, the chosen build, or the stock wheel's."""

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from step35.errors import BackendError, NativeError, Step35Error
from step35.native import builds
from step35.native.load_failures import library_remedy

VARIABLE = "LLAMA_CPP_LIB_PATH"
"""llama_cpp reads it when it is imported."""
PACKAGE = "llama-cpp-python"


@contextmanager
def chosen_libraries(pinned: str, environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Points llama_cpp, which is imported inside, to the chosen build, unless the user has pointed it somewhere.

    Afterwards the environment is as before: another program that this process starts may have another llama_cpp.
    Raises BackendError or NativeError, in a line, where what was chosen is gone, of another version, or doesn't load.
    """
    build = None if VARIABLE in environment else _matching_build()
    where = str(build.folder) if build else environment.get(VARIABLE)
    if build:
        environment[VARIABLE] = str(build.folder)
    try:
        yield
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # whatever llama_cpp's loader meets
        raise _unusable(error, where, pinned) from error
    finally:
        if build:
            del environment[VARIABLE]


def _matching_build() -> builds.Build | None:
    build = builds.chosen()
    if build and build.version != version(PACKAGE):
        raise BackendError(
            f"the chosen backend is of another version: {build.name} expected {PACKAGE} {version(PACKAGE)}, got "
            f"{build.version}; step35 backend build makes one, step35 backend use stock does without"
        )
    return build


def _unusable(cause: Exception, where: str | None, pinned: str) -> Step35Error:
    if where is None or isinstance(cause, ImportError):
        return NativeError(
            f"can't load {PACKAGE}: {cause}; install what is missing, or the version that step35 is made for: "
            f"pip install --force-reinstall --no-cache-dir {PACKAGE}=={pinned}"
        )
    remedy = f"unset {VARIABLE}, or fix what it names"
    if missing := library_remedy(str(cause)):
        remedy = f"{missing}; step35 backend use stock does without"
    elif Path(where).parent == builds.home():
        remedy = f"step35 backend remove {Path(where).name} and build it again; step35 backend use stock does without"
    return BackendError(f"can't load llama.cpp from {where}: {cause}; {remedy}")


def check_identity(folder: Path, said: str, binding: str) -> None:
    """Raises BackendError if a library of ours ("VERSION COMMIT NAME") is for another binding."""
    if said and said.split(maxsplit=1)[0] != binding:
        raise BackendError(
            f"another version's library: {folder} expected {PACKAGE} {binding}, got {said.split(maxsplit=1)[0]}; "
            "step35 backend build makes one"
        )


def describe(folder: Path, said: str) -> str:
    """Returns which backend runs, in a line: `folder` was loaded from and `said` is its identity, "" if it has none."""
    if folder.parent == builds.home():
        return f"{folder.name}: {builds.read(folder).about}"
    if os.environ.get(VARIABLE) == str(folder):
        return f"{VARIABLE}={folder}: {said or 'a build of your own'}"
    return f"the stock {PACKAGE}"
