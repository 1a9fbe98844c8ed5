"""Reading ahead: every byte once, in whole spans, past the page cache or through it, and never past a file's end."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_step35.errors import CheckpointError
from convert_step35.planning.chunks import Chunk
from convert_step35.reading import direct_file
from convert_step35.reading.direct_file import BLOCK_BYTES, DirectFile, read_buffer
from convert_step35.reading.read_ahead import ChunkRead, Loaded, Place, ReadAhead, Unread, spans
from convert_step35.writing.tensor_digest import MOST_WAITING_BYTES, TensorDigest


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "data"
    path.write_bytes(np.random.default_rng(35).bytes(5 * BLOCK_BYTES + 123))
    return path


def places(path: Path, sizes: list[int]) -> Iterator[ChunkRead]:
    at = 0
    for i, n in enumerate(sizes):
        yield ChunkRead(0, Chunk(i, i, 1, 0), Place(path, at, n))
        at += n


# Files


@pytest.fixture(params=["direct", "refused at open", "refused at read"])
def opened(request: pytest.FixtureRequest, file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DirectFile]:
    """The file, on a disk that takes direct reads and on two that don't."""
    if request.param == "refused at open":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    opened = DirectFile(file)
    if request.param == "refused at read":
        monkeypatch.setattr(direct_file, "BLOCK_BYTES", 1)  # unaligned, so the kernel refuses
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("offset", "n_bytes"), [(0, 1), (0, 4096), (1, 4095), (4095, 2), (5000, 9000), (20480, 123), (20602, 1), (0, 20603)]
)
def test_any_range_is_read_as_it_stands(opened: DirectFile, file: Path, offset: int, n_bytes: int) -> None:
    data = opened.read(offset, n_bytes, read_buffer(6 * 4096))
    assert data.tobytes() == file.read_bytes()[offset : offset + n_bytes]


@pytest.mark.parametrize(("offset", "n_bytes"), [(0, 20604), (20602, 2), (24576, 1), (100_000, 5)])
def test_a_file_that_ends_early_is_an_error(opened: DirectFile, offset: int, n_bytes: int) -> None:
    with pytest.raises(
        CheckpointError,
        match=rf"truncated file: .*data expected {offset + n_bytes} bytes or more, got \d+; did it change",
    ):
        opened.read(offset, n_bytes, read_buffer(2**18))


# Spans


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 60)), max_size=40), st.integers(1, 100))
def test_spans_cover_all_items_in_order_and_only_join_neighbours(steps: list[tuple[int, int]], most: int) -> None:
    items, at = [], 0
    for i, (gap, n) in enumerate(steps):
        at += gap
        items.append(ChunkRead(0, Chunk(i, i, 1, 0), Place(Path("a"), at, n)))
        at += n
    runs = list(spans(items, most))
    assert [item for run in runs for item in run] == items
    for run in runs:
        read = [item.place for item in run if isinstance(item, ChunkRead)]
        assert all(a.end == b.offset for a, b in itertools.pairwise(read))
        assert len(read) == 1 or read[-1].end - read[0].offset <= most


def test_what_is_not_read_never_joins_what_is() -> None:
    nothing, some = Unread(1, None), ChunkRead(0, Chunk(0, 0, 1, 0), Place(Path("a"), 0, 4))
    assert list(spans([nothing, some, nothing, nothing])) == [[nothing], [some], [nothing, nothing]]


# The ring


def taken(ahead: ReadAhead, n: int) -> tuple[list[tuple[int, str]], list[Thread]]:
    readers = [Thread(target=ahead.read) for _ in range(2)]
    for reader in readers:
        reader.start()
    seen = []
    while len(seen) < n and (loaded := ahead.take()) is not None:
        assert isinstance(loaded, Loaded)
        seen.append((loaded.item.chunk.index, hashlib.sha256(loaded.data.data).hexdigest()))
        ahead.give_back(loaded)
    return sorted(seen), readers


def test_every_item_comes_once_with_its_bytes(tmp_path: Path) -> None:
    """Three times what the ring holds, so that every buffer is used again."""
    data = np.random.default_rng(1).bytes(200 * 2**20 // 8)
    (tmp_path / "a").write_bytes(data)
    sizes = [1_000_003] * (len(data) // 1_000_003)
    ahead = ReadAhead(places(tmp_path / "a", sizes), 0, 1)
    seen, readers = taken(ahead, len(sizes) + 1)
    expected = [hashlib.sha256(data[i * n : (i + 1) * n]).hexdigest() for i, n in enumerate(sizes)]
    assert seen == list(enumerate(expected))
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()


def test_stopping_wakes_readers_and_takers(file: Path) -> None:
    """Nobody gives buffers back, so the readers wait for one for ever."""
    sizes = [1] * 20_000
    ahead = ReadAhead((ChunkRead(0, Chunk(i, 0, 1, 0), Place(file, 0, n)) for i, n in enumerate(sizes)), 0, 1)
    readers = [Thread(target=ahead.read) for _ in range(2)]
    for reader in readers:
        reader.start()
    assert ahead.take() is not None
    ahead.stop()
    while ahead.take() is not None:
        pass
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()


# Digests


@given(st.permutations(range(12)))
def test_a_digest_does_not_depend_on_the_order_of_the_chunks(order: list[int]) -> None:
    pieces = [bytes([i]) * (i + 1) for i in range(12)]
    digest = TensorDigest(12)
    for i in order:
        digest.add(i, np.frombuffer(pieces[i], np.uint8))
    assert digest.result() == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_a_digest_from_many_threads_is_the_same() -> None:
    pieces = [np.full(5000, i % 251, np.uint8) for i in range(400)]
    digest, rest = TensorDigest(400), iter(range(400))
    threads = [Thread(target=lambda: [digest.add(i, pieces[i]) for i in rest]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digest.result() in (hashlib.sha256(np.concatenate(pieces).data).hexdigest(), None)


def test_too_many_early_chunks_are_not_kept() -> None:
    piece = np.zeros(MOST_WAITING_BYTES // 8, np.uint8)
    for n_early, is_kept in ((8, True), (9, False)):
        digest = TensorDigest(n_early + 1)
        for i in (*range(1, n_early + 1), 0):
            digest.add(i, piece)
        assert digest.result() == (hashlib.sha256(bytes(piece) * (n_early + 1)).hexdigest() if is_kept else None)
    assert TensorDigest(5, is_partial=True).result() is None
