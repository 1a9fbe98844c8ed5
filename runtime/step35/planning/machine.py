"""A box as a plan sees it: memory, bandwidth, devices. Read from models.yaml or from a file of one's own."""

from dataclasses import dataclass
from pathlib import Path

from step35.choices import PLANNED_LOAD_MODES
from step35.errors import SettingsError
from step35.native.device_kinds import DISCRETE, INTEGRATED, REMOTE
from step35.sizes import parse_size
from step35.yaml_file import Section, one_of, positive, read_yaml, text, whole

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU. Bandwidths are in bytes a second, `flops` in what prefill really reaches.

    An integrated one shares the box's memory: `free_bytes` is the most that it may map. A remote one is another box's,
    behind a network of `host_bandwidth`.
    """

    name: str
    kind: str
    total_bytes: int
    free_bytes: int
    bandwidth: float
    host_bandwidth: float
    """From host memory to the GPU's."""
    flops: float
    reserve_bytes: int
    """What the driver and its kernels take beside the buffers that are planned."""
    decode_share: float = 0.6
    """The share of the bandwidth that decoding reaches."""
    kv_share: float = 0.4
    """The same for reading the KV cache."""
    latency_s: float = 0.0
    """Of a question and its answer over the network, to a remote one."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A box. `available_bytes` is what programs may still take of its RAM."""

    name: str
    about: str
    n_cores: int
    n_numa: int
    total_bytes: int
    """Of RAM; 0 where it is unknown."""
    available_bytes: int
    reserve_bytes: int
    """What a plan leaves free for the rest of the system."""
    bandwidth: float
    """Of the RAM, in bytes a second."""
    gpus: tuple[Gpu, ...]
    load_mode: str
    decode_share: float = 0.6
    flops: float = 0.0
    """What the CPU reaches in prefill; 0 = from the cores."""

    @property
    def is_unified(self) -> bool:
        """Whether GPU and CPU share one memory."""
        return any(gpu.kind == INTEGRATED for gpu in self.gpus)

    @property
    def has_remotes(self) -> bool:
        """Whether a part of it is another box."""
        return any(gpu.kind == REMOTE for gpu in self.gpus)


def models_path() -> Path:
    """Returns models.yaml at the root of a checkout, or beside the package in an installed wheel."""
    here = Path(__file__).resolve()
    candidates = (here.parents[3] / "models.yaml", here.parents[2] / "step35-models.yaml")
    for path in candidates:
        if path.is_file():
            return path
    raise SettingsError(f"models.yaml is missing: expected {candidates[0]} or {candidates[1]}; reinstall step35")


def known_machines(path: Path | None = None) -> dict[str, Machine]:
    """Returns the machines of models.yaml by name."""
    machines = read_yaml(path or models_path()).section("machines")
    return {name: machine_of(machines.section(name), name) for name in machines.names()}


def find_machine(name: str) -> Machine:
    """Returns a machine by its name in models.yaml, or from a YAML file with one."""
    if name.endswith((".yaml", ".yml")):
        return machine_of(read_yaml(Path(name)), Path(name).stem)
    known = known_machines()
    if name not in known:
        raise SettingsError(f"unknown machine: expected one of {', '.join(known)} or a .yaml file, got {name!r}")
    return known[name]


def machine_of(entry: Section, name: str) -> Machine:
    """Returns the machine of one entry; raises SettingsError that names the line."""
    total = entry.take("memory", _size, _SIZE)
    machine = Machine(
        name=name,
        about=entry.take("about", text, "a text", ""),
        n_cores=entry.take("cores", whole, "a whole number"),
        n_numa=entry.take("numa_nodes", whole, "a whole number", 1),
        total_bytes=total,
        available_bytes=entry.take("available", _size, _SIZE, total),
        reserve_bytes=entry.take("reserve", _size, _SIZE, 4 * GIB),
        bandwidth=entry.take("gbps", positive, _NUMBER) * 1e9,
        gpus=tuple(_gpu(gpu) for gpu in entry.sections("gpus")),
        load_mode=entry.take("load_mode", one_of(*PLANNED_LOAD_MODES), _LOAD_MODE, "none"),
        decode_share=entry.take("decode_share", positive, _NUMBER, 0.6),
        flops=entry.take("tflops", positive, _NUMBER, 0.0) * 1e12,
    )
    entry.end()
    return machine


_SIZE, _NUMBER = "a size such as 24GiB", "a number above 0"
_LOAD_MODE = f"one of {', '.join(PLANNED_LOAD_MODES)}"


def _size(value: object) -> int:
    return parse_size(text(value))


def _gpu(entry: Section) -> Gpu:
    total = entry.take("memory", _size, _SIZE)
    kinds = (DISCRETE, INTEGRATED)
    gpu = Gpu(
        name=entry.take("name", text, "a text"),
        kind=entry.take("kind", one_of(*kinds), " or ".join(kinds), DISCRETE),
        total_bytes=total,
        free_bytes=entry.take("free", _size, _SIZE, total),
        bandwidth=entry.take("gbps", positive, _NUMBER) * 1e9,
        host_bandwidth=entry.take("host_gbps", positive, _NUMBER) * 1e9,
        flops=entry.take("tflops", positive, _NUMBER) * 1e12,
        reserve_bytes=entry.take("reserve", _size, _SIZE, GIB),
        decode_share=entry.take("decode_share", positive, _NUMBER, 0.6),
        kv_share=entry.take("kv_share", positive, _NUMBER, 0.4),
    )
    entry.end()
    return gpu
