"""Why a llama.cpp that was built for GPUs finds none, as far as the box tells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from step35.planning.hardware import Sources

NVIDIA_DRIVER, NVIDIA_NODE, AMD_NODE = "/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/kfd"
RENDER_NODES = tuple(f"/dev/dri/renderD{number}" for number in range(128, 144))
NO_GPU = "if this box has no GPU: step35 backend use stock"


@dataclass(frozen=True, slots=True)
class MissingGpu:
    """What was seen in the place of a GPU, and what to do."""

    found: str
    remedy: str


def missing_gpu(sources: Sources, backends: Sequence[str]) -> MissingGpu:
    """Returns the likeliest cause for a build with these backends of ggml, none of which lists a device."""
    cause = next(filter(None, (look(sources, backends) for look in _CAUSES)), _no_driver(backends))
    return MissingGpu(f"none, though llama.cpp is built for {', '.join(backends)}: {cause.found}", cause.remedy)


def closed_node(may_open: Callable[[str], bool | None]) -> MissingGpu | None:
    """Returns the GPU's device files that this user may not open, with the remedy; None where there are none."""
    closed = [node for node in (*RENDER_NODES, AMD_NODE, NVIDIA_NODE) if may_open(node) is False]
    if not closed:
        return None
    return MissingGpu(
        f"this user may not read and write {', '.join(closed)}",
        "add yourself to the render group: sudo usermod -aG render,video $USER, then log in again",
    )


def _closed_node(sources: Sources, backends: Sequence[str]) -> MissingGpu | None:
    return closed_node(sources.may_open)


def _nvidia(sources: Sources, backends: Sequence[str]) -> MissingGpu | None:
    driver = (sources.read(NVIDIA_DRIVER) or "").splitlines()
    if not driver:
        return None
    if sources.may_open(NVIDIA_NODE) is None:
        return MissingGpu(
            f"a driver ({driver[0]}), but no {NVIDIA_NODE}",
            "run nvidia-smi, which makes it; in a container, start that with --gpus all",
        )
    remedy = (
        "update the driver to the toolkit's version, see nvidia-smi; see whether CUDA_VISIBLE_DEVICES hides the GPU"
    )
    if "cuda" not in backends:
        remedy = "build it for CUDA: step35 backend build --cuda; or install the driver's Vulkan part (nvidia_icd.json)"
    return MissingGpu(f"a driver ({driver[0]}), but no device that llama.cpp can use", remedy)


def _open_node(sources: Sources, backends: Sequence[str]) -> MissingGpu | None:
    nodes = [node for node in RENDER_NODES if sources.may_open(node)]
    if not nodes:
        return None
    if "vulkan" in backends:
        remedy = (
            "install Mesa's Vulkan driver: mesa-vulkan-drivers (Debian, Fedora), vulkan-radeon or vulkan-intel (Arch); "
            "see whether GGML_VK_VISIBLE_DEVICES hides the GPU"
        )
    else:
        remedy = "build it for any GPU with Vulkan: step35 backend build --vulkan"
        if "hip" in backends:
            remedy = f"install ROCm for this GPU, see rocminfo; or {remedy}"
    return MissingGpu(f"{nodes[0]} is there, but no driver that llama.cpp can use", remedy)


_CAUSES: tuple[Callable[[Sources, Sequence[str]], MissingGpu | None], ...] = (_closed_node, _nvidia, _open_node)


def _no_driver(backends: Sequence[str]) -> MissingGpu:
    if "metal" in backends:
        return MissingGpu("Metal lists no device", f"run it outside a virtual machine; {NO_GPU}")
    return MissingGpu("no driver and no device file", f"install the GPU's driver; {NO_GPU}")
