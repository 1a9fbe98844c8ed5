"""What a build for GPUs needs beside its compiler: what this box lacks is said before anything is fetched.

Only what would stop the build for certain is refused; the rest is a note, as cmake may find more places.
"""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from step35.backend.flags import VULKAN_PACKAGES, BuildHost
from step35.errors import BackendError
from step35.selftest.missing_gpu import closed_node

FEATURES = {
    "GL_KHR_cooperative_matrix": "cooperative matrices",
    "GL_EXT_integer_dot_product": "integer dot products",
    "GL_EXT_bfloat16": "bfloat16",
}
"""The extensions of glslc that ggml's shaders use, each left out without a word where glslc doesn't know it."""
_NEWER_GLSLC = (
    "prompts are read slower than the GPU could; get glslc of Debian 13 or newer, of Fedora or Arch (shaderc), or "
)
_SDK = "LunarG's Vulkan SDK's, pip has none"
_CUBLAS = (
    "install CUDA's toolkit with its libraries: libcublas-dev-13-0 (Debian) or libcublas-devel-13-0 (Fedora) of "
    "NVIDIA's repository, cuda (Arch), or pip install nvidia-cublas, and name its folder by CPATH and "
    "-D CUDA_cublas_LIBRARY=FILE"
)
_ROCM_LIBRARIES = (
    "install hipblas and rocblas with their headers: hipblas-dev rocblas-dev (Debian), hipblas-devel rocblas-devel "
    "(Fedora), rocm-hip-sdk (Arch); pip has none"
)


def check_requirements(target: str, extra: Mapping[str, str], box: BuildHost) -> list[str]:
    """Returns notes on what the build will lack; raises BackendError on what would stop it after minutes."""
    closed = closed_node(box.may_open) if target in ("vulkan", "cuda", "rocm") else None
    notes = [f"the self-test will find no GPU: {closed.found}; {closed.remedy}"] if closed else []
    return [*notes, *_missing_parts(target, extra, box)]


def _missing_parts(target: str, extra: Mapping[str, str], box: BuildHost) -> list[str]:
    if target == "vulkan":
        _check_headers(extra, box)
        return list(_missing_features(box))
    if target == "cuda":
        return _note(box, "cublas_v2.h", _cuda_folders(box), "cuBLAS", _CUBLAS)
    if target == "rocm":
        root = box.environment.get("ROCM_PATH", "/opt/rocm")
        return _note(box, "hipblas/hipblas.h", [f"{root}/include", *_folders(box)], "hipBLAS", _ROCM_LIBRARIES)
    return []


def _check_headers(extra: Mapping[str, str], box: BuildHost) -> None:
    """Raises BackendError where Vulkan's or SPIR-V's headers are missing or too old for ggml."""
    if _names_its_own(extra, box):
        return
    folders = _folders(box)
    texts = [text for folder in folders if (text := box.read(f"{folder}/vulkan/vulkan_core.h")) is not None]
    if not texts:
        raise BackendError(
            f"no Vulkan headers: expected vulkan/vulkan_core.h in {' or '.join(folders)}; get {VULKAN_PACKAGES}"
        )
    if not any("VK_EXT_layer_settings" in text for text in texts):
        raise BackendError(
            f"Vulkan's headers are too old: expected VK_EXT_layer_settings in them, got version {_version(texts[0])}; "
            f"get {VULKAN_PACKAGES}; CPLUS_INCLUDE_PATH names a folder of newer ones"
        )
    if all(box.read(f"{folder}/spirv/unified1/spirv.hpp") is None for folder in folders):
        raise BackendError(
            f"no SPIR-V headers: expected spirv/unified1/spirv.hpp in {' or '.join(folders)}; get {VULKAN_PACKAGES}"
        )


def _names_its_own(extra: Mapping[str, str], box: BuildHost) -> bool:
    """Whether the user tells cmake where things are: it knows places then that aren't searched here."""
    names = ("CMAKE_PREFIX_PATH", "CMAKE_INCLUDE_PATH", "CMAKE_TOOLCHAIN_FILE")
    own = any(name.startswith(("Vulkan_", "SPIRV-Headers_")) or name in names for name in extra)
    return own or any(name in box.environment for name in names)


def _folders(box: BuildHost) -> list[str]:
    """Returns where the compiler and cmake look for headers."""
    paths = ":".join(box.environment.get(name, "") for name in ("CPLUS_INCLUDE_PATH", "CPATH"))
    roots = [box.environment.get(name) for name in ("VULKAN_SDK", "CONDA_PREFIX")]
    programs = [PurePosixPath(path) for path in box.environment.get("PATH", "").split(":")]
    prefixes = [str(path.parent) for path in programs if path.name == "bin" and str(path.parent) != "/"]
    found = [*paths.split(":"), *(f"{root}/include" for root in (*roots, *prefixes, "/usr/local", "/usr") if root)]
    return list(dict.fromkeys(filter(None, found)))


def _version(header: str) -> str:
    words = next((line.split() for line in header.splitlines() if line.startswith("#define VK_HEADER_VERSION ")), [])
    return f"1.x.{words[-1]}" if words else "unknown"


def _missing_features(box: BuildHost) -> Iterator[str]:
    """Yields a note on what glslc doesn't know, tried as ggml's own cmake does."""
    glslc = box.which("glslc")
    said = {name: box.compile_shader(glslc, _shader(name)) for name in FEATURES} if glslc else {}
    lacking = [FEATURES[name] for name, errors in said.items() if f"extension not supported: {name}" in errors]
    if lacking == ["bfloat16"]:  # Debian 13's doesn't know it either
        yield f"{glslc} lacks bfloat16: tensors of that type are slower than they could be; get {_SDK}"
    elif lacking:
        yield f"{glslc} lacks {', '.join(lacking)}: {_NEWER_GLSLC}{_SDK}"


def _shader(extension: str) -> str:
    return f"#version 460\n#extension {extension} : require\nvoid main() {{}}\n"


def _cuda_folders(box: BuildHost) -> list[str]:
    nvcc = box.environment.get("CUDACXX") or box.which("nvcc") or box.which("/usr/local/cuda/bin/nvcc") or ""
    root = PurePosixPath(nvcc).parent.parent
    targets = [f"{root}/targets/{name}-linux/include" for name in ("x86_64", "sbsa", "aarch64")]
    return [f"{root}/include", *targets, "/usr/local/cuda/include", *_folders(box)]


def _note(box: BuildHost, header: str, folders: list[str], library: str, remedy: str) -> list[str]:
    if any(box.read(f"{folder}/{header}") is not None for folder in folders):
        return []
    return [
        f"no {library} seen: {header} is in none of {', '.join(dict.fromkeys(folders))}; if cmake misses it, {remedy}"
    ]
