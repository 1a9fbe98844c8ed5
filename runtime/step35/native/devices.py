"""The GPUs that llama.cpp finds, on this box and behind rpc-servers."""

import ctypes
import os
import sys
from collections.abc import Iterator

from step35.errors import NativeError
from step35.native.device_kinds import DISCRETE, INTEGRATED, Device, used
from step35.native.library import C, bind, start_backend


class _DeviceProps(ctypes.Structure):
    _fields_ = [(name, ctypes.c_char_p) for name in ("name", "description")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("free", "total")]
    _fields_ += [("type", ctypes.c_int), ("id", ctypes.c_char_p), ("caps", ctypes.c_bool * 16)]


_device_count = bind("ggml_backend_dev_count", "", [], ctypes.c_size_t)
_device_get = bind("ggml_backend_dev_get", "", [ctypes.c_size_t], ctypes.c_void_p)
_device_props = bind("ggml_backend_dev_get_props", "", [ctypes.c_void_p, ctypes.POINTER(_DeviceProps)], None)
_GPU_BACKENDS = ("cann", "cuda", "hip", "metal", "musa", "opencl", "sycl", "vulkan", "webgpu")
_GPU_KINDS = {1: DISCRETE, 2: INTEGRATED}


def may_have_gpus() -> bool:
    """Whether this build of llama.cpp may know GPUs; unlike `devices`, reads nothing of ggml's environment."""
    names = _ggml_libraries()
    return not names or bool(names - {"ggml", "ggml-base", "ggml-cpu", "ggml-blas", "ggml-rpc"})


def gpu_backends() -> list[str]:
    """Returns ggml's names of this build's GPU backends; none where ggml's libraries don't stand apart."""
    return sorted(name for name in _GPU_BACKENDS if f"ggml-{name}" in _ggml_libraries())


def _ggml_libraries() -> set[str]:
    return {path.name.split(".")[0].removeprefix("lib") for path in C._base_path.glob("*ggml*")}


def devices() -> list[Device]:
    """Returns the GPUs that llama.cpp was built for and finds."""
    found = []
    for props in _gpus():
        if props.name.startswith(_RPC):
            continue  # another box's
        name, address = props.description.decode(), props.id.decode() if props.id else None
        found.append(Device(name, _GPU_KINDS[props.type], props.total, props.free, address))
    return found


def used_devices() -> list[Device]:
    """Returns those of this box's GPUs that llama.cpp takes."""
    return used(devices())


def gpu_names() -> list[str]:
    """Returns the names that buffers on the GPUs have, such as CUDA0 or RPC0[HOST:PORT], in the order of a plan's.

    ggml counts remote devices through, but their buffers anew for each server.
    """
    gpus = list(_gpus())
    remote = [gpu.description.decode() for gpu in gpus if gpu.name.startswith(_RPC)]
    names = [f"RPC{remote[:i].count(endpoint)}[{endpoint}]" for i, endpoint in enumerate(remote)]
    own = [gpu for gpu in gpus if not gpu.name.startswith(_RPC)]
    cards = [gpu for gpu in own if _GPU_KINDS[gpu.type] == DISCRETE]
    return [*names, *(gpu.name.decode() for gpu in cards or own)]


def _gpus() -> Iterator[_DeviceProps]:
    """Yields each GPU once, as llama.cpp takes them: two backends (CUDA, Vulkan) may know the same one."""
    start_backend()
    seen: set[bytes] = set()
    for index in range(_device_count()):
        props = _DeviceProps()
        _device_props(_device_get(index), props)
        if props.type in _GPU_KINDS and props.id not in seen:
            seen |= {props.id} if props.id else set()
            yield props


# other boxes

_RPC = b"RPC"
_reg_by_name = bind("ggml_backend_reg_by_name", "", [ctypes.c_char_p], ctypes.c_void_p)
_reg_address = bind("ggml_backend_reg_get_proc_address", "", [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p)
_register = bind("ggml_backend_register", "", [ctypes.c_void_p], None)
_added: set[str] = set()
_OnAbort = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_set_on_abort = bind("ggml_set_abort_callback", "", [_OnAbort], ctypes.c_void_p)


@_OnAbort
def _end_in_a_line(message: bytes) -> None:
    """Ends the process where ggml would abort it, with a backtrace: so it goes where a second box has gone."""
    sys.stdout.flush()
    reason = message.decode(errors="replace").rpartition(": ")[2]
    line = (
        f"step35: error: llama.cpp gave up: {reason}; see whether the second box's rpc-server runs, and start again\n"
    )
    os.write(2, line.encode())
    os._exit(1)


def add_rpc_server(endpoint: str) -> None:
    """Makes a running rpc-server's devices ours; raises NativeError if this llama.cpp can't."""
    start_backend()
    _set_on_abort(_end_in_a_line)
    registry = _reg_by_name(_RPC)
    address = _reg_address(registry, b"ggml_backend_rpc_add_server") if registry else None
    if not address:
        raise NativeError(
            f"can't use {endpoint}: this llama.cpp expected to be built with RPC, got no RPC backend; "
            "step35 backend build makes one"
        )
    if endpoint not in _added:
        server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)(endpoint.encode())
        if not server:
            raise NativeError(f"can't use {endpoint}: its rpc-server refused; see its output")
        _register(server)
        _added.add(endpoint)
