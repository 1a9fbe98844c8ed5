"""What may be wrong with an installation, a box or a file: each finding with its remedy."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from step35.errors import BackendError, DoesNotFit, ModelError, NativeError, Step35Error
from step35.options import EngineOptions
from step35.planning.admission import drop_from_page_cache, memory_demand
from step35.planning.hardware import Sources, cgroup_limits, probe
from step35.planning.machine import Machine
from step35.planning.model_header import Header, Headers, read_headers
from step35.selftest import synthetic_model
from step35.selftest.missing_gpu import missing_gpu
from step35.selftest.trial import LISTING, N_BATCH, Crashed, LoadEngine, Trial, last_logits, run_trial
from step35.sizes import format_size

CANARY = ([0, 671, 6102, 294, 8760, 344], 11111)
"""Published: "The capital of France is" with BOS, and the greedy next token, " Paris"."""
REAL_TRUNK, REAL_VOCAB = 45, 128896
SAMPLE_BYTES = 256 * 2**20
SLOW_DISK = 300e6
N_SAMPLES, SAMPLE_PAGE, MOST_HEADER = 512, 4096, 16 * 2**20
EMPTY_SHARE = 0.01
ARITHMETIC_ERROR = 0.05
"""Of the logits' spread; a CPU comes to 0.1 %, and GPUs may round products to 10 bits."""
ANOTHER_DRIVER = "try another driver or build of llama.cpp; on the CPU: --ngl 0"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `remedy` is empty where nothing is wrong."""

    what: str
    found: str
    remedy: str = ""

    @property
    def is_well(self) -> bool:
        return not self.remedy


RunTrial = Callable[[], Trial]


def examine(
    sources: Sources, model: Path | None, load_engine: LoadEngine, try_out: RunTrial = run_trial
) -> Iterator[Finding]:
    """Yields findings, the installation's first; goes no further where the rest depends on what is broken."""
    try:
        yield installation()
    except (NativeError, BackendError) as error:
        yield Finding("llama-cpp-python", str(error), "do what is said there; without it nothing runs")
        return
    yield backend()
    computed = arithmetic(try_out)
    if LISTING in computed.found:  # and listing them here would end this process as well
        yield computed
        return
    machine = probe(replace(sources, bandwidth=lambda n_threads: 1.0))
    yield memory(sources, machine)
    yield devices(sources, machine)
    yield load_mode(machine)
    yield computed
    if model is not None:
        yield from examine_model(model, machine, load_engine)


def installation() -> Finding:
    """Looks at the version of llama-cpp-python; raises NativeError if a symbol that step35 needs is missing."""
    from step35.native.library import PINNED_VERSION, binding_version

    remedy = "" if binding_version == PINNED_VERSION else f"pip install llama-cpp-python=={PINNED_VERSION}"
    return Finding("llama-cpp-python", f"{binding_version}, all symbols there", remedy)


def backend() -> Finding:
    """Tells which llama.cpp runs."""
    from step35.native.library import running_backend

    return Finding("backend", running_backend())


def memory(sources: Sources, machine: Machine) -> Finding:
    """Looks at the memory that a model may take."""
    limits = [format_size(limit) for limit, _ in cgroup_limits(sources)]
    found = f"{format_size(machine.available_bytes)} of {format_size(machine.total_bytes)} available"
    found += f", cgroup limit {', '.join(limits)}" if limits else ""
    is_enough = machine.available_bytes > machine.reserve_bytes
    return Finding("memory", found, "" if is_enough else "end other programs, or raise the limit")


def devices(sources: Sources, machine: Machine) -> Finding:
    """Looks for GPUs that the system has and this build of llama.cpp doesn't use, or that it finds none of."""
    backends = sources.gpu_backends()
    if backends and not machine.gpus:
        missing = missing_gpu(sources, backends)
        return Finding("GPU", missing.found, missing.remedy)
    driver = (sources.read("/proc/driver/nvidia/version") or "").splitlines()
    if driver and not machine.gpus:
        found = f"a driver ({driver[0]}), but no device that llama.cpp can use"
        return Finding("GPU", found, "build it for CUDA: step35 backend build --cuda")
    gpus = [
        f"{gpu.name}, {gpu.kind}, {format_size(gpu.free_bytes)} of {format_size(gpu.total_bytes)} free"
        for gpu in machine.gpus
    ]
    return Finding("GPU", "; ".join(gpus) or "none", "")


def load_mode(machine: Machine) -> Finding:
    """Tells how weights will be read here."""
    why = "the GPU maps the file itself" if machine.load_mode == "mmap" else "weights are read into memory of their own"
    return Finding("load mode", f"{machine.load_mode}: {why}; a plan may say otherwise")


def arithmetic(try_out: RunTrial) -> Finding:
    """Runs a made-up Step-3.5, whose logits are known from another implementation, on the devices of this box."""
    try:
        trial = try_out()
    except Crashed as error:
        return Finding("arithmetic", str(error), ANOTHER_DRIVER)
    except Step35Error as error:
        return Finding("arithmetic", str(error), "fix that, and run step35 doctor again")
    known, best = synthetic_model.known_logits(), int(trial.logits.argmax())
    error = max(abs(float(trial.logits[token]) - value) for token, value in known.logits.items()) / known.spread
    found = f"a made-up model gives token {best} (known {known.best}), logits off by at most {error:.1%}"
    found += f", on {trial.where}" if trial.gpus else ""
    is_right = best == known.best and error < ARITHMETIC_ERROR
    return Finding("arithmetic", found, "" if is_right else ANOTHER_DRIVER)


# the model


def examine_model(path: Path, machine: Machine, load_engine: LoadEngine) -> Iterator[Finding]:
    """Yields findings on a file: whole, complete, not too large, quick to read, and giving the right token."""
    try:
        headers = read_headers(path)
    except ModelError as error:
        yield Finding("file", str(error), "do so; or download it again, or convert the checkpoint with convert-step35")
        return
    header = headers.model
    yield heads(header)
    yield disk(path, header.n_bytes)
    yield holes(header.files)
    options = EngineOptions(path, draft="off", n_ctx=512, n_batch=N_BATCH)
    try:
        memory_demand(options, headers, machine).check()
    except DoesNotFit as error:
        yield Finding("size", str(error), f"see what would fit: step35 plan {path}")
        return
    yield Finding("size", f"{format_size(header.n_bytes)} of weights fit")
    try:
        yield self_test(headers, options, load_engine)
    except DoesNotFit as error:
        yield Finding("size", str(error), f"see what would fit: step35 plan {path}")
    except Step35Error as error:
        yield Finding("self-test", str(error), f"check the file with convert-step35 inspect {path}")


def heads(header: Header) -> Finding:
    """Looks for MTP heads."""
    if header.shape.n_heads:
        return Finding("MTP heads", f"{header.shape.n_heads}")
    return Finding(
        "MTP heads", "none: no drafting, unless --mtp-file gives a side file (convert-step35 run CHECKPOINT --mtp only)"
    )


def disk(path: Path, n_bytes: int, clock: Callable[[], float] = time.perf_counter) -> Finding:
    """Reads a part of the file that the page cache has been asked to forget."""
    drop_from_page_cache([path])
    started = clock()
    with open(path, "rb", buffering=0) as file:
        n_read = 0
        while n_read < SAMPLE_BYTES and (part := file.read(8 * 2**20)):
            n_read += len(part)
    speed = n_read / max(clock() - started, 1e-9)
    found = f"{speed / 1e6:.0f} MB/s: loading takes {n_bytes / speed:.0f} s"
    is_slow = speed < SLOW_DISK and n_bytes > SAMPLE_BYTES
    return Finding("disk", found, "put the file on a faster disk, such as an NVMe one" if is_slow else "")


def holes(files: Sequence[Path]) -> Finding:
    """Looks for places that were never written: a download that made room first and then broke off."""
    places = [(shard, place) for shard in files for place in _places(shard.stat().st_size)]
    n_empty = sum(not any(_read_at(*place)) for place in places)
    is_whole = n_empty <= EMPTY_SHARE * len(places)  # some rows of a vocabulary may be zeros
    found = f"{n_empty} of {len(places)} samples are nothing but zeros"
    return Finding("data", found, "" if is_whole else "download the file again: it is incomplete")


def _places(n_bytes: int) -> range:
    """Returns where to look into a file, its header left out."""
    return range(min(n_bytes // 8, MOST_HEADER), n_bytes, max(SAMPLE_PAGE, n_bytes // N_SAMPLES))


def _read_at(path: Path, start: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(SAMPLE_PAGE)


def self_test(headers: Headers, options: EngineOptions, load_engine: LoadEngine) -> Finding:
    """Decodes the published canary on a real model; on another, the same tokens in two ways, which must agree."""
    shape = headers.model.shape
    is_real = (shape.n_trunk, shape.n_vocab) == (REAL_TRUNK, REAL_VOCAB)
    prompt = CANARY[0] if is_real else [token % shape.n_vocab for token in range(3, 3 + 7 * N_BATCH, 7)]
    with load_engine(options, headers) as engine:
        at_once = last_logits(engine, [prompt])
        in_two = at_once if is_real else last_logits(engine, [prompt[: len(prompt) // 2], prompt[len(prompt) // 2 :]])
    token = int(at_once.argmax())
    if not np.isfinite(at_once).all():
        return Finding(
            "self-test",
            "logits that are not numbers",
            "another driver or build; check the file with convert-step35 verify",
        )
    if is_real:
        remedy = (
            "" if token == CANARY[1] else "check the file with convert-step35 verify; then try another driver or build"
        )
        return Finding("canary", f"{CANARY[0]} gives {token}, published {CANARY[1]}", remedy)
    agrees = token == int(in_two.argmax())
    return Finding(
        "self-test",
        f"token {token} after {len(prompt)} tokens",
        "" if agrees else "decoding in two steps gives another token: try another driver or build",
    )
