"""What llama.cpp says it allocated, beside what was counted before. Pure."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from step35.planning.memory_usage import HOST, MemoryUsage, Purpose, gpu_name
from step35.sizes import format_size

TOLERANCE = 0.02
ROUNDING = 16 * 2**10
"""More than the log's two digits of a MiB can be off, a buffer."""
_LINE = re.compile(r"(\S+)\s+(model|KV|compute) buffer size =\s*(\d+\.\d+) MiB")
_MAPPED = "_Mapped"
_KINDS = {
    "model": ("weights", (Purpose.WEIGHTS, Purpose.EXPERTS, Purpose.HEADS)),
    "KV": ("KV cache", (Purpose.KV, Purpose.RING, Purpose.HEAD_KV)),
    "compute": ("compute buffers", (Purpose.COMPUTE,)),
}


@dataclass(frozen=True, slots=True)
class Buffer:
    """One buffer as llama.cpp's log names it; `kind` is model, KV or compute."""

    name: str
    kind: str
    n_bytes: int


def read_buffers(lines: Iterable[str]) -> list[Buffer]:
    """Returns the buffers that lines of llama.cpp's log tell of; buffers for outputs grow later and are left out."""
    matches = (match for line in lines if (match := _LINE.search(line)))
    return [Buffer(m[1], m[2], round(float(m[3]) * 2**20)) for m in matches]


def differences(planned: MemoryUsage, buffers: Sequence[Buffer], gpus: Sequence[str]) -> list[str]:
    """Returns a sentence for each device and kind that takes over 2 % more or less than counted.

    `gpus` are ggml's names of GPU0, GPU1 and so on. A mapped file isn't a buffer of weights: then those are not
    compared.
    """
    real: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for buffer in buffers:
        real[_device(buffer.name, gpus), buffer.kind].append(buffer.n_bytes)
    is_mapped = any(buffer.name.endswith(_MAPPED) for buffer in buffers)
    kinds = [kind for kind in _KINDS if not (is_mapped and kind == "model")]
    found = (
        _difference(planned, device, kind, real[device, kind]) for device in _devices(planned, real) for kind in kinds
    )
    return [sentence for sentence in found if sentence]


def _devices(planned: MemoryUsage, real: Iterable[tuple[str, str]]) -> list[str]:
    return sorted({*planned, *(device for device, _ in real)})


def _device(name: str, gpus: Sequence[str]) -> str:
    return next((gpu_name(i) for i, gpu in enumerate(gpus) if name == gpu), HOST)


def _difference(planned: MemoryUsage, device: str, kind: str, sizes: Sequence[int]) -> str | None:
    what, purposes = _KINDS[kind]
    counted, n_bytes = sum(planned.get(device, {}).get(purpose, 0) for purpose in purposes), sum(sizes)
    if abs(n_bytes - counted) <= TOLERANCE * counted + ROUNDING * len(sizes):
        return None
    return f"{what} on {device}: counted {format_size(counted)}, llama.cpp took {format_size(n_bytes)}"
