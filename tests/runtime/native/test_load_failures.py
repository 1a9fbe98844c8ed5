"""What llama.cpp says where it can't load becomes the remedy that fits it."""

from pathlib import Path

import pytest

from step35.errors import BackendError, DoesNotFit, ModelError
from step35.native.chosen_build import VARIABLE, chosen_libraries
from step35.native.load_failures import library_remedy, memory_remedy
from step35.native.model import _refused
from step35.options import ModelOptions

VULKAN = (
    "alloc_tensor_range: failed to allocate Vulkan0 buffer of size 3221225472; "
    "llama_model_load: error loading model: unable to allocate Vulkan0 buffer"
)
CUT = "llama_model_load: error loading model: tensor 'output.weight' data is not within the file bounds"


@pytest.mark.parametrize(
    "said",
    [
        VULKAN,
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 512.00 MiB on device 0: cudaMalloc failed: out of memory",
        "vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "ggml_gallocr_reserve_n_impl: failed to allocate CUDA0 buffer of size 1",
        "graph_reserve: failed to allocate compute buffers",
    ],
)
def test_a_full_gpu_is_told(said: str) -> None:
    """Symptom: fetch the file again, said of a card whose memory was taken."""
    remedy = memory_remedy(said) or ""
    assert remedy.startswith("the GPU's memory is full: ")
    assert "--ngl" in remedy
    assert "step35 plan" in remedy


@pytest.mark.parametrize("buffer", ["CPU", "CPU_REPACK", "CUDA_Host"])
def test_full_ram_is_told_from_a_full_gpu(buffer: str) -> None:
    assert (memory_remedy(f"unable to allocate {buffer} buffer") or "").startswith("the RAM is full: ")


def test_a_file_that_was_cut_keeps_its_remedy() -> None:
    options = ModelOptions(Path("x.gguf"))
    cut, full = _refused(options, CUT), _refused(options, VULKAN)
    assert isinstance(cut, ModelError)
    assert str(cut) == f"can't load x.gguf: {CUT}; if a download was cut short, fetch the file again"
    assert isinstance(full, DoesNotFit)
    assert "download" not in str(full)


@pytest.mark.parametrize(
    ("library", "remedy"),
    [
        ("libvulkan.so.1", "libvulkan1 (Debian)"),
        ("libcuda.so.1", "NVIDIA's driver isn't installed here"),
        ("libcudart.so.13", "pip install nvidia-cuda-runtime"),
        ("libcublasLt.so.13", "pip install nvidia-cublas"),
        ("libamdhip64.so.7", "install the ROCm of the build"),
        ("libother.so.1", "install the package that has libother.so"),
    ],
)
def test_a_missing_library_is_named_with_its_package(library: str, remedy: str) -> None:
    """Symptom: remove the build and make it again, which would miss the same library."""
    said = f"Failed to load shared library '/b/libllama.so': {library}: cannot open shared object file: No such file"
    assert remedy in (library_remedy(said) or "")
    with pytest.raises(BackendError) as caught, chosen_libraries("0.3.36", {VARIABLE: "/b"}):
        raise RuntimeError(said)
    assert remedy in str(caught.value)
    assert "remove" not in str(caught.value)


def test_another_reason_is_not_a_missing_library() -> None:
    assert library_remedy("Failed to load shared library '/b/libllama.so': invalid ELF header") is None
    assert library_remedy("/b/libllama.so: cannot open shared object file: No such file") is None
