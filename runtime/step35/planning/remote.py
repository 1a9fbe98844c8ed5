"""A second box through llama.cpp's rpc-server: what it has, asked over its own protocol, and how it joins a machine.

The protocol is ggml-rpc.cpp's: a byte for the command, eight for the size, then the request; answers likewise. Only
its greeting and two questions are spoken here, so a plan needs no llama.cpp that was built with RPC.
"""

import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from step35.errors import SettingsError
from step35.native.device_kinds import REMOTE
from step35.planning.machine import GIB, Gpu, Machine, find_machine
from step35.planning.speed import host_flops

PROTOCOL = 7
"""ggml's RPC_PROTO_MAJOR_VERSION; answers of another one mean something else."""
_MEMORY, _HELLO, _COUNT = 11, 14, 15
_CAPABILITIES = bytes(24)
TIMEOUT_S = 3.0
RESERVE = 2 * GIB
"""What a plan leaves free on a box that it knows only by its server's word."""
ASSUMED_LATENCY_S = 0.2e-3
MOST_DEVICES = 16
UNKNOWN_NETWORK = 1.25e9
"""Bytes a second, 10 Gbit/s, where nobody says."""


@dataclass(frozen=True, slots=True)
class RemoteDevice:
    """A device of an rpc-server."""

    free_bytes: int
    total_bytes: int
    latency_s: float


def parse_endpoint(text: str) -> tuple[str, int]:
    """Returns host and port; raises SettingsError on anything but HOST:PORT."""
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise SettingsError(f"bad RPC host: expected HOST:PORT such as 192.168.1.20:50052, got {text!r}")
    return host.strip("[]"), int(port)


def ask(endpoint: str, clock: Callable[[], float] = time.perf_counter) -> list[RemoteDevice]:
    """Returns the devices of an rpc-server; raises SettingsError if it can't be reached or speaks another protocol."""
    host, port = parse_endpoint(endpoint)
    try:
        with socket.create_connection((host, port), TIMEOUT_S) as server:
            version = _request(server, _HELLO, _CAPABILITIES, 4 + len(_CAPABILITIES))
            if version[0] != PROTOCOL:
                raise SettingsError(
                    f"another RPC protocol: {endpoint} expected version {PROTOCOL}, got {version[0]}; "
                    "run the rpc-server of the same llama.cpp there"
                )
            (n_devices,) = struct.unpack("<I", _request(server, _COUNT, b"", 4))
            return [_device(server, index, clock) for index in range(min(n_devices, MOST_DEVICES))]
    except OSError as error:
        raise SettingsError(
            f"unreachable RPC host: {endpoint}: {error.strerror or error}; start llama.cpp's rpc-server there "
            f"(rpc-server -H 0.0.0.0 -p {port}), and let the port through"
        ) from error


def _device(server: socket.socket, index: int, clock: Callable[[], float]) -> RemoteDevice:
    return min((_measured(server, index, clock) for _ in range(3)), key=lambda device: device.latency_s)


def _measured(server: socket.socket, index: int, clock: Callable[[], float]) -> RemoteDevice:
    started = clock()
    free, total = struct.unpack("<QQ", _request(server, _MEMORY, struct.pack("<I", index), 16))
    return RemoteDevice(free, total, clock() - started)


def _request(server: socket.socket, command: int, data: bytes, n_answer: int) -> bytes:
    server.sendall(struct.pack("<BQ", command, len(data)) + data)
    (n_bytes,) = struct.unpack("<Q", _receive(server, 8))
    if n_bytes != n_answer:
        raise OSError(f"not an rpc-server's answer: expected {n_answer} bytes, got {n_bytes}")
    return _receive(server, n_bytes)


def _receive(server: socket.socket, n_bytes: int) -> bytes:
    data = b""
    while len(data) < n_bytes:
        part = server.recv(n_bytes - len(data))
        if not part:
            raise OSError("it closed the connection; another rpc-server's protocol, or no rpc-server")
        data += part
    return data


# as a part of a machine


def with_remotes(machine: Machine, hosts: Sequence[str], network_bandwidth: float) -> Machine:
    """Returns a machine with remote GPUs before its own, in llama.cpp's order.

    A host is HOST:PORT of a running rpc-server, or the name of a machine of models.yaml to plan for unseen.
    """
    remotes = [gpu for host in hosts for gpu in _remotes(machine, host, network_bandwidth)]
    return replace(machine, gpus=(*remotes, *machine.gpus))


def _remotes(machine: Machine, host: str, network_bandwidth: float) -> list[Gpu]:
    if ":" in host:
        like = machine.gpus[0] if machine.gpus else _as_gpu(machine)
        return [
            _remote(like, host, d.total_bytes, d.free_bytes - RESERVE, network_bandwidth, d.latency_s)
            for d in ask(host)
        ]
    other = find_machine(host)
    like = other.gpus[0] if other.gpus else _as_gpu(other)
    is_own = other.gpus and not other.is_unified
    free = like.free_bytes if is_own else min(like.free_bytes, other.available_bytes - other.reserve_bytes)
    return [_remote(like, host, like.total_bytes, free, network_bandwidth, ASSUMED_LATENCY_S)]


def _remote(like: Gpu, host: str, total: int, free: int, bandwidth: float, latency_s: float) -> Gpu:
    """Returns a remote GPU: its server tells its memory, its speed is taken to be that of `like`."""
    return replace(
        like,
        name=f"RPC {host}",
        kind=REMOTE,
        total_bytes=total,
        free_bytes=max(0, free),
        host_bandwidth=bandwidth,
        latency_s=latency_s,
    )


def _as_gpu(machine: Machine) -> Gpu:
    """Returns a machine's processor as an rpc-server would lend it."""
    return Gpu(
        name=machine.name,
        kind=REMOTE,
        total_bytes=machine.total_bytes,
        free_bytes=machine.available_bytes,
        bandwidth=machine.bandwidth,
        host_bandwidth=machine.bandwidth,
        flops=host_flops(machine),
        reserve_bytes=0,
        decode_share=machine.decode_share,
        kv_share=machine.decode_share,
    )
