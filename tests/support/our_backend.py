"""A build of llama.cpp with our patches: made beside the other tests, kept in .cache/, and taken again while it is the same.

It takes minutes of two cores, so it starts with the tests, at the lowest priority, and those that need it run last.
Run as a program it makes the build and prints its folder.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import upstream
from step35.backend.build import Wanted, build, this_box
from step35.backend.upstream import patches_folder
from step35.errors import BackendError
from step35.native import builds

HOME = Path(__file__).parents[2] / ".cache" / "backend"
N_KEPT = 4


def start() -> subprocess.Popen[str]:
    """Starts the build, or the look at the one that is there."""
    environment = os.environ | {"XDG_DATA_HOME": str(HOME / "data"), "XDG_CACHE_HOME": str(HOME / "cache")}
    command = [sys.executable, __file__]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def folder_of(started: subprocess.Popen[str]) -> Path:
    """Waits for the build and returns its folder."""
    out, err = started.communicate()
    if started.returncode:
        raise RuntimeError(f"the build failed: {err[-2000:]}")
    return Path(out.splitlines()[-1])


def stop(started: subprocess.Popen[str]) -> None:
    """Ends the build, if it still runs; the next one goes on from there."""
    started.terminate()
    started.communicate()


def main() -> None:
    os.nice(19)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the compilers, too
    while True:
        try:
            made = build(Wanted(sdist=upstream.sdist()), this_box(), patches_folder(), lambda line: None)
            break
        except BackendError as error:
            if "being built by another process" not in str(error):
                raise
            time.sleep(1)
    for old in sorted(builds.builds(), key=lambda build: build.folder.stat().st_mtime)[:-N_KEPT]:
        if old.name != made.name:
            builds.remove(old.name)
    print(made.folder)


if __name__ == "__main__":
    main()
