"""llama.cpp, typed: the one module that imports llama_cpp.

Everything unstable is here: the pinned version's structs, its C++-mangled symbols, its log and its
return codes. Every failure leaves as one of our errors. Views into llama.cpp's buffers (logits,
hidden states) are valid until the next decode on the same context.
"""

import ctypes
import hashlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from step35 import draft_vocabulary
from step35.backend.chosen import check_identity, chosen_libraries, describe
from step35.draft_vocabulary import DraftVocabulary
from step35.errors import Cancelled, ContextFull, ModelError, NativeError, SettingsError
from step35.hardware import usable_cores
from step35.long_runs import cut_long_runs
from step35.machine import DISCRETE, INTEGRATED, Device
from step35.options import ContextOptions, ModelOptions
from step35.rows import Rows

PINNED_VERSION = "0.3.36"

with chosen_libraries(PINNED_VERSION):
    import llama_cpp.llama_cpp as C
    from llama_cpp import Llama as StockLlama  # noqa: F401
    from llama_cpp import LlamaGrammar, LlamaState  # noqa: F401
    from llama_cpp import __version__ as binding_version
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

ARCHITECTURE = "step35"
LOAD_MODES = {
    "auto": C.LLAMA_LOAD_MODE_AUTO,
    "none": C.LLAMA_LOAD_MODE_NONE,
    "mmap": C.LLAMA_LOAD_MODE_MMAP,
    "mlock": C.LLAMA_LOAD_MODE_MMAP_MLOCK,
    "direct_io": C.LLAMA_LOAD_MODE_DIRECT_IO,
}
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}

log = logging.getLogger("step35.llama_cpp")
log.addHandler(logging.NullHandler())  # without it, Python prints a library's warnings on stderr


# llama.cpp's log

_LEVELS = {2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_ERROR = 4
_last_errors: deque[str] = deque(maxlen=4)
_allocations: deque[str] = deque(maxlen=1024)


@C.llama_log_callback
def _route_log(level: int, text: bytes, _: object) -> None:
    line = text.decode(errors="replace").strip()
    if not line:
        return
    if level == _ERROR:
        _last_errors.append(line)
    elif "buffer size = " in line:
        _allocations.append(line)
    log.log(_LEVELS.get(level, logging.DEBUG), "%s", line)


def _reason() -> str:
    reason = "; ".join(_last_errors) or "no reason given"
    _last_errors.clear()
    return reason


def take_allocations() -> list[str]:
    """Returns what llama.cpp's log told of its buffers since the last call."""
    lines = list(_allocations)
    _allocations.clear()
    return lines


# symbols outside the stable C interface


def _bind(name: str, mangled: str, argtypes: list, restype: object):
    for symbol in (name, mangled):
        function = getattr(C._lib, symbol, None)
        if function is not None:
            function.argtypes, function.restype = argtypes, restype
            return function
    raise NativeError(
        f"libllama lacks {name} (looked for {name} and {mangled}): expected llama-cpp-python "
        f"{PINNED_VERSION}, got {binding_version}; pip install llama-cpp-python=={PINNED_VERSION}"
    )


_context_p = C.llama_context_p_ctypes
_set_nextn = _bind(
    "llama_set_embeddings_nextn",
    "_Z26llama_set_embeddings_nextnP13llama_contextbb",
    [_context_p, ctypes.c_bool, ctypes.c_bool],
    None,
)
_get_nextn = _bind(
    "llama_get_embeddings_nextn", "_Z26llama_get_embeddings_nextnP13llama_context", [_context_p], ctypes.c_void_p
)
_get_logits = C._lib["llama_get_logits"]  # not C's own function: a bare address is read faster than a pointer
_get_logits.argtypes, _get_logits.restype = [_context_p], ctypes.c_void_p
_set_head = _bind(
    "llama_set_nextn_layer_offset",
    "_Z28llama_set_nextn_layer_offsetP13llama_contexti",
    [_context_p, ctypes.c_int32],
    None,
)


HEADS_RETURN_ALL_ROWS = getattr(C._lib, "step35_heads_return_all_rows", None) is not None
"""Whether this llama.cpp has the patch by which a head returns hidden states of rows without logits."""


def _identity() -> str:
    """Returns what a library of patches/src says of itself; "" for any other."""
    said = getattr(C._lib, "step35_build", None)
    if said is None:
        return ""
    said.argtypes, said.restype = [], ctypes.c_char_p
    return said().decode()


check_identity(C._base_path, _identity(), binding_version)


def running_backend() -> str:
    """Returns which llama.cpp is loaded, in a line."""
    return describe(C._base_path, _identity())


class _GgufParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


_p = ctypes.c_void_p
_gguf_open = _bind("gguf_init_from_file", "", [ctypes.c_char_p, _GgufParams], _p)
_gguf_free = _bind("gguf_free", "", [_p], None)
_gguf_find_key = _bind("gguf_find_key", "", [_p, ctypes.c_char_p], ctypes.c_int64)
_gguf_find_tensor = _bind("gguf_find_tensor", "", [_p, ctypes.c_char_p], ctypes.c_int64)
_gguf_kv_type = _bind("gguf_get_kv_type", "", [_p, ctypes.c_int64], ctypes.c_int)
_gguf_u16 = _bind("gguf_get_val_u16", "", [_p, ctypes.c_int64], ctypes.c_uint16)
_gguf_u32 = _bind("gguf_get_val_u32", "", [_p, ctypes.c_int64], ctypes.c_uint32)
_gguf_str = _bind("gguf_get_val_str", "", [_p, ctypes.c_int64], ctypes.c_char_p)
_gguf_array_type = _bind("gguf_get_arr_type", "", [_p, ctypes.c_int64], ctypes.c_int)
_gguf_array_length = _bind("gguf_get_arr_n", "", [_p, ctypes.c_int64], ctypes.c_size_t)
_gguf_array_data = _bind("gguf_get_arr_data", "", [_p, ctypes.c_int64], _p)
_GGUF_U16, _GGUF_U32, _GGUF_I32, _GGUF_STRING, _GGUF_ARRAY = 2, 4, 5, 8, 9


# the file


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a GGUF's header says, before any weight is read."""

    path: Path
    n_trunk_layers: int
    n_ctx_train: int
    has_trunk: bool
    n_declared_heads: int
    n_heads: int
    """MTP heads whose tensors are in the file: all declared ones or none."""
    draft_vocabulary: DraftVocabulary | None = None
    """Of trimmed heads."""


def read_facts(path: Path) -> FileFacts:
    """Reads a GGUF's header; raises ModelError unless it is a Step-3.5 trunk, its MTP heads, or both."""
    _check_file(path)
    with _open_gguf(path) as gguf:
        architecture = _text(gguf, "general.architecture")
        is_trimmed = architecture == draft_vocabulary.ARCHITECTURE
        if architecture != ARCHITECTURE and not is_trimmed:
            raise ModelError(
                f"not a Step-3.5 model: {path} expected general.architecture={ARCHITECTURE}, "
                f"got {architecture!r}; convert a checkpoint with convert-step35"
            )
        n_layers = _number(gguf, f"{ARCHITECTURE}.block_count")
        n_heads = _number(gguf, f"{ARCHITECTURE}.nextn_predict_layers", 0)
        n_ctx = _number(gguf, f"{ARCHITECTURE}.context_length")
        shards = _shards(path, _number(gguf, "split.count", 1))
        vocabulary = _draft_vocabulary(path, gguf) if is_trimmed else None
    n_found, has_trunk = _find_blocks(path, n_layers - n_heads, n_heads, shards)
    return FileFacts(path, n_layers - n_heads, n_ctx, has_trunk, n_heads, n_found, vocabulary)


def _draft_vocabulary(path: Path, gguf: int) -> DraftVocabulary:
    tokens, stand_ins = (_integers(gguf, f"{ARCHITECTURE}.draft.{name}") for name in ("tokens", "stand_ins"))
    return draft_vocabulary.checked(path, tokens, stand_ins, _text(gguf, f"{ARCHITECTURE}.draft.vocab_sha256"))


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"no model file: {path} doesn't exist or isn't a file")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"not a GGUF file: {path} expected the magic b'GGUF', got {magic!r}")


def _find_blocks(path: Path, n_trunk: int, n_heads: int, shards: list[Path]) -> tuple[int, bool]:
    """Returns how many MTP heads have tensors, and whether the trunk has."""
    wanted = [b"blk.0.attn_norm.weight"]
    wanted += [b"blk.%d.nextn.eh_proj.weight" % (n_trunk + head) for head in range(n_heads)]
    found: set[bytes] = set()
    for shard in shards:
        with _open_gguf(shard) as gguf:
            found.update(name for name in wanted if _gguf_find_tensor(gguf, name) >= 0)
    n_found = len(found & set(wanted[1:]))
    if n_found not in (0, n_heads):
        raise ModelError(
            f"incomplete MTP heads: {path} expected {n_heads} (nextn_predict_layers), got {n_found}; "
            "convert the checkpoint again, or make a side file with convert-step35 run --mtp only"
        )
    return n_found, wanted[0] in found


def _shards(path: Path, n_shards: int) -> list[Path]:
    if n_shards <= 1:
        return [path]
    stem, _, _ = path.name.rpartition("-00001-of-")
    if not stem:
        raise ModelError(f"not the first shard: {path} expected a name with -00001-of-{n_shards:05}; open that one")
    return [path.with_name(f"{stem}-{i:05}-of-{n_shards:05}.gguf") for i in range(1, n_shards + 1)]


@contextmanager
def _open_gguf(path: Path) -> Iterator[int]:
    _check_file(path)
    gguf = _gguf_open(os.fsencode(path), _GgufParams(True, None))
    if not gguf:
        raise ModelError(f"unreadable GGUF header: {path}: {_reason()}; download or convert it again")
    try:
        yield gguf
    finally:
        _gguf_free(gguf)


def _number(gguf: int, key: str, default: int | None = None) -> int:
    index = _gguf_find_key(gguf, key.encode())
    if index < 0 and default is not None:
        return default
    kind = _gguf_kv_type(gguf, index) if index >= 0 else None
    if kind == _GGUF_U32:
        return _gguf_u32(gguf, index)
    if kind == _GGUF_U16:
        return _gguf_u16(gguf, index)
    raise ModelError(
        f"bad metadata: {key} expected an unsigned integer, got {'nothing' if kind is None else f'type {kind}'}"
    )


def _integers(gguf: int, key: str) -> np.ndarray:
    index = _gguf_find_key(gguf, key.encode())
    if index < 0 or _gguf_kv_type(gguf, index) != _GGUF_ARRAY or _gguf_array_type(gguf, index) != _GGUF_I32:
        raise ModelError(f"bad metadata: {key} expected an array of int32, got nothing or another type")
    n, address = _gguf_array_length(gguf, index), _gguf_array_data(gguf, index)
    return np.array((ctypes.c_int32 * n).from_address(address), np.int32) if n else np.zeros(0, np.int32)


def _text(gguf: int, key: str) -> str:
    index = _gguf_find_key(gguf, key.encode())
    if index < 0 or _gguf_kv_type(gguf, index) != _GGUF_STRING:
        return ""
    return _gguf_str(gguf, index).decode(errors="replace")


# the model


class Model:
    """A loaded GGUF: weights and vocabulary. Opens contexts on itself."""

    def __init__(self, options: ModelOptions) -> None:
        _start_backend()
        self.facts = read_facts(options.path)
        self._handle = _load(options, self.facts.draft_vocabulary is not None)
        self._vocab = C.llama_model_get_vocab(self._handle)
        self.draft_vocabulary = self.facts.draft_vocabulary
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._is_eog: dict[int, bool] = {}
        self.n_logits: int = C.llama_vocab_n_tokens(self._vocab)
        """Logits of a row: one a token of the vocabulary, or of the trimmed heads' own."""
        self.n_vocab = len(self.draft_vocabulary.stand_ins) if self.draft_vocabulary else self.n_logits
        self.n_embd: int = C.llama_model_n_embd(self._handle)
        self.n_swa: int = C.llama_model_n_swa(self._handle)
        self.n_ctx_train: int = C.llama_model_n_ctx_train(self._handle)
        self.n_heads = self.facts.n_heads if options.load_heads else 0
        self.n_bytes: int = C.llama_model_size(self._handle)
        self.n_params: int = C.llama_model_n_params(self._handle)
        self.bos: int = C.llama_vocab_bos(self._vocab)
        self.eos: int = C.llama_vocab_eos(self._vocab)
        self.add_bos: bool = C.llama_vocab_get_add_bos(self._vocab)
        self.turn_start = None if self.draft_vocabulary else self._single_token(b"<|im_start|>")
        """The token that begins a message; None in a vocabulary without chat tokens."""

    def close(self) -> None:
        if self._handle:
            C.llama_model_free(self._handle)
            self._handle = None

    def open_trunk(self, options: ContextOptions, *, on_experts: "OnExperts | None" = None) -> "Context":
        """Opens a context over the trunk's layers; `on_experts` makes it a slow one, for profiling."""
        return Context(self, options, on_experts=on_experts)

    def open_head(self, head: int, options: ContextOptions) -> "Context":
        """Opens a context over one MTP head; its rows are (token, hidden state)."""
        return Context(self, options, head=head)

    # tokens and text

    def tokenize(self, text: bytes, *, add_bos: bool, parse_special: bool) -> list[int]:
        tokens: list[int] = []
        for i, piece in enumerate(cut_long_runs(text)):
            tokens += self._tokenize(piece, add_bos and i == 0, parse_special)
        return tokens

    def _tokenize(self, text: bytes, add_bos: bool, parse_special: bool) -> list[int]:
        room = len(text) + 8
        tokens = (C.llama_token * room)()
        n = C.llama_tokenize(self._vocab, text, len(text), tokens, room, add_bos, parse_special)
        if n < 0:
            raise NativeError(f"tokenization failed: {len(text)} bytes expected at most {room} tokens, got {-n}")
        return tokens[:n]

    def _single_token(self, text: bytes) -> int | None:
        tokens = self.tokenize(text, add_bos=False, parse_special=True)
        return tokens[0] if len(tokens) == 1 else None

    def text(self, token: int) -> str:
        """Returns a token's text as the vocabulary spells it, control tokens included."""
        return (C.llama_vocab_get_text(self._vocab, token) or b"").decode(errors="replace")

    @property
    def newline(self) -> int:
        return C.llama_vocab_nl(self._vocab)

    @property
    def vocab_digest(self) -> str:
        """A short digest of all token texts: equal for files of the same checkpoint."""
        if self.draft_vocabulary:
            return self.draft_vocabulary.digest
        texts = (C.llama_vocab_get_text(self._vocab, token) or b"" for token in range(self.n_vocab))
        return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Returns a token's bytes; control tokens are empty unless `special`."""
        found = self._pieces.get((token, special))
        if found is None:
            found = self._pieces[token, special] = self._piece(token, special)
        return found

    def _piece(self, token: int, special: bool) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = C.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def is_eog(self, token: int) -> bool:
        found = self._is_eog.get(token)
        if found is None:
            found = self._is_eog[token] = C.llama_vocab_is_eog(self._vocab, token)
        return found

    def open_grammar(self, gbnf: str) -> "Grammar":
        """Returns a grammar's state at its start; raises SettingsError on text that isn't GBNF."""
        return Grammar(self, gbnf)

    @property
    def chat_template(self) -> str | None:
        """The file's Jinja template for chat messages."""
        return self.metadata("tokenizer.chat_template")

    def all_metadata(self) -> dict[str, str]:
        """Returns all scalar metadata as text, by key."""
        return {key: self.metadata(key) or "" for key in map(self._metadata_key, range(self._n_metadata()))}

    def _n_metadata(self) -> int:
        return C.llama_model_meta_count(self._handle)

    def _metadata_key(self, index: int) -> str:
        buffer = ctypes.create_string_buffer(256)
        C.llama_model_meta_key_by_index(self._handle, index, buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def metadata(self, key: str) -> str | None:
        """Returns a scalar metadata value as text."""
        room = 256
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = C.llama_model_meta_val_str(self._handle, key.encode(), buffer, room)
            if n < room:
                return buffer.value.decode(errors="replace") if n >= 0 else None
            room = n + 1


_started = False


def _start_backend() -> None:
    global _started
    C.llama_log_set(_route_log, None)
    if not _started:
        C.llama_backend_init()
        _started = True


def _load(options: ModelOptions, is_trimmed: bool) -> object:
    for endpoint in options.rpc:
        add_rpc_server(endpoint)
    if options.spreads_numa:
        _spread_numa()
    params = C.llama_model_default_params()
    params.n_gpu_layers = options.n_gpu_layers
    params.load_mode = LOAD_MODES[options.load_mode]
    params.load_mtp = options.load_heads
    overrides, shares = _overrides(options.overrides), _shares(options.tensor_split)  # llama.cpp borrows both
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p) if overrides else None
    params.tensor_split = shares
    params.kv_overrides = _renamed() if is_trimmed else None
    params.vocab_only = options.vocab_only
    _last_errors.clear()
    handle = C.llama_model_load_from_file(os.fsencode(options.path), params)
    if not handle:
        raise ModelError(f"can't load {options.path}: {_reason()}; if a download was cut short, fetch the file again")
    return handle


@cache  # llama.cpp borrows it
def _renamed() -> "ctypes.Array[C.llama_model_kv_override]":
    """Makes llama.cpp load trimmed heads as what they are but for the ids."""
    entries = (C.llama_model_kv_override * 2)()
    entries[0].tag, entries[0].key = C.LLAMA_KV_OVERRIDE_TYPE_STR, b"general.architecture"
    entries[0].value.val_str = ARCHITECTURE.encode()
    return entries


@cache
def _spread_numa() -> None:
    C.llama_numa_init(_NUMA_DISTRIBUTE)


_NUMA_DISTRIBUTE = 1


class _Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


# through libllama's own handle: another copy of ggml would give another pointer
_cpu_buffer_type = _bind("ggml_backend_cpu_buffer_type", "", [], ctypes.c_void_p)
_HOST = "CPU"


def _overrides(pairs: Sequence[tuple[str, str]]) -> "ctypes.Array[_Override] | None":
    unknown = [name for _, name in pairs if name != _HOST]
    if unknown:
        raise SettingsError(f"bad override: buffer type expected {_HOST}, got {unknown[0]!r}")
    rows = [_Override(pattern.encode(), _cpu_buffer_type()) for pattern, _ in pairs]
    return (_Override * (len(rows) + 1))(*rows) if rows else None


def _shares(shares: Sequence[float]) -> "ctypes.Array[ctypes.c_float] | None":
    return (ctypes.c_float * C.llama_max_devices())(*shares) if shares else None


# devices


class _DeviceProps(ctypes.Structure):
    _fields_ = [(name, ctypes.c_char_p) for name in ("name", "description")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("free", "total")]
    _fields_ += [("type", ctypes.c_int), ("id", ctypes.c_char_p), ("caps", ctypes.c_bool * 16)]


_device_count = _bind("ggml_backend_dev_count", "", [], ctypes.c_size_t)
_device_get = _bind("ggml_backend_dev_get", "", [ctypes.c_size_t], _p)
_device_props = _bind("ggml_backend_dev_get_props", "", [_p, ctypes.POINTER(_DeviceProps)], None)
_GPU_KINDS = {1: DISCRETE, 2: INTEGRATED}


def may_have_gpus() -> bool:
    """Whether this build of llama.cpp may know GPUs; unlike `devices`, reads nothing of ggml's environment."""
    names = {path.name.split(".")[0].removeprefix("lib") for path in C._base_path.glob("*ggml*")}
    return not names or bool(names - {"ggml", "ggml-base", "ggml-cpu", "ggml-blas", "ggml-rpc"})


def devices() -> list[Device]:
    """Returns the GPUs that llama.cpp was built for and finds."""
    found = []
    for props in _gpus():
        if props.name.startswith(_RPC):
            continue  # another box's
        name, address = props.description.decode(), props.id.decode() if props.id else None
        found.append(Device(name, _GPU_KINDS[props.type], props.total, props.free, address))
    return found


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
    _start_backend()
    seen: set[bytes] = set()
    for index in range(_device_count()):
        props = _DeviceProps()
        _device_props(_device_get(index), props)
        if props.type in _GPU_KINDS and props.id not in seen:
            seen |= {props.id} if props.id else set()
            yield props


# other boxes

_RPC = b"RPC"
_reg_by_name = _bind("ggml_backend_reg_by_name", "", [ctypes.c_char_p], _p)
_reg_address = _bind("ggml_backend_reg_get_proc_address", "", [_p, ctypes.c_char_p], _p)
_register = _bind("ggml_backend_register", "", [_p], None)
_added: set[str] = set()
_OnAbort = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_set_on_abort = _bind("ggml_set_abort_callback", "", [_OnAbort], _p)


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
    _start_backend()
    _set_on_abort(_end_in_a_line)
    registry = _reg_by_name(_RPC)
    address = _reg_address(registry, b"ggml_backend_rpc_add_server") if registry else None
    if not address:
        raise NativeError(
            f"can't use {endpoint}: this llama.cpp expected to be built with RPC, got no RPC backend; "
            "step35 backend build makes one"
        )
    if endpoint not in _added:
        server = ctypes.CFUNCTYPE(_p, ctypes.c_char_p)(address)(endpoint.encode())
        if not server:
            raise NativeError(f"can't use {endpoint}: its rpc-server refused; see its output")
        _register(server)
        _added.add(endpoint)


# a context


_NO_ROOM, _ABORTED = 1, 2  # positive return codes of llama_decode


def _abort_address() -> int:
    """strlen as the abort callback: it sees a flag byte without entering Python at every graph node."""
    return ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value or 0


# which experts a decode uses

OnExperts = Callable[[int, np.ndarray], None]
"""Takes a layer and its experts (n_rows, n_expert_used), int32, of one decode."""
_EXPERTS = b"ffn_moe_topk-"


class _Tensor(ctypes.Structure):
    """The beginning of a ggml_tensor."""

    _fields_ = [("type", ctypes.c_int), ("buffer", _p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4)]


_tensor_name = _bind("ggml_get_name", "", [_p], ctypes.c_char_p)
_tensor_get = _bind("ggml_backend_tensor_get", "", [_p, _p, ctypes.c_size_t, ctypes.c_size_t], None)


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
        for field, array in self._pointers():
            kind = dict(C.llama_batch._fields_)[field]
            setattr(self.c, field, ctypes.cast(array.ctypes.data, kind))

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
        model: Model,
        options: ContextOptions,
        head: int | None = None,
        on_experts: "OnExperts | None" = None,
    ) -> None:
        self.model = model
        self.n_batch = options.n_batch
        self._watch = _expert_watch(on_experts) if on_experts else None  # llama.cpp borrows it
        self._ctx = self._open(model, options, head, self._watch)
        self._memory = C.llama_get_memory(self._ctx)
        self._batch = _Batch(options.n_batch, model.n_embd if head is not None else 0)
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
    def _open(model: Model, options: ContextOptions, head: int | None, watch: object = None) -> object:
        params = C.llama_context_default_params()
        if watch is not None:
            params.cb_eval = watch
        params.n_ctx, params.n_batch, params.n_ubatch = options.n_ctx, options.n_batch, options.n_batch
        params.n_seq_max, params.n_outputs_max = options.n_seq, options.n_outputs
        # llama.cpp's own number may be more than the cores: its threads spin, and wait for each other's time slices
        params.n_threads = options.n_threads or min(params.n_threads, usable_cores())
        params.n_threads_batch = options.n_threads_batch or params.n_threads
        params.type_k = params.type_v = KV_TYPES[options.kv_type]
        params.flash_attn_type = -1 if options.flash_attention is None else int(options.flash_attention)
        params.ctx_type = C.LLAMA_CONTEXT_TYPE_DEFAULT if head is None else C.LLAMA_CONTEXT_TYPE_MTP
        params.offload_kqv, params.op_offload = options.offload_kqv, options.op_offload
        params.swa_full, params.kv_unified, params.no_perf = False, True, True
        _last_errors.clear()
        ctx = C.llama_init_from_model(model._handle, params)
        if not ctx:
            raise NativeError(
                f"can't open a context of {options.n_ctx} tokens, {options.n_seq} sequences, batch {options.n_batch}: "
                f"{_reason()}; ask for a smaller context"
            )
        return ctx

    def close(self) -> None:
        if self._ctx:
            C.llama_free(self._ctx)
            self._ctx = None

    @property
    def n_ctx(self) -> int:
        return C.llama_n_ctx(self._ctx)

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
        reason = _reason()
        if code == _ABORTED:
            self._abort[0] = b"\x00"
            raise Cancelled("decode cancelled")
        if code == _NO_ROOM:
            raise ContextFull(
                f"context full: {n_rows} more tokens don't fit into {self.n_ctx} cells shared by all sessions; "
                "close a session or load with a larger context"
            )
        raise NativeError(f"llama_decode of {n_rows} tokens failed with code {code}: {reason}")

    def logits(self) -> np.ndarray:
        """Returns a view (n_outputs, n_logits) float32 of the last decode's output rows, in batch order."""
        return _view(_get_logits(self._ctx), self._n_outputs, self.model.n_logits)

    def hidden(self) -> np.ndarray:
        """Returns a view (rows, n_embd) float32 of pre-norm hidden states.

        Those of every row of the last decode, or of its output rows where not `returns_all_rows`; in batch order.
        """
        n_rows = self._n_rows if self.returns_all_rows else self._n_outputs
        return _view(_get_nextn(self._ctx), n_rows, self.model.n_embd)

    # the KV cache

    def truncate(self, seq: int, n_keep: int) -> None:
        """Forgets a sequence's cells from position `n_keep` on."""
        C.llama_memory_seq_rm(self._memory, seq, n_keep, -1)

    def copy(self, source: int, target: int, n_keep: int) -> None:
        """Lets `target` share the cells of `source` before position `n_keep`."""
        C.llama_memory_seq_cp(self._memory, source, target, 0, n_keep)

    def held_from(self, seq: int) -> int:
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
            raise NativeError(
                f"restoring sequence {seq} failed: {_reason()}; expected {len(state)} bytes, got {n_read}"
            )


@lru_cache(maxsize=64)  # they seldom move
def _view(address: int | None, n_rows: int, width: int) -> np.ndarray:
    if not address:
        raise NativeError(f"llama.cpp returned no rows: expected {n_rows} of width {width}")
    return np.frombuffer((ctypes.c_float * (n_rows * width)).from_address(address), np.float32).reshape(n_rows, width)


# grammar


class Grammar:
    """The state of a GBNF grammar: which tokens may come next."""

    def __init__(self, model: Model, gbnf: str) -> None:
        _last_errors.clear()
        self._sampler = C.llama_sampler_init_grammar(model._vocab, gbnf.encode(), b"root")
        if not self._sampler:
            raise SettingsError(f"bad grammar: expected GBNF with a rule named root: {_reason()}")
        self._candidates = np.zeros(model.n_vocab, _CANDIDATE)

    def close(self) -> None:
        if self._sampler:
            C.llama_sampler_free(self._sampler)
            self._sampler = None

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        """Returns which of the token ids (bool, same length) may come next."""
        candidates = self._candidates[: len(ids)]
        candidates["id"], candidates["logit"], candidates["p"] = ids, 0, 0
        pointer = ctypes.cast(candidates.ctypes.data, C.llama_token_data_p)
        array = C.llama_token_data_array(pointer, len(ids), -1, False)
        C.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return candidates["logit"] > -np.inf

    def accept(self, token: int) -> None:
        """Moves on past a chosen token, which must be allowed."""
        C.llama_sampler_accept(self._sampler, token)


_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def chat_renderer(model: Model) -> Callable[[list[dict]], str]:
    """Returns a function that renders messages as the prompt text of the next answer.

    Contents are stripped, as llama.cpp does for this template: left-over white space makes it loop.
    """
    template = model.chat_template
    if template is None:
        raise ModelError(f"no chat template: {model.facts.path} has no tokenizer.chat_template; convert it again")
    formatter = Jinja2ChatFormatter(template=template, eos_token=model.text(model.eos), bos_token=model.text(model.bos))
    return lambda messages: formatter(messages=[stripped(message) for message in messages]).prompt


def stripped(message: dict) -> dict:
    """Returns a chat message whose content has no white space around it."""
    content = message.get("content")
    return {**message, "content": content.strip()} if isinstance(content, str) else message


def json_schema_grammar(schema: str) -> str:
    """Returns the GBNF of a JSON schema; raises SettingsError on a schema that can't be expressed."""
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        return json_schema_to_gbnf(schema)
    except Exception as error:  # the converter raises whatever its walk over the schema meets
        raise SettingsError(f"bad JSON schema: {type(error).__name__}: {error}") from error
