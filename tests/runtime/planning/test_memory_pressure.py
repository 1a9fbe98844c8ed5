"""Memory that runs short: the levels, the one budget, what the engine does, and all of it under a real limit."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_native import Script, loader
from server_fakes import answer, ask, events_of, fake_service, serve
from step35.engine.budget import Budget
from step35.engine.decode_loop import begin, generate
from step35.engine.engine import Engine
from step35.errors import DoesNotFit
from step35.options import EngineOptions
from step35.planning.hardware import Sources, stalls
from step35.planning.memory_pressure import Level, Reading, Thresholds, next_level
from step35.planning.watchdog import Watchdog
from step35.sampling.sampler import Sampling
from step35.sampling.token_chooser import Chooser
from step35.server.errors import ApiError
from tiny_model import tiny_gguf

GREEDY = Sampling(temperature=0)
THRESHOLDS = Thresholds(shrink=400, reject=200, stop=100)
LEVELS = st.sampled_from(Level)
READINGS = st.builds(Reading, st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))


# levels


@given(LEVELS, READINGS, st.integers(0, 1000))
def test_less_memory_never_means_a_lower_level(level, reading, less):
    shorter = Reading(max(0, reading.available - less), reading.some_stall, reading.full_stall)
    assert next_level(level, reading, THRESHOLDS) <= next_level(level, shorter, THRESHOLDS)


@given(st.lists(READINGS, max_size=20))
def test_levels_rise_one_at_a_time_and_stop_is_for_good(readings):
    level = Level.CALM
    for reading in readings:
        after = next_level(level, reading, THRESHOLDS)
        assert after <= level + 1
        assert after is Level.STOP or level is not Level.STOP
        level = after


@given(LEVELS, READINGS)
def test_a_reading_said_twice_settles(level, reading):
    """No level flickers: between a threshold and its margin everything stays as it was."""
    for _ in Level:
        level = next_level(level, reading, THRESHOLDS)
    assert next_level(level, reading, THRESHOLDS) is level


def test_a_level_ends_with_a_margin():
    assert next_level(Level.SHRINK, Reading(500), THRESHOLDS) is Level.SHRINK
    assert next_level(Level.SHRINK, Reading(600), THRESHOLDS) is Level.CALM
    assert next_level(Level.REJECT, Reading(1000), THRESHOLDS) is Level.CALM


def test_stalls_count_where_memory_looks_free():
    """Symptom: mapped weights are evicted and read again, a token takes a minute, and MemAvailable is high."""
    assert next_level(Level.CALM, Reading(1000, some_stall=0.4), THRESHOLDS) is Level.SHRINK
    assert next_level(Level.SHRINK, Reading(1000, some_stall=0.9, full_stall=0.6), THRESHOLDS) is Level.REJECT


def test_stalls_are_the_cgroups_own_or_else_the_systems():
    text = "some avg10=12.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=1\n"
    files = {"/proc/self/cgroup": "0::/job\n", "/proc/pressure/memory": text.replace("12.50", "99.00")}
    assert stalls(box(files)) == (0.99, 0.03)
    assert stalls(box(files | {"/sys/fs/cgroup/job/memory.pressure": text})) == (0.125, 0.03)
    assert stalls(box({})) == (0, 0)


def box(files: dict[str, str]) -> Sources:
    return Sources(files.get, list, lambda n_threads: 1e9, 2, "Linux")


def test_a_watchdog_shrinks_at_every_reading_and_tells_of_every_change():
    memory, shrunk, told = [1000, 300, 150, 150, 90, 1000], [], []
    dog = Watchdog(
        lambda: Reading(memory.pop(0)),
        THRESHOLDS,
        shrink=lambda: shrunk.append(len(memory)),
        on_change=lambda level, reading: told.append((level.name, reading.available)),
    )
    levels = [dog.check().name for _ in range(6)]
    assert levels == ["CALM", "SHRINK", "REJECT", "REJECT", "STOP", "STOP"]
    assert told == [("SHRINK", 300), ("REJECT", 150), ("STOP", 90)]
    assert len(shrunk) == 5


def test_a_reading_that_fails_changes_nothing():
    """Symptom: one failed look at /proc/meminfo counts as 0 bytes, and the running work ends."""
    readings = [Reading(300), None, None, Reading(150), None]
    told = []
    dog = Watchdog(
        lambda: readings.pop(0),
        THRESHOLDS,
        shrink=lambda: told.append("shrink"),
        on_change=lambda *_: told.append("told"),
    )
    assert [dog.check().name for _ in range(5)] == ["SHRINK", "SHRINK", "SHRINK", "REJECT", "REJECT"]
    assert told == ["shrink", "told"] * 2


def test_the_thread_watches_until_it_is_stopped():
    seen = threading.Event()
    dog = Watchdog(lambda: Reading(0), THRESHOLDS, shrink=seen.set, on_change=lambda *_: None, interval_s=0.001)
    dog.start()
    assert seen.wait(10)
    dog.stop()
    assert threading.active_count() == 1 or "step35-watchdog" not in {t.name for t in threading.enumerate()}


# the budget


@given(st.none() | st.integers(0, 100), st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.integers(0, 3))))
def test_the_budget_is_never_exceeded_and_counts_what_is_reserved(limit, moves):
    budget, kept = Budget(limit), {}
    for n, (n_bytes, is_droppable, n_release) in enumerate(moves):
        reservation = budget.reserve(n_bytes, partial(kept.pop, n) if is_droppable else None)
        if reservation is not None:
            kept[n] = reservation
        for key in list(kept)[:n_release]:
            budget.release(kept.pop(key))
        assert budget.used == sum(reservation.n_bytes for reservation in kept.values())
        assert limit is None or budget.used <= limit


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_halving_drops_the_oldest_and_always_something(sizes):
    budget, kept = Budget(), list(range(len(sizes)))
    for i, n_bytes in enumerate(sizes):
        budget.reserve(n_bytes, lambda i=i: kept.remove(i))
    assert budget.halve() > 0
    assert kept == list(range(len(sizes)))[len(sizes) - len(kept) :]
    assert budget.used <= sum(sizes) / 2


def test_what_cannot_be_dropped_stays_and_what_does_not_fit_is_refused():
    budget = Budget(100)
    snapshot = budget.reserve(80)
    assert snapshot is not None
    assert budget.reserve(30) is None
    assert budget.halve() == 0
    budget.release(snapshot)
    assert budget.reserve(30) is not None


# the engine


def fake_engine(**options) -> Engine:
    return Engine(EngineOptions(Path("fake.gguf"), n_ctx=512, draft="off", **options), loading=loader(Script()))


def run(session, prompt, n_predict=4, checkpoint_positions=()):
    checkpoints_after = (lambda n_cached: checkpoint_positions) if checkpoint_positions else None
    return list(generate(begin(session, prompt, Chooser(GREEDY), n_predict, checkpoints_after)))


def test_checkpoints_of_all_sessions_share_one_budget():
    with fake_engine(n_sessions=2) as engine, engine.open_session() as a, engine.open_session() as b:
        run(a, [1] * 20, checkpoint_positions=(5, 10))
        n_bytes = engine.budget.used
        assert n_bytes > 0 and a.checkpoints == (5, 10)
        engine.budget.limit = n_bytes
        run(b, [2] * 20, checkpoint_positions=(10,))
        assert engine.budget.used <= n_bytes
        assert b.checkpoints == (10,) and 5 not in a.checkpoints
        b.close()
        a.close()
        assert engine.budget.used == 0


def test_a_dropped_checkpoint_costs_time_and_never_the_text():
    prompt = [1, 2, 3] * 10
    with fake_engine() as engine, engine.open_session() as session:
        first = run(session, prompt, 40, checkpoint_positions=(25,))
        engine.budget.halve()
        assert session.checkpoints == ()
        assert run(session, prompt, 40, checkpoint_positions=(25,)) == first


def test_a_snapshot_counts_while_it_exists_and_is_refused_without_room():
    with fake_engine() as engine, engine.open_session() as session:
        run(session, [1] * 20, checkpoint_positions=(5,))
        before = engine.budget.used
        snapshot = session.snapshot()
        assert engine.budget.used > before
        del snapshot
        assert engine.budget.used == before
        engine.budget.limit = before
        with pytest.raises(DoesNotFit, match="no room for a snapshot: 23 tokens expected at most .* got"):
            session.snapshot()


def test_short_memory_refuses_new_work_then_ends_the_running_one():
    told = []
    with fake_engine() as engine, engine.open_session() as session:
        engine.on_pressure.append(told.append)
        turn = begin(session, [1] * 20, Chooser(GREEDY), 100)
        tokens = generate(turn)
        next(tokens)
        engine.on_memory_level(Level.REJECT, Reading(3 * 2**30))
        assert next(tokens) >= 0  # what runs goes on
        with pytest.raises(DoesNotFit, match=r"memory is short: 3.00 GiB are free, and no new work is begun"):
            begin(session, [1], Chooser(GREEDY))
        engine.on_memory_level(Level.STOP, Reading(2**30))
        with pytest.raises(DoesNotFit, match=r"memory is short: 1.00 GiB are free, and nothing more is decoded"):
            list(tokens)
        assert told == [Level.REJECT, Level.STOP]


def test_work_is_taken_again_when_the_memory_is_back():
    with fake_engine() as engine, engine.open_session() as session:
        engine.on_memory_level(Level.REJECT, Reading(1))
        engine.on_memory_level(Level.CALM, Reading(2**40))
        assert len(run(session, [1, 2])) == 4


def test_a_server_ends_when_the_memory_runs_out():
    async def talk(service):
        job, _ = await service.submit(ask([1, 2, 3], 300), "r", None)
        service.engine.on_memory_level(Level.STOP, Reading(2**30))
        events = await events_of(job)
        with pytest.raises(ApiError) as refused:
            await answer(service, ask([1]))
        return events, refused.value.status

    service = fake_service()
    events, status = serve(service, talk)
    assert "memory is short" in str(events[-1])
    assert status == 503
    assert service.scheduler.state == "stopped"
    assert "memory ran out" in str(service.scheduler.failure)


# a real limit

UNDER_A_LIMIT = """
import json, os, resource, sys, time
from pathlib import Path
from step35.sampling.token_chooser import Chooser
from step35.engine.engine import Engine
from step35.errors import DoesNotFit
from step35.engine.decode_loop import begin, generate
from step35.planning.hardware import this_box
from step35.options import EngineOptions
from step35.planning.memory_pressure import Level
from step35.sampling.sampler import Sampling
from step35.planning.watchdog import read_memory

def size():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

def wait_for(level):
    end = time.monotonic() + 60
    while engine.pressure < level and time.monotonic() < end:
        time.sleep(0.01)
    events.append((level.name, engine.pressure.name, len(session.checkpoints)))

def hold(n_bytes):
    held = bytearray(max(0, n_bytes))
    held[::4096] = b"1" * len(held[::4096])  # pages count once they are written
    return held

events, ballast = [], []
if len(sys.argv) > 2:
    folder, limit = Path(sys.argv[2]), 2**30
    version = 2 if (folder / "memory.max").exists() else 1
    (folder / {1: "memory.limit_in_bytes", 2: "memory.max"}[version]).write_text(str(limit))
    (folder / "cgroup.procs").write_text(str(os.getpid()))
else:
    limit = size() + 3 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    hold = lambda n_bytes: bytearray(max(0, n_bytes))  # address space counts at once
options = EngineOptions(Path(sys.argv[1]), draft="off", n_ctx=2048, n_batch=64, n_threads=1, load_mode="none")
other = hold(read_memory(this_box()).available - limit // 10)  # only the reserve is left
try:
    Engine(options)
except DoesNotFit as error:
    events.append(("refused", str(error)))
del other
with Engine(options) as engine, engine.open_session() as session:
    tokens = [i % 200 for i in range(600)]
    list(generate(begin(session, tokens, Chooser(Sampling(0)), 4, lambda n_cached: (100, 200, 300, 400))))
    events.append(("kept", len(session.checkpoints)))
    reserve = limit // 10
    for level, share in ((Level.SHRINK, 0.4), (Level.REJECT, 0.2), (Level.STOP, 0.1)):
        ballast.append(hold(read_memory(this_box()).available - int(reserve * share)))
        wait_for(level)
        if level is Level.REJECT:
            try:
                begin(session, tokens, Chooser(Sampling(0)))
            except DoesNotFit as error:
                events.append(("no new work", str(error)))
    ballast.clear()
print(json.dumps(events))
"""


@pytest.fixture
def cgroup():
    """Returns a new memory cgroup of version 1 or 2; where none can be made, the test is skipped."""
    name = f"step35-test-{os.getpid()}"
    for root, limit in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        folder = Path(root) / name
        try:
            folder.mkdir()
        except OSError:
            continue
        if (folder / limit).exists():
            yield folder
            folder.rmdir()
            return
        folder.rmdir()
    pytest.skip("needs the right to make a memory cgroup")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize("kind", ["address space", "cgroup"])
def test_under_a_real_limit_it_refuses_sheds_rejects_and_ends_without_a_kill(kind, request):
    cgroup = [request.getfixturevalue("cgroup")] if kind == "cgroup" else []
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, str(tiny_gguf()), *map(str, cgroup)],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    events = json.loads(done.stdout)
    assert events[0][0] == "refused" and events[0][1].startswith("doesn't fit: RAM expected to need at most ")
    assert events[1] == ["kept", 4]
    assert [event[:2] for event in events[2:4]] == [["SHRINK", "SHRINK"], ["REJECT", "REJECT"]]
    assert events[2][2] < 4
    assert events[4][0] == "no new work"
    assert events[5][:2] == ["STOP", "STOP"]
