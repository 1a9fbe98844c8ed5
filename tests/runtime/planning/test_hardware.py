"""The probe makes a machine of any box: every source of facts is given by the test."""

import json
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from step35.errors import SettingsError
from step35.native.device_kinds import DISCRETE, INTEGRATED, Device
from step35.planning import hardware
from step35.planning.hardware import (
    Memory,
    Sources,
    cached_bandwidth,
    cgroup_limits,
    link_bandwidth,
    measure_bandwidth,
    numa_nodes,
    physical_cores,
    probe,
    ram,
    system_memory,
)
from step35.planning.machine import GIB, find_machine, known_machines
from step35.planning.watchdog import read_memory


def a_box(
    files=None, *, devices=(), n_cpus=8, bandwidth=50e9, system="Linux", total=64, available=60, address_space=None
):
    """Returns the sources of a box with these system files; memory in GiB."""
    memory = Memory(total * GIB, available * GIB)
    return Sources(
        (files or {}).get,
        lambda: list(devices),
        lambda n_threads: bandwidth,
        n_cpus,
        system,
        lambda: memory,
        lambda: address_space,
    )


def test_available_memory_is_the_kernels():
    assert ram(a_box()) == (64 * GIB, 60 * GIB)


def test_a_cgroup_v2_limit_binds_and_page_cache_does_not_count():
    files = {
        "/proc/self/cgroup": "0::/user/job\n",
        "/sys/fs/cgroup/user/job/memory.max": f"{20 * GIB}\n",
        "/sys/fs/cgroup/user/job/memory.current": f"{9 * GIB}\n",
        "/sys/fs/cgroup/user/job/memory.stat": f"anon 1\ninactive_file {3 * GIB}\nactive_file {GIB}\n",
        "/sys/fs/cgroup/user/memory.max": "max\n",
        "/sys/fs/cgroup/user/memory.current": "0\n",
    }
    assert cgroup_limits(a_box(files)) == [(20 * GIB, 5 * GIB)]
    assert ram(a_box(files)) == (20 * GIB, 15 * GIB)


def test_a_cgroup_v1_limit_of_a_parent_binds():
    files = {
        "/proc/self/cgroup": "4:memory:/a/b\n0::/\n",
        "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{8 * GIB}\n",
        "/sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{3 * GIB}\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    }
    assert ram(a_box(files)) == (8 * GIB, 5 * GIB)


def test_a_limit_of_the_address_space_binds():
    assert ram(a_box(address_space=Memory(8 * GIB, 6 * GIB))) == (8 * GIB, 6 * GIB)
    assert ram(a_box(address_space=None)) == (64 * GIB, 60 * GIB)


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="needs a system that limits address spaces")
def test_this_processs_address_space_is_read_where_it_is_limited():
    code = "import resource; from step35.planning.hardware import address_space; assert address_space() is None; "
    code += "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40)); found = address_space(); print(*found)"
    total, available = map(int, subprocess.check_output([sys.executable, "-c", code]).split())
    assert total == 2**40 and 0 < total - available < 2**36


def test_this_systems_memory_is_read():
    found = system_memory()
    assert found is not None and 0 < found.available <= found.total


@pytest.mark.parametrize(
    "error", [OSError("gone"), psutil.AccessDenied(), KeyError("MemTotal:"), NotImplementedError()]
)
def test_a_memory_that_cannot_be_read_is_unknown_and_not_none_free(monkeypatch, error):
    """Symptom: the watchdog takes a failed reading for 0 bytes, and ends the work."""

    def fail():
        raise error

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    assert system_memory() is None
    box = replace(a_box(), memory=system_memory)
    assert (ram(box), read_memory(box)) == (None, None)
    assert probe(box).total_bytes == 0


def test_a_macs_free_memory_is_what_is_free():
    """Symptom: all of a Mac's memory counts as free, so that neither the check nor the watchdog ever acts."""
    box = a_box(
        devices=[Device("Apple M4 Max", DISCRETE, 96 * GIB, 96 * GIB, None)], system="Darwin", total=128, available=40
    )
    machine = probe(box)
    assert (machine.available_bytes, machine.gpus[0].free_bytes) == (40 * GIB, 40 * GIB)
    reading = read_memory(box)
    assert reading is not None and reading.available == 40 * GIB


def test_hyper_threads_count_once_and_affinity_binds():
    cpu = "processor: {i}\nphysical id\t: 0\ncore id\t\t: {core}\n"
    cpuinfo = "\n".join(cpu.format(i=i, core=i // 2) for i in range(8))
    assert physical_cores(a_box({"/proc/cpuinfo": cpuinfo})) == 4
    assert physical_cores(a_box({"/proc/cpuinfo": cpuinfo}, n_cpus=3)) == 3
    assert physical_cores(a_box(n_cpus=6)) == 6


@pytest.mark.parametrize(("online", "n"), [("0\n", 1), ("0-3\n", 4), ("0,2-3\n", 3), (None, 1)])
def test_numa_nodes_are_counted(online, n):
    assert numa_nodes(a_box({} if online is None else {"/sys/devices/system/node/has_memory": online})) == n


def test_an_integrated_gpu_has_what_the_system_can_give_not_what_its_driver_says():
    """Symptom: on a DGX Spark with a full page cache, 3 GiB of 121 look free."""
    spark = Device("NVIDIA GB10", INTEGRATED, 121 * GIB, 3 * GIB, None)
    machine = probe(a_box(devices=[spark], total=121, available=118))
    assert machine.is_unified
    assert machine.gpus[0].free_bytes == 118 * GIB
    assert machine.gpus[0].bandwidth == known_machines()["dgx-spark"].gpus[0].bandwidth
    assert machine.load_mode == "none"


def test_a_discrete_gpu_has_what_its_driver_says_and_its_links_bandwidth():
    card = Device("NVIDIA GeForce RTX 4090", DISCRETE, 24 * GIB, 22 * GIB, "0000:01:00.0")
    link = "/sys/bus/pci/devices/0000:01:00.0/max_link_"
    box = a_box({f"{link}speed": "16.0 GT/s PCIe\n", f"{link}width": "16\n"}, devices=[card])
    machine = probe(box)
    assert not machine.is_unified
    assert machine.gpus[0].free_bytes == 22 * GIB
    assert machine.gpus[0].host_bandwidth == pytest.approx(25.6e9)
    assert link_bandwidth(box, None) == hardware.UNKNOWN_LINK_BANDWIDTH


def test_a_macs_gpu_shares_its_memory_though_metal_calls_it_a_card():
    """Symptom: a Mac of 128 GB is planned for as a GPU of 96 and 128 of RAM."""
    m4 = Device("Apple M4 Max", DISCRETE, 96 * GIB, 96 * GIB, None)
    box = a_box(devices=[m4], system="Darwin", total=128, available=128)
    machine = probe(box)
    assert machine.is_unified
    assert (machine.gpus[0].free_bytes, machine.load_mode) == (96 * GIB, "mmap")
    assert machine.bandwidth == known_machines()["mac-studio-128"].bandwidth


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Radeon 8060S Graphics (RADV GFX1151)", "AMD Radeon 8060S"),
        ("Apple M4", None),
        ("Apple M4 Max", "Apple M4 Max"),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(name, known):
    """Symptom: an M4 was taken for an M4 Max, four times as fast."""
    gpu = probe(a_box(devices=[Device(name, DISCRETE, 24 * GIB, 20 * GIB, None)])).gpus[0]
    wanted = next((g.bandwidth for m in known_machines().values() for g in m.gpus if g.name == known), None)
    assert gpu.bandwidth == (wanted or hardware.UNKNOWN_GPU_BANDWIDTH)


def test_what_an_integrated_amd_gpu_may_map_is_its_drivers_limit():
    """Symptom: half of the RAM is the default; a plan for more fails while it loads."""
    igpu = Device("AMD Radeon Graphics", INTEGRATED, 124 * GIB, 124 * GIB, "0000:c5:00.0")
    folder = "/sys/bus/pci/devices/0000:c5:00.0/mem_info_"
    files = {f"{folder}gtt_total": f"{62 * GIB}\n", f"{folder}vram_total": f"{GIB // 2}\n"}
    box = {"devices": [igpu], "total": 125, "available": 122}
    assert probe(a_box(files, **box)).gpus[0].free_bytes == 62 * GIB + GIB // 2
    assert probe(a_box(**box)).gpus[0].free_bytes == 122 * GIB


def test_an_unknown_gpu_and_an_unknown_system_still_make_a_machine():
    machine = probe(a_box(devices=[Device("X", DISCRETE, GIB, GIB, None)], system="Darwin", total=32, available=30))
    assert machine.total_bytes == 32 * GIB
    assert machine.load_mode == "mmap"
    assert machine.gpus[0].bandwidth > 0


def test_the_bandwidth_probe_gives_a_plausible_number():
    assert 1e8 < measure_bandwidth(1, seconds=0.05) < 1e13


def test_the_bandwidth_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    monkeypatch.setattr(hardware, "measure_bandwidth", lambda n: measured.append(n) or 42e9)
    assert [cached_bandwidth(4), cached_bandwidth(4)] == [42e9, 42e9]
    assert measured == [4]
    assert [cached_bandwidth(8), cached_bandwidth(4)] == [42e9, 42e9]  # another box, or affinity, keeps the first
    assert measured == [4, 8]
    (tmp_path / "step35" / "bandwidth.json").write_text("damaged")
    assert cached_bandwidth(4) == 42e9
    assert json.loads((tmp_path / "step35" / "bandwidth.json").read_text())


# machines as files

BOX = """about: a test box
cores: 12
memory: 64GiB
gbps: 80
gpus:
  - name: some GPU
    memory: 16GiB
    gbps: 500
    host_gbps: 20
    tflops: 30
"""


def test_a_box_can_be_given_as_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(BOX)
    machine = find_machine(str(tmp_path / "mine.yaml"))
    assert (machine.name, machine.n_cores, machine.gpus[0].total_bytes) == ("mine", 12, 16 * GIB)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory: 64GiB", "memory: 64", r"line 3: memory expected a size such as 24GiB, got 64"),
        ("gbps: 500", "gbps: -1", r"line 8: gpus\[0\].gbps expected a number above 0, got -1"),
        ("cores: 12", "cores: many", r"line 2: cores expected a whole number, got 'many'"),
        ("cores: 12", "corse: 12", r"line 2: corse expected the key cores, got an unknown one"),
        ("gpus:\n", "gpus: 3\nx:\n", r"line 5: gpus expected a list, got 3"),
        ("gbps: 80", "gbps: 80\nfans: 3", r"line 5: fans expected a known key"),
    ],
)
def test_a_mistake_in_a_machines_file_is_named_by_its_line(tmp_path, old, new, message):
    path = tmp_path / "mine.yaml"
    path.write_text(BOX.replace(old, new, 1))
    with pytest.raises(SettingsError, match=message):
        find_machine(str(path))


def test_an_unknown_machine_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match="unknown machine: expected one of dgx-spark, .* got 'toaster'"):
        find_machine("toaster")
