"""What cmake is told for a kind of processor: a pure function of what was asked for and what the box has."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from step35.errors import BackendError

TARGETS = ("cpu", "cuda", "rocm", "vulkan", "metal")
ARCHITECTURES = {
    "cuda": {
        "dgx-spark": "121-real",
        "rtx50": "120-real",
        "hopper": "90-real",
        "ada": "89-real",
        "ampere": "80-real;86-real",
    },
    "rocm": {"strix-halo": "gfx1151", "rdna4": "gfx1200;gfx1201", "rdna3": "gfx1100", "mi300": "gfx942"},
}
VULKAN_PACKAGES = (
    "libvulkan-dev, spirv-headers and glslc (Debian 13 or newer), vulkan-headers, vulkan-loader-devel, "
    "spirv-headers-devel and glslc (Fedora), vulkan-headers, vulkan-icd-loader, spirv-headers and shaderc (Arch), or "
    "LunarG's Vulkan SDK; pip has no glslc and no Vulkan headers"
)
_PATTERNS = {"cuda": r"(?:sm_)?(\d{2,3}[af]?(?:-real|-virtual)?)", "rocm": r"(gfx[0-9a-f]{3,4})"}
_SWITCHES = {"cuda": "GGML_CUDA", "rocm": "GGML_HIP", "vulkan": "GGML_VULKAN", "metal": "GGML_METAL"}
# The wheel's own settings where they decide the arithmetic; ggml's RPC backend; and nothing that isn't used.
_COMMON = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "GGML_RPC": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH_USE_LINK_PATH": "ON",
}


def _no_file(path: str) -> str | None:
    return None


def _no_device(path: str) -> bool | None:
    return None


def _no_errors(glslc: str, source: str) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class BuildHost:
    """What decides the flags of a box."""

    system: str
    """platform.system()"""
    which: Callable[[str], str | None]
    """Returns the path of a program, as shutil.which does."""
    environment: Mapping[str, str]
    read: Callable[[str], str | None] = _no_file
    """Returns a file's text, None where there is none."""
    compile_shader: Callable[[str, str], str] = _no_errors
    """Compiles a compute shader's source with a glslc; returns what it says of errors."""
    may_open: Callable[[str], bool | None] = _no_device
    """Whether this user may read and write a device's file; None where there is none."""


@dataclass(frozen=True, slots=True)
class Flags:
    """What cmake is told."""

    target: str
    architectures: str
    """As cmake wants them, "" for those of this box."""
    definitions: dict[str, str]
    """What decides the libraries, for the key too."""
    toolchain: dict[str, str]
    """Where this box has its compilers: definitions."""
    environment: dict[str, str]
    """The same for cmake's environment."""


def flags_for(target: str, architectures: Sequence[str], extra: Mapping[str, str], box: BuildHost) -> Flags:
    """Returns the flags; raises BackendError on an unknown architecture or where the toolkit is missing."""
    target = target or ("metal" if box.system == "Darwin" else "cpu")
    archs = _architectures(target, architectures)
    toolchain, environment = _TOOLCHAINS[target](box)
    origin = "@loader_path" if box.system == "Darwin" else "$ORIGIN"
    definitions = _COMMON | {"CMAKE_INSTALL_RPATH": origin} | _switches(target, box) | _arch_flags(target, archs)
    return Flags(target, archs, definitions | dict(extra), toolchain, environment)


def _switches(target: str, box: BuildHost) -> dict[str, str]:
    switches = {_SWITCHES[target]: "ON"} if target in _SWITCHES else {}
    if target == "metal":
        return switches | {"GGML_METAL_EMBED_LIBRARY": "ON"}
    return switches | ({"GGML_METAL": "OFF"} if box.system == "Darwin" else {})


def _arch_flags(target: str, archs: str) -> dict[str, str]:
    return {{"cuda": "CMAKE_CUDA_ARCHITECTURES", "rocm": "GPU_TARGETS"}[target]: archs} if archs else {}


def _architectures(target: str, names: Sequence[str]) -> str:
    found = [_architecture(target, name) for name in names]
    return ";".join(dict.fromkeys(";".join(found).split(";"))) if found else ""


def _architecture(target: str, name: str) -> str:
    known = ARCHITECTURES.get(target, {})
    number = re.fullmatch(_PATTERNS.get(target, "(?!)"), name)
    if name in known:
        return known[name]
    if number:
        return number[1]
    want = f"one of {', '.join(known)} or a number such as {'sm_121' if target == 'cuda' else 'gfx1151'}"
    raise BackendError(f"unknown architecture: expected {want if known else f'none for {target}'}, got {name!r}")


# where a box has its compilers


def _no_toolchain(box: BuildHost) -> tuple[dict[str, str], dict[str, str]]:
    return {}, {}


def _cuda(box: BuildHost) -> tuple[dict[str, str], dict[str, str]]:
    if "CUDACXX" in box.environment or box.which("nvcc"):
        return {}, {}
    nvcc = box.which("/usr/local/cuda/bin/nvcc")  # where NVIDIA's packages put it, in no PATH
    if not nvcc:
        raise BackendError("no CUDA toolkit: expected nvcc in PATH or /usr/local/cuda/bin; install it, or set CUDACXX")
    return {"CMAKE_CUDA_COMPILER": nvcc}, {}


def _rocm(box: BuildHost) -> tuple[dict[str, str], dict[str, str]]:
    if "HIPCXX" in box.environment:
        return {}, {}
    root = box.environment.get("ROCM_PATH", "/opt/rocm")
    clang = next(filter(box.which, (f"{root}/llvm/bin/clang", f"{root}/lib/llvm/bin/clang")), None)
    if not clang:
        raise BackendError(f"no ROCm: expected clang in {root}/llvm/bin; install ROCm, or set ROCM_PATH or HIPCXX")
    return {}, {"HIPCXX": clang, "HIP_PATH": root}


def _vulkan(box: BuildHost) -> tuple[dict[str, str], dict[str, str]]:
    if not box.which("glslc"):
        raise BackendError(f"no Vulkan SDK: expected glslc in PATH; get {VULKAN_PACKAGES}")
    return {}, {}


def _metal(box: BuildHost) -> tuple[dict[str, str], dict[str, str]]:
    if box.system != "Darwin":
        raise BackendError(f"--metal is for a Mac: expected Darwin, got {box.system}")
    return {}, {}


_TOOLCHAINS = {"cpu": _no_toolchain, "cuda": _cuda, "rocm": _rocm, "vulkan": _vulkan, "metal": _metal}
