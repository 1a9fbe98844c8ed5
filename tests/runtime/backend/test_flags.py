"""What cmake is told, by what was asked for and what the box has: pure, so that GPUs need none here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35.backend.flags import ARCHITECTURES, TARGETS, BuildHost, flags_for
from step35.errors import BackendError


def box(*programs: str, system: str = "Linux", **environment: str) -> BuildHost:
    """A box with some programs in its PATH or at full paths."""
    return BuildHost(system, lambda name: name if name in programs else None, environment)


FULL = box("nvcc", "glslc", "/opt/rocm/llvm/bin/clang")
GPU_SWITCHES = {"GGML_CUDA", "GGML_HIP", "GGML_VULKAN", "GGML_METAL"}


def test_the_cpu_build_is_the_wheels_and_has_rpc() -> None:
    flags = flags_for("", (), {}, box())
    assert flags.target == "cpu"
    assert not GPU_SWITCHES & flags.definitions.keys()
    assert flags.definitions["GGML_NATIVE"] == flags.definitions["GGML_RPC"] == "ON"
    assert flags.definitions["CMAKE_BUILD_TYPE"] == "Release"
    assert flags.definitions["CMAKE_INSTALL_RPATH"] == "$ORIGIN"
    assert (flags.architectures, flags.toolchain, flags.environment) == ("", {}, {})


@pytest.mark.parametrize(("target", "switch"), [("cuda", "GGML_CUDA"), ("rocm", "GGML_HIP"), ("vulkan", "GGML_VULKAN")])
def test_a_gpu_is_one_switch_and_rpc_stays_on(target: str, switch: str) -> None:
    definitions = flags_for(target, (), {}, FULL).definitions
    assert GPU_SWITCHES & definitions.keys() == {switch}
    assert definitions[switch] == definitions["GGML_RPC"] == "ON"
    assert "CMAKE_CUDA_ARCHITECTURES" not in definitions  # cmake asks the GPU of this box


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["dgx-spark"], "121-real"),
        (["sm_121"], "121"),
        (["121a-real"], "121a-real"),
        (["hopper", "ada"], "90-real;89-real"),
        (["ampere", "ampere", "sm_90"], "80-real;86-real;90"),
    ],
)
def test_cuda_architectures_have_names_and_numbers(names: list[str], want: str) -> None:
    flags = flags_for("cuda", names, {}, FULL)
    assert flags.architectures == flags.definitions["CMAKE_CUDA_ARCHITECTURES"] == want


def test_rocm_has_targets_and_its_own_clang() -> None:
    flags = flags_for("rocm", ["strix-halo"], {}, FULL)
    assert flags.definitions["GPU_TARGETS"] == "gfx1151"
    assert flags.environment == {"HIPCXX": "/opt/rocm/llvm/bin/clang", "HIP_PATH": "/opt/rocm"}


@pytest.mark.parametrize(
    ("target", "name", "message"),
    [
        ("cuda", "spark", r"expected one of dgx-spark, rtx50, .* or a number such as sm_121, got 'spark'"),
        ("cuda", "gfx1151", "or a number such as sm_121"),
        ("rocm", "sm_90", "or a number such as gfx1151"),
        ("cpu", "sm_90", "expected none for cpu, got 'sm_90'"),
        ("vulkan", "sm_90", "expected none for vulkan"),
    ],
)
def test_an_architecture_of_another_kind_is_refused(target: str, name: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        flags_for(target, [name], {}, FULL)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("cuda", "no CUDA toolkit: expected nvcc in PATH or /usr/local/cuda/bin"),
        ("rocm", "no ROCm: expected clang in /opt/rocm/llvm/bin"),
        ("vulkan", "no Vulkan SDK: expected glslc"),
        ("metal", "--metal is for a Mac: expected Darwin, got Linux"),
    ],
)
def test_a_missing_toolkit_is_said_before_anything_is_fetched(target: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        flags_for(target, (), {}, box())


def test_cuda_is_found_where_nvidia_puts_it() -> None:
    """Its packages, those of DGX OS too, leave /usr/local/cuda/bin out of PATH."""
    nvcc = "/usr/local/cuda/bin/nvcc"
    assert flags_for("cuda", (), {}, box(nvcc)).toolchain == {"CMAKE_CUDA_COMPILER": nvcc}
    assert flags_for("cuda", (), {}, box(nvcc, "nvcc")).toolchain == {}
    assert flags_for("cuda", (), {}, box(CUDACXX="/elsewhere/nvcc")).toolchain == {}


def test_a_mac_builds_for_metal_unless_told_otherwise() -> None:
    mac = box("glslc", system="Darwin")
    assert flags_for("", (), {}, mac).definitions["GGML_METAL"] == "ON"
    assert flags_for("", (), {}, mac).target == "metal"
    assert flags_for("cpu", (), {}, mac).definitions["GGML_METAL"] == "OFF"
    assert flags_for("", (), {}, mac).definitions["CMAKE_INSTALL_RPATH"] == "@loader_path"


@given(st.sampled_from(["cpu", "cuda", "rocm", "vulkan"]), st.data())
def test_a_setting_of_the_users_wins(target: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(flags_for(target, (), {}, FULL).definitions)))
    flags = flags_for(target, (), {name: "mine"}, FULL)
    assert flags.definitions == flags_for(target, (), {}, FULL).definitions | {name: "mine"}


def test_every_target_and_architecture_has_flags() -> None:
    for target in TARGETS:
        where = box(system="Darwin") if target == "metal" else FULL
        for name in ARCHITECTURES.get(target, {}):
            assert ARCHITECTURES[target][name] in flags_for(target, [name], {}, where).definitions.values()
        assert flags_for(target, (), {}, where).target == target
