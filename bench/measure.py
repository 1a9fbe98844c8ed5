"""Runs a command and measures what it took: time, memory, bytes written."""

import os
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.02


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process took.

    `peak_anonymous_bytes` is the largest RssAnon of /proc/PID/status, sampled every 20 ms: the
    memory that is the process's own. `peak_rss_bytes` (the kernel's own maximum) counts pages of
    mapped files too, which the kernel may drop. `written_bytes` is what went to the file system.
    """

    wall_s: float
    user_s: float
    system_s: float
    peak_anonymous_bytes: int
    peak_rss_bytes: int
    written_bytes: int


def measure(command: Sequence[str], log: Path) -> Usage:
    """Runs a command with its output in `log`; raises RuntimeError with the log's end if it fails."""
    start = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    peak = 0
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(SAMPLE_S)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {log.read_text(errors='replace')[-2000:]}")
    return _usage(wall_s, peak, ended[2])


def _usage(wall_s: float, peak: int, used: resource.struct_rusage) -> Usage:
    """Builds a Usage; the kernel counts resident memory in KiB and written blocks in 512 bytes."""
    return Usage(wall_s, used.ru_utime, used.ru_stime, peak, used.ru_maxrss * 1024, used.ru_oublock * 512)


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # a process that has ended and is not yet waited for
