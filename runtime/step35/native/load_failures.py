"""What to do where llama.cpp can't load a model, open a context or be loaded itself, by what it said. Pure."""

import re

_BUFFER = re.compile(r"(?:failed|unable) to allocate (\w+) buffer")
_GPU_IS_FULL = re.compile(
    r"out of memory|OutOfDeviceMemory|failed to allocate (?:buffer|compute)|Requested buffer size"
)
_LIBRARY = re.compile(r"(?:^|[\s:])(lib[\w+-]+)\.so[\w.]*: cannot open shared object file")
DRIVER_IS_MISSING = "NVIDIA's driver isn't installed here"
_LIBRARIES = {
    "libvulkan": "the Vulkan loader isn't installed: libvulkan1 (Debian), vulkan-loader (Fedora), "
    "vulkan-icd-loader (Arch)",
    "libcuda": f"{DRIVER_IS_MISSING}; in a container, start that with --gpus all",
    "libcudart": "CUDA's runtime isn't found: install the toolkit of the build, or pip install nvidia-cuda-runtime; "
    "LD_LIBRARY_PATH names its folder",
    "libcublas": "cuBLAS isn't found: install the toolkit of the build, or pip install nvidia-cublas; "
    "LD_LIBRARY_PATH names its folder",
    "libamdhip64": "ROCm's runtime isn't found: install the ROCm of the build; LD_LIBRARY_PATH names its folder",
    "libhipblas": "ROCm's hipBLAS isn't found: install hipblas; LD_LIBRARY_PATH names its folder",
    "librocblas": "ROCm's rocBLAS isn't found: install rocblas; LD_LIBRARY_PATH names its folder",
    "libgomp": "OpenMP's runtime isn't installed: libgomp1 (Debian), libgomp (Fedora), gcc-libs (Arch)",
}


def memory_remedy(reason: str) -> str | None:
    """Returns what to do where llama.cpp's errors say that a memory is full; None where they say something else."""
    buffer = _BUFFER.search(reason)
    if buffer and (buffer[1].startswith("CPU") or buffer[1].endswith("_Host")):
        return "the RAM is full: end other programs, ask for a smaller context (--ctx), or make a plan (step35 plan)"
    if buffer or _GPU_IS_FULL.search(reason):
        return (
            "the GPU's memory is full: end other programs, ask for fewer layers (--ngl) or a smaller context (--ctx), "
            "or make a plan (step35 plan)"
        )
    return None


def library_remedy(reason: str) -> str | None:
    """Returns which package or driver a loader's message misses; None where it is another message."""
    missing = _LIBRARY.search(reason)
    if not missing:
        return None
    name = missing[1].removesuffix("Lt")  # cublasLt comes with cublas
    return _LIBRARIES.get(name, f"install the package that has {missing[1]}.so")
