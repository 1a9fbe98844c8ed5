"""What a build for GPUs needs and the box lacks is said before the build, with where to get it."""

from dataclasses import replace

import pytest

from step35.backend.flags import BuildHost
from step35.backend.requirements import FEATURES, check_requirements
from step35.errors import BackendError

NEW = "#define VK_HEADER_VERSION 309\n#define VK_EXT_layer_settings 1\n"
OLD = "// VK_HEADER_VERSION is\n#define VK_HEADER_VERSION 239\n"
SDK = "get LunarG's Vulkan SDK's, pip has none"
VULKAN, SPIRV = "vulkan/vulkan_core.h", "spirv/unified1/spirv.hpp"
COMPLETE = {f"/usr/include/{VULKAN}": NEW, f"/usr/include/{SPIRV}": ""}


def box(files: dict[str, str], *unknown: str, **environment: str) -> BuildHost:
    """A box with glslc, which doesn't know some extensions, and nvcc where NVIDIA puts it."""

    def compile_shader(glslc: str, source: str) -> str:
        assert glslc == "/usr/bin/glslc"
        lines = [f"<stdin>:2: error: '#extension' : extension not supported: {name}" for name in unknown]
        return "\n".join(line for name, line in zip(unknown, lines, strict=True) if name in source)

    programs = {"glslc": "/usr/bin/glslc", "nvcc": "/opt/cuda/bin/nvcc"}
    return BuildHost("Linux", programs.get, environment, files.get, compile_shader)


def refused(files: dict[str, str], **environment: str) -> str:
    with pytest.raises(BackendError) as caught:
        check_requirements("vulkan", {}, box(files, **environment))
    return str(caught.value)


def test_a_complete_box_has_nothing_to_say() -> None:
    assert check_requirements("vulkan", {}, box(COMPLETE)) == []
    assert check_requirements("cpu", {}, box({})) == check_requirements("metal", {}, box({})) == []


def test_headers_that_are_too_old_are_refused_before_the_build() -> None:
    """Symptom: after minutes, 'LayerSettingEXT' is not a member of 'vk'; Debian 12 has such headers."""
    said = refused(COMPLETE | {f"/usr/include/{VULKAN}": OLD})
    assert said.startswith(
        "Vulkan's headers are too old: expected VK_EXT_layer_settings in them, got version 1.x.239; "
    )
    assert all(word in said for word in ("Debian 13", "(Fedora)", "(Arch)", "pip", "CPLUS_INCLUDE_PATH"))


@pytest.mark.parametrize("name", ["CPLUS_INCLUDE_PATH", "CPATH"])
def test_newer_headers_in_a_folder_of_their_own_are_found(name: str) -> None:
    files = COMPLETE | {f"/usr/include/{VULKAN}": OLD, f"/new/{VULKAN}": NEW}
    assert check_requirements("vulkan", {}, box(files, **{name: "/new"})) == []
    sdk = {f"/sdk/include/{VULKAN}": NEW, f"/sdk/include/{SPIRV}": ""}
    assert check_requirements("vulkan", {}, box(sdk, VULKAN_SDK="/sdk")) == []
    assert check_requirements("vulkan", {}, box(sdk, PATH="/bin:/sdk/bin")) == []


def test_missing_headers_are_named() -> None:
    assert refused({}).startswith(
        "no Vulkan headers: expected vulkan/vulkan_core.h in /usr/local/include or /usr/include"
    )
    assert refused({f"/usr/include/{VULKAN}": NEW}).startswith(
        "no SPIR-V headers: expected spirv/unified1/spirv.hpp in "
    )


def test_who_tells_cmake_where_things_are_is_not_refused() -> None:
    assert check_requirements("vulkan", {"Vulkan_INCLUDE_DIR": "/mine"}, box({})) == []
    assert check_requirements("vulkan", {}, box({}, CMAKE_PREFIX_PATH="/nix/store/x")) == []


def test_what_an_old_glslc_leaves_out_is_said() -> None:
    """Symptom: prompts are slow, and one line of cmake's log knows why."""
    (note,) = check_requirements("vulkan", {}, box(COMPLETE, "GL_KHR_cooperative_matrix", "GL_EXT_bfloat16"))
    assert note.startswith("/usr/bin/glslc lacks cooperative matrices, bfloat16: ")
    assert "Debian 13" in note
    (note,) = check_requirements("vulkan", {}, box(COMPLETE, *FEATURES))
    assert "integer dot products" in note
    (note,) = check_requirements("vulkan", {}, box(COMPLETE, "GL_EXT_bfloat16"))
    assert note == "/usr/bin/glslc lacks bfloat16: tensors of that type are slower than they could be; " + SDK


def test_a_user_outside_the_render_group_is_told_before_the_build() -> None:
    closed = replace(box(COMPLETE), may_open={"/dev/dri/renderD128": False}.get)
    (note,) = check_requirements("vulkan", {}, closed)
    assert note.startswith("the self-test will find no GPU: this user may not read and write /dev/dri/renderD128; ")
    assert "usermod -aG render" in note
    assert check_requirements("cpu", {}, closed) == []


def test_cublas_and_hipblas_are_notes_because_cmake_may_know_more_places() -> None:
    (note,) = check_requirements("cuda", {}, box({}))
    assert note.startswith("no cuBLAS seen: cublas_v2.h is in none of /opt/cuda/include, ")
    assert "pip install nvidia-cublas" in note
    assert check_requirements("cuda", {}, box({"/opt/cuda/targets/sbsa-linux/include/cublas_v2.h": ""})) == []
    (note,) = check_requirements("rocm", {}, box({}))
    assert note.startswith("no hipBLAS seen: hipblas/hipblas.h is in none of /opt/rocm/include, ")
    assert check_requirements("rocm", {}, box({"/r/include/hipblas/hipblas.h": ""}, ROCM_PATH="/r")) == []
