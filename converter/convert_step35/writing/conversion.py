"""Runs a plan: readers load the chunks, workers quantize and write them, a journal thread makes them durable.

Chunks come in the order of the source files, so reads are sequential and large, and go on while the workers compute.
Output offsets are final, so the order in which chunks end is free.
"""

import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

import numpy as np

from convert_step35.errors import CheckpointError, DiskFullError, OutputError
from convert_step35.gguf.ggml_types import row_bytes
from convert_step35.gguf.imatrix import Imatrix
from convert_step35.planning.chunks import CHUNK_WEIGHTS, Chunk, chunk_at, chunks, n_chunks
from convert_step35.planning.plan import Plan, PlannedTensor
from convert_step35.quantization.measure import ErrorSums, TensorErrors, non_finite, tensor_errors
from convert_step35.quantization.quantizers import Quantizers
from convert_step35.reading.read_ahead import N_READERS, ChunkRead, Item, Loaded, ReadAhead, Unread
from convert_step35.reading.rows import RowReader
from convert_step35.source.checkpoint import Checkpoint
from convert_step35.source.mapping import MappedTensor
from convert_step35.writing.journal import ChunkRecord, Journal
from convert_step35.writing.output import Output, discard
from convert_step35.writing.tensor_digest import TensorDigest

_SYNC_S = 1.0


@dataclass(frozen=True, slots=True)
class TensorResult:
    """A finished tensor: the digest of its bytes, what quantization did to it, and what quantized it."""

    tensor: PlannedTensor
    sha256: str
    errors: TensorErrors
    quantizer: str


@dataclass(frozen=True, slots=True)
class Tools:
    """What the workers share; `on_progress` is called for each converted chunk, `on_resumed` for each resumed one."""

    checkpoint: Checkpoint
    quantizers: Quantizers
    imatrix: Imatrix | None
    n_threads: int
    on_progress: Callable[[PlannedTensor, Chunk], None]
    on_resumed: Callable[[PlannedTensor, Chunk], None] = lambda tensor, chunk: None


def convert(
    plan: Plan,
    journal_path: Path,
    fingerprint: dict[str, str],
    tools: Tools,
    before_publish: Callable[[list[TensorResult]], None],
) -> list[TensorResult]:
    """Write every tensor of the plan and publish the files; returns one result a tensor, in plan order.

    An interrupt or an error of the machine leaves the partial files and the journal, and the same call resumes
    there; a checkpoint that can't be converted leaves nothing.
    """
    tools.quantizers.prepare({tensor.ggml_type for tensor in plan.tensors})
    with Journal(journal_path, fingerprint) as journal:
        try:
            results = _write(plan, journal, tools, before_publish)
        except (CheckpointError, DiskFullError):
            _discard_new(plan, journal)
            raise
        journal.remove()
    return results


def _write(
    plan: Plan, journal: Journal, tools: Tools, before_publish: Callable[[list[TensorResult]], None]
) -> list[TensorResult]:
    with Output(plan.files) as output, RowReader(tools.checkpoint, tools.quantizers.ggml) as reader:
        results = _Conversion(plan.tensors, journal, output, reader, tools).run()
        before_publish(results)
        output.publish()
    return results


def _discard_new(plan: Plan, journal: Journal) -> None:
    """Remove the partial files, unless they have chunks of an earlier run of the same command."""
    if not journal.done:
        discard(plan.files)
        journal.remove()


@dataclass(slots=True)
class _Buffers:
    """One worker's memory: 12 MiB for any tensor, of which most is never used.

    `scratch` is used where no native kernel takes the weights as they are.
    """

    packed: np.ndarray
    scratch: np.ndarray

    @classmethod
    def for_tensors(cls, tensors: Sequence[PlannedTensor]) -> "_Buffers":
        n = _largest_chunk(tensors)
        return cls(np.empty(4 * n, np.uint8), np.empty((2, n), np.float32))


class _Conversion:
    """One run over the chunks that are not yet done."""

    def __init__(
        self, tensors: Sequence[PlannedTensor], journal: Journal, output: Output, reader: RowReader, tools: Tools
    ) -> None:
        self._tensors = tensors
        self._journal = journal
        self._output = output
        self._reader = reader
        self._tools = tools
        self._lock = Lock()
        self._stop = Event()
        self._failures: list[BaseException] = []
        self._ended = Event()
        self._unrecorded: list[ChunkRecord] = []
        self._records: dict[int, dict[int, ChunkRecord]] = {i: {} for i in range(len(tensors))}
        self._results: dict[int, TensorResult] = {}
        self._digests: dict[int, TensorDigest] = {}
        for record in journal.done:
            self._records[record.tensor][record.chunk] = record
            tools.on_resumed(tensors[record.tensor], chunk_at(tensors[record.tensor].mapped, record.chunk))
        self._ahead = ReadAhead(self._work(), 4 * _largest_chunk(tensors), tools.n_threads)

    def run(self) -> list[TensorResult]:
        targets = [self._ahead.read] * N_READERS + [self._worker] * self._tools.n_threads
        with ThreadPoolExecutor(len(targets)) as pool, ThreadPoolExecutor(1) as journal_thread:
            recorder = journal_thread.submit(self._guarded, self._record)
            started: list[Future[None]] = []
            try:
                started.extend(pool.submit(self._guarded, target) for target in targets)
                wait(started)
            finally:
                # Also on Ctrl-C: let every chunk in flight end, and journal what is done.
                self._halt()
                _join(started)
                self._ended.set()
                _join([recorder])
        if self._failures:
            raise self._failures[0]
        return [self._results[i] for i in range(len(self._tensors))]

    def _guarded(self, target: Callable[[], None]) -> None:
        """A thread's work: an error stops all threads, and the first is the conversion's."""
        try:
            target()
        except BaseException as exc:
            self._failures.append(exc)
            self._halt()
            raise

    def _halt(self) -> None:
        self._stop.set()
        self._ahead.stop()

    def _work(self) -> Iterator[Item]:
        """Chunks to convert in the order of the source, and None for a tensor that the journal has whole."""
        for index in sorted(range(len(self._tensors)), key=self._source_order):
            tensor = self._tensors[index].mapped
            if len(self._records[index]) == n_chunks(tensor):
                yield Unread(index, None)
                continue
            done = set(self._records[index])
            self._digests[index] = TensorDigest(n_chunks(tensor), is_partial=bool(done))
            for chunk in chunks(tensor):
                if chunk.index not in done:
                    place = self._reader.place(tensor, chunk)
                    yield ChunkRead(index, chunk, place) if place is not None else Unread(index, chunk)

    def _source_order(self, index: int) -> tuple[str, int]:
        source = self._tools.checkpoint.source_of(self._tensors[index].mapped)
        return (source.weight.path.name, source.weight.offset) if source is not None else ("", 0)

    def _worker(self) -> None:
        buffers = _Buffers.for_tensors(self._tensors)
        while (taken := self._ahead.take()) is not None and not self._stop.is_set():
            if isinstance(taken, Loaded):
                index, is_whole = taken.item.index, self._convert_loaded(taken, buffers)
            else:
                index, is_whole = taken.index, taken.chunk is None or self._generate(taken.index, taken.chunk, buffers)
            if is_whole:
                self._finish_tensor(index, buffers)

    def _convert_loaded(self, loaded: Loaded, buffers: _Buffers) -> bool:
        """Convert a chunk that was read; True where that makes its tensor whole."""
        index, chunk = loaded.item.index, loaded.item.chunk
        weights = self._reader.weights(self._tensors[index].mapped, chunk, loaded.data, buffers.scratch[0])
        packed, sums = self._pack(index, chunk, weights, buffers)
        self._ahead.give_back(loaded)
        return self._finish_chunk(index, chunk, packed, sums)

    def _generate(self, index: int, chunk: Chunk, buffers: _Buffers) -> bool:
        """Convert a chunk of a tensor that no file has; True where that makes the tensor whole."""
        weights = self._reader.generated(self._tensors[index].mapped, chunk, buffers.scratch[0])
        return self._finish_chunk(index, chunk, *self._pack(index, chunk, weights, buffers))

    def _pack(self, index: int, chunk: Chunk, weights: np.ndarray, buffers: _Buffers) -> tuple[np.ndarray, ErrorSums]:
        """Quantize a chunk and measure what that did to it; its bytes are in `buffers` after that."""
        planned, quantizers = self._tensors[index], self._tools.quantizers
        importance = self._importance(planned.mapped, chunk)
        sums = quantizers.pack(planned.ggml_type, weights, buffers.packed, importance, buffers.scratch)
        if sums is None:
            wide = buffers.scratch[0, : weights.size].reshape(weights.shape)
            raise non_finite(quantizers.widened(weights, wide), planned.mapped)
        packed = buffers.packed[: chunk.n_rows * row_bytes(planned.ggml_type, planned.mapped.row_size)]
        # A scale that is NaN or infinite makes the sum so; so do squares of huge weights.
        if not math.isfinite(sums.squared_error) and not quantizers.ggml.is_valid(planned.ggml_type, packed):
            raise _bad_scale(planned)
        return packed, sums

    def _write(self, index: int, chunk: Chunk, packed: np.ndarray, sums: ErrorSums) -> ChunkRecord:
        planned = self._tensors[index]
        self._output.write(index, packed, _offset(planned, chunk))
        self._tools.on_progress(planned, chunk)
        return ChunkRecord(index, chunk.index, zlib.crc32(packed.data), sums)

    def _importance(self, tensor: MappedTensor, chunk: Chunk) -> np.ndarray | None:
        imatrix = self._tools.imatrix
        entry = imatrix.entries.get(tensor.name) if imatrix is not None else None
        return entry.weights(chunk.expert) if entry is not None else None

    def _finish_chunk(self, index: int, chunk: Chunk, packed: np.ndarray, sums: ErrorSums) -> bool:
        """Write and digest a converted chunk; True for the one that makes its tensor whole."""
        record = self._write(index, chunk, packed, sums)
        self._digests[index].add(chunk.index, packed)
        return self._note(index, record)

    def _note(self, index: int, record: ChunkRecord) -> bool:
        """Note a written chunk; True for the one that makes its tensor whole."""
        with self._lock:
            self._unrecorded.append(record)
            records = self._records[index]
            records[record.chunk] = record
            return len(records) == n_chunks(self._tensors[index].mapped)

    def _finish_tensor(self, index: int, buffers: _Buffers) -> None:
        """Note a whole tensor with its digest."""
        planned, records = self._tensors[index], self._records[index]
        digest = self._digests[index].result() if index in self._digests else None
        digest = digest if digest is not None else self._digest_of_file(index, buffers)
        if digest is None:
            return
        errors = tensor_errors(planned.mapped, [records[i].errors for i in sorted(records)])
        quantizer = self._tools.quantizers.name(planned.ggml_type)
        self._results[index] = TensorResult(planned, digest, errors, quantizer)

    def _digest_of_file(self, index: int, buffers: _Buffers) -> str | None:
        """Read a whole tensor back, check every chunk's CRC and digest it; None where the run stops."""
        sha = hashlib.sha256()
        for chunk in chunks(self._tensors[index].mapped):
            if self._stop.is_set():
                return None
            sha.update(self._checked(index, chunk, buffers).data)
        return sha.hexdigest()

    def _checked(self, index: int, chunk: Chunk, buffers: _Buffers) -> np.ndarray:
        """The chunk's bytes as the file has them; a chunk that an earlier run left damaged is converted again."""
        planned = self._tensors[index]
        data = buffers.packed[: chunk.n_rows * row_bytes(planned.ggml_type, planned.mapped.row_size)]
        self._output.read(index, data, _offset(planned, chunk))
        if zlib.crc32(data.data) == self._records[index][chunk.index].crc:
            return data
        raw = np.empty(4 * chunk.n_rows * planned.mapped.row_size, np.uint8)
        rows = self._reader.read(planned.mapped, chunk, buffers.scratch[0], raw)
        record = self._write(index, chunk, *self._pack(index, chunk, rows, buffers))
        self._note(index, record)
        self._output.read(index, data, _offset(planned, chunk))
        if zlib.crc32(data.data) != record.crc:
            raise OutputError(
                f"the disk returns other bytes than were written: {planned.mapped.name}, chunk {chunk.index}; "
                "check the disk"
            )
        return data

    def _record(self) -> None:
        """The journal thread: every second sync the data, then append the records of the chunks in it."""
        while not self._ended.wait(_SYNC_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            batch, self._unrecorded = self._unrecorded, []
        if batch:
            self._output.sync()
            self._journal.append(batch)


def _join(threads: Sequence[Future[None]]) -> None:
    """Wait even if interrupted: a second Ctrl-C must not close files that threads still write."""
    while True:
        try:
            wait(threads)
            return
        except KeyboardInterrupt:
            continue


def _largest_chunk(tensors: Sequence[PlannedTensor]) -> int:
    """Weights in the largest chunk of all."""
    return max(CHUNK_WEIGHTS, *(tensor.mapped.row_size for tensor in tensors))


def _bad_scale(planned: PlannedTensor) -> CheckpointError:
    return CheckpointError(
        f"quantization failed: {planned.mapped.name} as {planned.ggml_type.name} has a scale that is NaN or infinite; "
        "choose another type for it with --tensor-type"
    )


def _offset(planned: PlannedTensor, chunk: Chunk) -> int:
    return planned.offset + chunk.first_row * row_bytes(planned.ggml_type, planned.mapped.row_size)
