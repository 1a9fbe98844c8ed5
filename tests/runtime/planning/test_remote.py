"""A second box: asked over llama.cpp's rpc protocol, planned by whole layers, and refused clearly where it can't be."""

import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planned_gguf
from checkpoints import REAL
from step35.errors import NativeError, SettingsError
from step35.native import devices
from step35.native.device_kinds import REMOTE
from step35.planning import remote
from step35.planning.llama_options import engine_options
from step35.planning.machine import GIB, known_machines
from step35.planning.model_header import read_header
from step35.planning.placement import Constraints, place
from step35.planning.plan_file import from_text, to_text
from step35.planning.remote import ask, parse_endpoint, with_remotes
from tiny_model import tiny_gguf

TEN_GBIT = 1.25e9


@contextmanager
def rpc_server(*memories: tuple[int, int], version: int = remote.PROTOCOL, garbage: bytes = b"") -> Iterator[str]:
    """A server that says (free, total) of its devices as rpc_serve_client in ggml-remote.cpp does; yields HOST:PORT."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve, args=(listener, memories, version, garbage), daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


def _serve(listener, memories, version, garbage) -> None:
    connection, _ = listener.accept()
    with connection:
        while head := connection.recv(9, socket.MSG_WAITALL):
            command, n_bytes = struct.unpack("<BQ", head)
            data = connection.recv(n_bytes, socket.MSG_WAITALL) if n_bytes else b""
            if garbage:
                connection.sendall(garbage)
                return
            connection.sendall(_answer(command, data, memories, version))


def _answer(command: int, data: bytes, memories, version: int) -> bytes:
    if command == 14:
        answer = bytes([version, 0, 0, 0]) + bytes(24)
    elif command == 15:
        answer = struct.pack("<I", len(memories))
    else:
        assert command == 11
        answer = struct.pack("<QQ", *memories[struct.unpack("<I", data)[0]])
    return struct.pack("<Q", len(answer)) + answer


def test_a_server_tells_its_devices():
    with rpc_server((100 * GIB, 121 * GIB), (5 * GIB, 8 * GIB)) as endpoint:
        devices = ask(endpoint)
    assert [(d.free_bytes, d.total_bytes) for d in devices] == [(100 * GIB, 121 * GIB), (5 * GIB, 8 * GIB)]
    assert all(0 < d.latency_s < 3 for d in devices)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_server_that_is_not_there_is_one_line():
    port = free_port()
    with pytest.raises(
        SettingsError, match=rf"unreachable RPC host: 127.0.0.1:{port}: Connection refused; start .* -p {port}"
    ):
        ask(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "another RPC protocol: .* expected version 7, got 3"),
        ({"garbage": b"HTTP/1.1 400 Bad Request\r\n\r\n"}, "unreachable RPC host: .* not an rpc-server's answer"),
        ({"garbage": b"HTTP"}, "unreachable RPC host: .* it closed the connection"),
    ],
)
def test_a_server_that_is_another_one_is_refused(options, message):
    with rpc_server((1, 1), **options) as endpoint, pytest.raises(SettingsError, match=message):
        ask(endpoint)


@pytest.mark.parametrize("text", ["", "spark", "spark:", ":50052", "spark:0", "spark:65536", "spark:5o"])
def test_an_endpoint_has_a_host_and_a_port(text):
    with pytest.raises(SettingsError, match="bad RPC host: expected HOST:PORT"):
        parse_endpoint(text)
    assert parse_endpoint("[::1]:50052") == ("::1", 50052)


# plans


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return read_header(planned_gguf.write(tmp_path_factory.mktemp("rpc") / "real.gguf", REAL, "MOE_Q5_K_Q6_K"))


@pytest.fixture(scope="module")
def two_sparks():
    return with_remotes(known_machines()["dgx-spark"], ["dgx-spark"], TEN_GBIT)


def test_two_sparks_hold_what_one_cannot(real, two_sparks):
    one, constraints = known_machines()["dgx-spark"], Constraints(n_ctx=32768, rpc=("dgx-spark",))
    assert not place(real, one, Constraints(n_ctx=32768)).fits
    report = place(real, two_sparks, constraints)
    assert report.fits
    assert report.placement.policy == "rpc"
    layers = report.placement.layout.layers
    assert list(layers) == sorted(layers)  # one cut: the remote box's layers first
    assert abs(layers.count("GPU0") - layers.count("GPU1")) <= 4
    assert report.placement.layout.output == "GPU1"
    used = [sum(report.usage[device].values()) for device in ("GPU0", "GPU1")]
    assert all(used)


def test_layers_and_output_are_cut_where_llama_cpp_will(real, two_sparks):
    placement = place(real, two_sparks, Constraints(n_ctx=32768, rpc=("10.0.0.2:50052",))).placement
    options = engine_options(placement, real)
    assert options.rpc == ("10.0.0.2:50052",)
    assert options.load(Path("m.gguf"), with_heads=True).rpc == options.rpc
    assert len(options.tensor_split) == 2
    assert from_text(to_text(placement, "m.gguf"), "plan.yaml", real, two_sparks) == placement


@settings(max_examples=20)
@given(st.floats(1e7, 1e11), st.floats(0, 1e-2), st.floats(1.01, 100))
def test_a_worse_network_is_never_estimated_faster(real, two_sparks, bandwidth, latency_s, factor):
    good = _with_network(two_sparks, bandwidth, latency_s)
    for worse in (
        _with_network(two_sparks, bandwidth / factor, latency_s),
        _with_network(two_sparks, bandwidth, latency_s * factor),
    ):
        fast, slow = (_speeds(real, machine) for machine in (good, worse))
        assert slow.decode <= fast.decode and slow.prefill <= fast.prefill


def _with_network(machine, bandwidth, latency_s):
    remote, *own = machine.gpus
    return replace(machine, gpus=(replace(remote, host_bandwidth=bandwidth, latency_s=latency_s), *own))


def _speeds(header, machine):
    from step35.planning.context_memory import Run
    from step35.planning.memory_usage import Layout
    from step35.planning.speed import Deployment, speed

    n = len(header.shape.layers)
    layers = ("GPU0",) * (n // 2) + ("GPU1",) * (n - n // 2)
    experts = tuple((device,) * 3 if s.is_moe else () for device, s in zip(layers, header.shape.layers, strict=True))
    return speed(Deployment(header, machine, Run(4096, 512), Layout(layers, experts, "GPU1")), 2048)


def test_rpc_without_a_second_box_says_how(real):
    with pytest.raises(SettingsError, match="rpc expected a second box, got none; name it with --rpc HOST:PORT"):
        place(real, known_machines()["dgx-spark"], Constraints(n_ctx=4096, policy="rpc"))


def test_a_remote_box_lends_what_its_server_says_less_a_reserve():
    with rpc_server((50 * GIB, 64 * GIB)) as endpoint:
        machine = with_remotes(known_machines()["cpu-192"], [endpoint], TEN_GBIT)
    (remote,) = machine.gpus
    assert (remote.kind, remote.total_bytes, remote.free_bytes) == (REMOTE, 64 * GIB, 48 * GIB)
    assert remote.host_bandwidth == TEN_GBIT


# as a user meets it


def step35(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "step35.cli", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_plan_asks_the_host_and_names_it_when_it_is_not_there(tmp_path):
    model, out = tiny_gguf(), tmp_path / "plan.yaml"
    with rpc_server((50 * GIB, 64 * GIB)) as endpoint:
        done = step35(
            "plan", model, "--machine", "dgx-spark", "--policy", "rpc", "--rpc", endpoint, "--ctx", 1024, "--out", out
        )
        assert done.returncode == 0, done.stderr
    assert f"layers on RPC {endpoint}" in done.stdout
    assert f'rpc: ["{endpoint}"]' in out.read_text()
    gone = step35("plan", model, "--machine", "dgx-spark", "--rpc", endpoint, "--ctx", 1024)
    assert (gone.returncode, gone.stdout) == (1, "")
    assert gone.stderr.startswith(f"step35: error: unreachable RPC host: {endpoint}")
    assert gone.stderr.count("\n") == 1


def test_a_machine_by_name_is_planned_with_unseen(tmp_path):
    model = tiny_gguf()
    done = step35("plan", model, "--machine", "dgx-spark", "--rpc", "dgx-spark", "--ctx", 1024, "--json")
    assert json.loads(done.stdout)["policy"] == "rpc", done.stderr


def test_a_llama_cpp_without_rpc_says_how_to_get_one():
    if devices._reg_by_name(b"RPC"):
        pytest.skip("this llama.cpp has RPC")
    with pytest.raises(NativeError, match=r"expected to be built with RPC, got no RPC backend; step35 backend build"):
        devices.add_rpc_server("127.0.0.1:50052")
