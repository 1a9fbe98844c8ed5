"""A context of llama.cpp: KV cells and a compute graph over the trunk, or over one MTP head."""

import ctypes
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from step35.choices import KV_TYPES
from step35.cores import usable_cores
from step35.errors import Cancelled, ContextFull, NativeError
from step35.native.interface import OnExperts
from step35.native.library import HEADS_RETURN_ALL_ROWS, C, bind, forget_errors, reason
from step35.native.load_failures import memory_remedy
from step35.native.rows import Rows
from step35.options import ContextOptions

_context_p = C.llama_context_p_ctypes
_set_nextn = bind(
    "llama_set_embeddings_nextn",
    "_Z26llama_set_embeddings_nextnP13llama_contextbb",
    [_context_p, ctypes.c_bool, ctypes.c_bool],
    None,
)
_get_nextn = bind(
    "llama_get_embeddings_nextn", "_Z26llama_get_embeddings_nextnP13llama_context", [_context_p], ctypes.c_void_p
)
_get_logits = C._lib["llama_get_logits"]  # not C's own function: a bare address is read faster than a pointer
_get_logits.argtypes, _get_logits.restype = [_context_p], ctypes.c_void_p
_set_head = bind(
    "llama_set_nextn_layer_offset",
    "_Z28llama_set_nextn_layer_offsetP13llama_contexti",
    [_context_p, ctypes.c_int32],
    None,
)

_NO_ROOM, _ABORTED = 1, 2  # positive return codes of llama_decode


def _abort_address() -> int:
    """strlen as the abort callback: it sees a flag byte without entering Python at every graph node."""
    return ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value or 0


# which experts a decode uses

_EXPERTS = b"ffn_moe_topk-"


class _Tensor(ctypes.Structure):
    """The beginning of a ggml_tensor."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    ]


_tensor_name = bind("ggml_get_name", "", [ctypes.c_void_p], ctypes.c_char_p)
_tensor_get = bind(
    "ggml_backend_tensor_get", "", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None
)


def _expert_watch(on_experts: OnExperts) -> object:
    @C.ggml_backend_sched_eval_callback
    def watch(tensor: int, is_asking: bool, _: object) -> bool:
        name = _tensor_name(tensor)
        is_wanted = name.startswith(_EXPERTS)
        if is_wanted and not is_asking:
            on_experts(int(name[len(_EXPERTS) :]), _int_rows(tensor))
        return is_wanted or not is_asking

    return watch


def _int_rows(address: int) -> np.ndarray:
    """Returns a copy of a two-dimensional int32 tensor, wherever it lies; it may be a view of longer rows."""
    tensor = _Tensor.from_address(address)
    rows = np.zeros((tensor.ne[1], tensor.ne[0]), np.int32)
    for i, row in enumerate(rows):
        _tensor_get(address, row.ctypes.data, i * tensor.nb[1], row.nbytes)
    return rows


class _Batch:
    """A llama_batch over numpy arrays; `embd` rows come with the tokens when n_embd > 0."""

    def __init__(self, n_max: int, n_embd: int) -> None:
        self.token = np.zeros(n_max, np.int32)
        self.pos = np.zeros(n_max, np.int32)
        self.seq = np.zeros(n_max, np.int32)
        self.output = np.zeros(n_max, np.int8)
        self.embd = np.zeros((n_max, n_embd), np.float32) if n_embd else None
        self._one = np.ones(n_max, np.int32)
        self._seq_rows = (self.seq.ctypes.data + 4 * np.arange(n_max)).astype(np.uint64)
        self.c = C.llama_batch()
        kinds: dict[str, Any] = dict(C.llama_batch._fields_)
        for field, array in self._pointers():
            setattr(self.c, field, ctypes.cast(array.ctypes.data, kinds[field]))

    def put(self, at: int, rows: Rows) -> int:
        """Writes rows from place `at` on; returns the place after them."""
        n = len(rows.tokens)
        if n == 1:  # most decodes: a number is written five times as fast as a slice
            self.token[at], self.pos[at], self.seq[at] = rows.tokens[0], rows.start, rows.seq
            self.output[at] = rows.outputs
        else:
            here = slice(at, at + n)
            self.token[here], self.seq[here] = rows.tokens, rows.seq
            self.pos[here] = np.arange(rows.start, rows.start + n)
            self.output[at : at + n - rows.outputs] = 0
            self.output[at + n - rows.outputs : at + n] = 1
        if self.embd is not None:
            self.embd[at : at + n] = rows.hidden
        return at + n

    def _pointers(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from (("token", self.token), ("pos", self.pos), ("n_seq_id", self._one))
        yield from (("seq_id", self._seq_rows), ("logits", self.output))
        if self.embd is not None:
            yield "embd", self.embd


class Context:
    """KV cells and a compute graph over the trunk, or over one MTP head."""

    def __init__(
        self,
        handle: Any,
        n_embd: int,
        n_logits: int,
        options: ContextOptions,
        head: int | None = None,
        on_experts: OnExperts | None = None,
    ) -> None:
        """`handle` is a llama_model; its rows have `n_embd` hidden values and `n_logits` logits."""
        self.n_embd, self.n_logits = n_embd, n_logits
        self.n_batch = options.n_batch
        self._watch = _expert_watch(on_experts) if on_experts else None  # llama.cpp borrows it
        self._ctx = self._open(handle, options, head, self._watch)
        self._memory = C.llama_get_memory(self._ctx)
        self._batch = _Batch(options.n_batch, n_embd if head is not None else 0)
        self._n_outputs = self._n_rows = 0
        self._abort = ctypes.create_string_buffer(b"", 2)
        self._stop_decode = C.ggml_abort_callback(_abort_address())
        C.llama_set_abort_callback(self._ctx, self._stop_decode, ctypes.cast(self._abort, ctypes.c_void_p))
        self.returns_all_rows = head is None or HEADS_RETURN_ALL_ROWS
        """Whether `hidden` has every row, not only those that return logits."""
        self._extracts_hidden = False
        if head is not None:
            _set_head(self._ctx, head)
            _set_nextn(self._ctx, True, not self.returns_all_rows)

    @staticmethod
    def _open(handle: Any, options: ContextOptions, head: int | None, watch: object = None) -> Any:
        params = C.llama_context_default_params()
        if watch is not None:
            params.cb_eval = watch
        params.n_ctx, params.n_batch, params.n_ubatch = options.n_ctx, options.n_batch, options.n_batch
        params.n_seq_max, params.n_outputs_max = options.n_seq, options.n_outputs
        # llama.cpp's own number may be more than the cores: its threads spin, and wait for each other's time slices
        params.n_threads = options.n_threads or min(params.n_threads, usable_cores())
        params.n_threads_batch = options.n_threads_batch or params.n_threads
        params.type_k = params.type_v = KV_TYPES[options.kv_type].native
        params.flash_attn_type = -1 if options.flash_attention is None else int(options.flash_attention)
        params.ctx_type = C.LLAMA_CONTEXT_TYPE_DEFAULT if head is None else C.LLAMA_CONTEXT_TYPE_MTP
        params.offload_kqv, params.op_offload = options.offload_kqv, options.op_offload
        params.swa_full, params.kv_unified, params.no_perf = False, True, True
        forget_errors()
        ctx = C.llama_init_from_model(handle, params)
        if not ctx:
            why = reason()
            raise NativeError(
                f"can't open a context of {options.n_ctx} tokens, {options.n_seq} sequences, batch {options.n_batch}: "
                f"{why}; {memory_remedy(why) or 'ask for a smaller context'}"
            )
        return ctx

    def close(self) -> None:
        if self._ctx:
            C.llama_free(self._ctx)
            self._ctx = None

    @property
    def n_ctx(self) -> int:
        return C.llama_n_ctx(self._ctx)

    @property
    def n_threads(self) -> int:
        """Threads of a decode of one token."""
        return C.llama_n_threads(self._ctx)

    @property
    def handle(self) -> object:
        """The llama_context, for what is said to llama.cpp itself."""
        return self._ctx

    # decoding

    def extract_hidden(self, on: bool) -> None:
        """Whether the trunk's decodes return the pre-norm hidden state of every row."""
        if on != self._extracts_hidden:
            _set_nextn(self._ctx, on, False)
            self._extracts_hidden = on

    def cancel(self) -> None:
        """Makes the running decode, or the next one, raise Cancelled. Callable from any thread."""
        self._abort[0] = b"\x01"

    def clear_cancel(self) -> None:
        """Forgets a cancel that came too late to stop anything."""
        self._abort[0] = b"\x00"

    def decode(self, rows: Sequence[Rows]) -> None:
        """Decodes rows of one or several sequences in one graph run; len(rows) must be at most n_batch."""
        if self._abort[0] != b"\x00":  # only the CPU backend looks at the flag while it decodes
            self._raise(_ABORTED, 0)
        n = self._fill(rows)
        self._batch.c.n_tokens = n
        code = C.llama_decode(self._ctx, self._batch.c)
        if code:
            self._raise(code, n)
        self._n_rows = n

    def _fill(self, rows: Sequence[Rows]) -> int:
        n = sum([len(r.tokens) for r in rows])
        if n > self.n_batch:
            raise NativeError(f"batch too long: expected at most {self.n_batch} rows, got {n}")
        at = 0
        for r in rows:
            at = self._batch.put(at, r)
        self._n_outputs = sum([r.outputs for r in rows])
        return n

    def _raise(self, code: int, n_rows: int) -> None:
        told = reason()
        if code == _ABORTED:
            self._abort[0] = b"\x00"
            raise Cancelled("decode cancelled")
        if code == _NO_ROOM:
            raise ContextFull(
                f"context full: {n_rows} more tokens don't fit into {self.n_ctx} cells shared by all sessions; "
                "close a session or load with a larger context"
            )
        raise NativeError(f"llama_decode of {n_rows} tokens failed with code {code}: {told}")

    def logits(self) -> np.ndarray:
        """Returns a view (n_outputs, n_logits) float32 of the last decode's output rows, in batch order."""
        return _view(_get_logits(self._ctx), self._n_outputs, self.n_logits)

    def hidden(self) -> np.ndarray:
        """Returns a view (rows, n_embd) float32 of pre-norm hidden states.

        Those of every row of the last decode, or of its output rows where not `returns_all_rows`; in batch order.
        """
        n_rows = self._n_rows if self.returns_all_rows else self._n_outputs
        return _view(_get_nextn(self._ctx), n_rows, self.n_embd)

    # the KV cache

    def truncate(self, seq: int, n_keep: int) -> None:
        """Forgets a sequence's cells from position `n_keep` on."""
        C.llama_memory_seq_rm(self._memory, seq, n_keep, -1)

    def copy(self, source: int, target: int, n_keep: int) -> None:
        """Lets `target` share the cells of `source` before position `n_keep`."""
        C.llama_memory_seq_cp(self._memory, source, target, 0, n_keep)

    def window_start(self, seq: int) -> int:
        """Returns the first position whose sliding-window cells still exist; 0 for an empty sequence."""
        return max(C.llama_memory_seq_pos_min(self._memory, seq), 0)

    def state_bytes(self, seq: int) -> int:
        """Returns the bytes that saving all of a sequence's cells takes."""
        return C.llama_state_seq_get_size_ext(self._ctx, seq, 0)

    def save_state(self, seq: int, *, window_only: bool = False) -> bytes:
        """Returns a sequence's cells; `window_only` leaves the full-attention layers out."""
        flags = C.LLAMA_STATE_SEQ_FLAGS_SWA_ONLY if window_only else 0
        n_bytes = C.llama_state_seq_get_size_ext(self._ctx, seq, flags)
        buffer = (ctypes.c_uint8 * n_bytes)()
        n_written = C.llama_state_seq_get_data_ext(self._ctx, buffer, n_bytes, seq, flags)
        if n_written != n_bytes:
            raise NativeError(f"saving sequence {seq} failed: expected {n_bytes} bytes, got {n_written}")
        return bytes(buffer)

    def load_state(self, seq: int, state: bytes, *, window_only: bool = False) -> None:
        """Puts saved cells back; without `window_only` the sequence must be empty."""
        flags = C.LLAMA_STATE_SEQ_FLAGS_SWA_ONLY if window_only else 0
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        n_read = C.llama_state_seq_set_data_ext(self._ctx, buffer, len(state), seq, flags)
        if n_read != len(state):
            raise NativeError(f"restoring sequence {seq} failed: {reason()}; expected {len(state)} bytes, got {n_read}")


@lru_cache(maxsize=64)  # they seldom move
def _view(address: int | None, n_rows: int, width: int) -> np.ndarray:
    if not address:
        raise NativeError(f"llama.cpp returned no rows: expected {n_rows} of width {width}")
    values: Any = (ctypes.c_float * (n_rows * width)).from_address(address)
    return np.frombuffer(values, np.float32).reshape(n_rows, width)
