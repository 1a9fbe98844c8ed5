"""What this box has: cores, memory and its bandwidth, limits, GPUs. Makes a Machine out of it.

Everything is read through `Sources`, so a test or a file can stand for any box.
"""

import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from step35.cores import usable_cores
from step35.native.device_kinds import INTEGRATED, Device, used
from step35.planning.machine import GIB, Gpu, Machine, known_machines

PROBE_S = 2.0
PROBE_BYTES = 256 * 2**20
UNKNOWN_GPU_BANDWIDTH = 300e9
UNKNOWN_LINK_BANDWIDTH = 12e9
FLOPS_PER_BANDWIDTH = 60.0
"""Operations that an unknown GPU is taken to reach in prefill for each byte a second of its bandwidth."""
LINK_SHARE = 0.8


class Memory(NamedTuple):
    """Bytes in all, and those that a program may still take."""

    total: int
    available: int


def _unknown() -> Memory | None:
    return None


def _no_file(path: str) -> bool | None:
    return None


@dataclass(frozen=True, slots=True)
class Sources:
    """Where facts come from. `read` returns a system file's text, or None where there is none."""

    read: Callable[[str], str | None]
    devices: Callable[[], list[Device]]
    bandwidth: Callable[[int], float]
    """Measures the RAM's bandwidth in bytes a second with some threads."""
    n_cpus: int
    system: str
    memory: Callable[[], Memory | None] = _unknown
    """Of the system; None if it can't be read."""
    address_space: Callable[[], Memory | None] = _unknown
    """Of this process, as `ulimit -v` limits it; None without a limit."""
    gpu_backends: Callable[[], Sequence[str]] = tuple
    """ggml's names of the GPU backends that the running llama.cpp has, such as vulkan."""
    may_open: Callable[[str], bool | None] = _no_file
    """Whether this user may read and write a device's file; None where there is none."""


def probe(sources: Sources) -> Machine:
    """Returns this box as a machine to plan for."""
    total, available = ram(sources) or (0, 0)
    n_cores = physical_cores(sources)
    bandwidth = sources.bandwidth(n_cores)
    devices = used([_sharing(device) if sources.system == "Darwin" else device for device in sources.devices()])
    gpus = tuple(_gpu(sources, device, available, bandwidth) for device in devices)
    machine = Machine(
        name="this machine",
        about=f"{n_cores} cores, {total / GIB:.0f} GiB",
        n_cores=n_cores,
        n_numa=numa_nodes(sources),
        total_bytes=total,
        available_bytes=available,
        reserve_bytes=reserve(total, bool(gpus)),
        bandwidth=bandwidth,
        gpus=gpus,
        load_mode="mmap" if sources.system == "Darwin" else "none",
    )
    if not machine.is_unified:
        return machine
    # an integrated GPU reads the very memory that was measured, but faster than the CPU can
    unified = (m for m in known_machines().values() if m.is_unified)
    known = next((m for m in unified if _is_known_as(gpus[0].name, m.gpus[0].name)), None)
    return machine if known is None else replace(machine, load_mode=known.load_mode, bandwidth=known.bandwidth)


def reserve(total_bytes: int, has_gpu: bool) -> int:
    """Returns what a plan leaves to the system: more where a GPU's driver may freeze the box."""
    most = 6 * GIB if has_gpu else 4 * GIB
    return min(most, total_bytes // 10)


# memory


def ram(sources: Sources) -> Memory | None:
    """Returns the RAM, and what a program may still take of it under its limits; None if it can't be read."""
    system, space = sources.memory(), sources.address_space()
    if system is None:
        return None
    limits = [Memory(limit, max(0, limit - used)) for limit, used in cgroup_limits(sources)]
    known = [system, *limits, *([space] if space is not None else [])]
    return Memory(min(memory.total for memory in known), min(memory.available for memory in known))


def cgroup_limits(sources: Sources) -> list[tuple[int, int]]:
    """Returns (limit, bytes in use that can't be dropped) of this process's cgroup and those above it."""
    found = []
    for folder, limit_name, used_name in _cgroup_folders(sources):
        limit, used = sources.read(f"{folder}/{limit_name}"), sources.read(f"{folder}/{used_name}")
        if limit is None or used is None or not limit.strip().isdigit() or int(limit) >= 1 << 60:
            continue
        found.append((int(limit), max(0, int(used) - _droppable(sources, folder))))
    return found


def stalls(sources: Sources) -> tuple[float, float]:
    """Returns the shares of the last ten seconds in which some, and all, tasks waited for memory; 0 where unknown."""
    folders = [f"{folder}/memory.pressure" for folder, _, _ in _cgroup_folders(sources)]
    text = next(filter(None, map(sources.read, [*folders, "/proc/pressure/memory"])), "")
    values = {line.split()[0]: float(line.split()[1].partition("=")[2]) / 100 for line in text.splitlines()}
    return values.get("some", 0.0), values.get("full", 0.0)


def _cgroup_folders(sources: Sources) -> list[tuple[str, str, str]]:
    folders = []
    for line in (sources.read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        root, names = "/sys/fs/cgroup", ("memory.max", "memory.current")
        if "memory" in controllers.split(","):
            root, names = "/sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif controllers:
            continue
        parts = [part for part in path.split("/") if part]
        folders += [("/".join([root, *parts[:n]]), *names) for n in range(len(parts), -1, -1)]
    return folders


def _droppable(sources: Sources, folder: str) -> int:
    """Returns the page cache that counts against a cgroup's limit but yields to programs, as in MemAvailable."""
    lines = (line.split() for line in (sources.read(f"{folder}/memory.stat") or "").splitlines())
    values = {line[0]: int(line[1]) for line in lines if len(line) == 2}
    total = "total_" if "total_inactive_file" in values else ""  # version 1 counts those below apart
    return values.get(f"{total}inactive_file", 0) + values.get(f"{total}active_file", 0)


# processors


def physical_cores(sources: Sources) -> int:
    """Returns the cores that this process may use, counting one for each pair of hyper-threads."""
    blocks = (sources.read("/proc/cpuinfo") or "").split("\n\n")
    cores = {_core(block) for block in blocks if "core id" in block}
    return min(len(cores) or sources.n_cpus, sources.n_cpus)


def _core(block: str) -> tuple[str, ...]:
    fields = dict(line.split(":", 1) for line in block.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    return values.get("physical id", ""), values["core id"]


def numa_nodes(sources: Sources) -> int:
    """Returns the number of NUMA nodes with memory."""
    online = sources.read("/sys/devices/system/node/has_memory") or "0"
    return sum(
        int(last or first) - int(first) + 1
        for first, _, last in (part.partition("-") for part in online.strip().split(","))
    )


# GPUs


def _gpu(sources: Sources, device: Device, available: int, ram_bandwidth: float) -> Gpu:
    all_known = (gpu for m in known_machines().values() for gpu in m.gpus)
    known = next((gpu for gpu in all_known if _is_known_as(device.name, gpu.name)), None)
    is_integrated = device.kind == INTEGRATED
    # the driver of an integrated GPU counts the page cache as used; what programs may take is MemAvailable
    limit = min(device.total_bytes, gtt_limit(sources, device.address) or device.total_bytes)
    free = min(limit, available) if is_integrated else device.free_bytes
    link = ram_bandwidth if is_integrated else link_bandwidth(sources, device.address)
    if known is not None:
        return replace(
            known,
            name=device.name,
            kind=device.kind,
            total_bytes=device.total_bytes,
            free_bytes=free,
            host_bandwidth=link,
        )
    bandwidth = ram_bandwidth if is_integrated else UNKNOWN_GPU_BANDWIDTH
    return Gpu(
        device.name, device.kind, device.total_bytes, free, bandwidth, link, FLOPS_PER_BANDWIDTH * bandwidth, GIB
    )


def _sharing(device: Device) -> Device:
    """Returns an Apple GPU as what it is: ggml's Metal calls it a card, but its memory is the box's own."""
    return replace(device, kind=INTEGRATED) if "apple" in device.name.lower() else device


def gtt_limit(sources: Sources, address: str | None) -> int | None:
    """Returns what an AMD GPU without memory of its own may map, as its driver has it now; None for others."""
    folder = f"/sys/bus/pci/devices/{address}"
    texts = [sources.read(f"{folder}/mem_info_{kind}_total") for kind in ("gtt", "vram")]
    return sum(int(text) for text in texts if text) or None


_VENDORS = {"nvidia", "amd", "apple", "intel"}  # a driver names them or doesn't


def _is_known_as(name: str, known: str) -> bool:
    """Whether a GPU is one of models.yaml: each word of that name is in its own. A laptop's is another."""
    words, wanted = ({*re.findall(r"\w+", text.lower())} - _VENDORS for text in (name, known))
    return wanted <= words and ("laptop" in words) == ("laptop" in wanted)


def link_bandwidth(sources: Sources, address: str | None) -> float:
    """Returns a PCIe link's bandwidth from its largest width and speed: idle links run slower."""
    folder = f"/sys/bus/pci/devices/{address}"
    speed, width = sources.read(f"{folder}/max_link_speed"), sources.read(f"{folder}/max_link_width")
    if not speed or not width:
        return UNKNOWN_LINK_BANDWIDTH
    return float(speed.split()[0]) * 1e9 / 8 * int(width) * LINK_SHARE


# this very box


def this_box() -> Sources:
    """Returns the sources of the box that this runs on."""
    return Sources(
        _read,
        _devices,
        cached_bandwidth,
        usable_cores(),
        platform.system(),
        system_memory,
        address_space,
        _gpu_backends,
        may_open,
    )


def system_memory() -> Memory | None:
    """Returns the system's memory; None if it can't be read, which says nothing about how much is free."""
    try:
        found = psutil.virtual_memory()
    except (OSError, psutil.Error, RuntimeError, KeyError, ValueError):
        return None
    return Memory(found.total, found.available) if found.total else None


def address_space() -> Memory | None:
    """Returns this process's address space; None without a limit, or where the system knows none."""
    limit_of = getattr(psutil, "RLIMIT_AS", None)
    if limit_of is None:
        return None
    try:
        process = psutil.Process()
        limit, used = process.rlimit(limit_of)[0], process.memory_info().vms
    except (OSError, psutil.Error):
        return None
    return None if limit < 0 else Memory(limit, max(0, limit - used))


def _devices() -> list[Device]:
    from step35.native import devices

    return devices.devices()


def _gpu_backends() -> Sequence[str]:
    from step35.native import devices

    return devices.gpu_backends()


def may_open(path: str) -> bool | None:
    """Returns whether this user may read and write a device's file; None where there is none."""
    return os.access(path, os.R_OK | os.W_OK) if Path(path).exists() else None


def before_loading() -> Sources:
    """Returns this box's sources for a process that will load a model.

    The GPUs are asked for in a child: listing them makes ggml read its environment, which a plan still has to set.
    """
    from step35.native import devices

    return replace(this_box(), devices=_devices_of_a_child if devices.may_have_gpus() else list)


_LIST_DEVICES = """\
import json
from dataclasses import asdict
from step35.native.devices import devices
print(json.dumps([asdict(device) for device in devices()]))
"""


def _devices_of_a_child() -> list[Device]:
    from step35.native import devices

    done = subprocess.run([sys.executable, "-c", _LIST_DEVICES], check=False, capture_output=True, text=True)
    try:
        return [Device(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]
    except (IndexError, ValueError, TypeError):
        return devices.devices()  # the plan's threshold is lost, not the plan


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def cached_bandwidth(n_threads: int) -> float:
    """Returns the RAM's measured bandwidth, from the cache if this box was measured before."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "step35" / "bandwidth.json"
    key = f"{platform.node()} {platform.machine()} {n_threads}"
    known = _cached(cache)
    if key in known:
        return known[key]
    bandwidth = measure_bandwidth(n_threads)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(known | {key: bandwidth}), encoding="utf-8")
    except OSError:
        pass  # a cache that can't be written costs two seconds next time
    return bandwidth


def _cached(cache: Path) -> dict[str, float]:
    """Returns the bandwidths measured before, of all boxes that share this home; none where the file is damaged."""
    try:
        return {key: float(value) for key, value in json.loads(cache.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def measure_bandwidth(
    n_threads: int, seconds: float = PROBE_S, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Returns the bytes a second that `n_threads` threads read and write together, copying."""
    n_each = max(1, PROBE_BYTES // 2 // n_threads // 8)
    copied = [0] * n_threads
    stop = threading.Event()

    def work(i: int) -> None:
        source, target = np.ones(n_each, np.int64), np.ones(n_each, np.int64)
        barrier.wait()
        while not stop.is_set():
            np.copyto(target, source)
            copied[i] += source.nbytes + target.nbytes

    barrier = threading.Barrier(n_threads + 1)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = clock()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return sum(copied) / (clock() - started)
