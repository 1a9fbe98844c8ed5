"""A loaded GGUF: weights and vocabulary."""

import ctypes
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from step35.choices import LOAD_MODES
from step35.errors import DoesNotFit, ModelError, NativeError, SettingsError, Step35Error
from step35.markup import TURN_START
from step35.native.context import Context
from step35.native.devices import add_rpc_server
from step35.native.draft_vocabulary import ARCHITECTURE, DraftVocabulary
from step35.native.grammar import Grammar
from step35.native.interface import OnExperts
from step35.native.library import C, bind, forget_errors, reason, start_backend
from step35.native.load_failures import memory_remedy
from step35.native.long_runs import cut_long_runs
from step35.options import ContextOptions, ModelOptions


class Model:
    """A loaded GGUF: weights and vocabulary. Opens contexts on itself."""

    def __init__(self, options: ModelOptions, draft_vocabulary: DraftVocabulary | None = None) -> None:
        """`draft_vocabulary` is that of a file with trimmed heads."""
        start_backend()
        self.path = options.path
        self.draft_vocabulary = draft_vocabulary
        self._handle = _load(options, draft_vocabulary is not None)
        self._vocab = C.llama_model_get_vocab(self._handle)
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._is_eog: dict[int, bool] = {}
        self.n_logits: int = C.llama_vocab_n_tokens(self._vocab)
        """Logits of a row: one a token of the vocabulary, or of the trimmed heads' own."""
        self.n_vocab = len(self.draft_vocabulary.stand_ins) if self.draft_vocabulary else self.n_logits
        self.n_embd: int = C.llama_model_n_embd(self._handle)
        self.n_swa: int = C.llama_model_n_swa(self._handle)
        self.n_ctx_train: int = C.llama_model_n_ctx_train(self._handle)
        self.bos: int = C.llama_vocab_bos(self._vocab)
        self.eos: int = C.llama_vocab_eos(self._vocab)
        self.add_bos: bool = C.llama_vocab_get_add_bos(self._vocab)
        self.turn_start = None if self.draft_vocabulary else self._single_token(TURN_START.encode())
        """The token that begins a message; None in a vocabulary without chat tokens."""

    @property
    def handle(self) -> object:
        """The address of its llama_model."""
        return self._handle

    def close(self) -> None:
        if self._handle:
            C.llama_model_free(self._handle)
            self._handle = None

    def open_trunk(self, options: ContextOptions, *, on_experts: OnExperts | None = None) -> Context:
        """Opens a context over the trunk's layers; `on_experts` makes it a slow one, for profiling."""
        return Context(self._handle, self.n_embd, self.n_logits, options, on_experts=on_experts)

    def open_head(self, head: int, options: ContextOptions) -> Context:
        """Opens a context over one MTP head; its rows are (token, hidden state)."""
        return Context(self._handle, self.n_embd, self.n_logits, options, head=head)

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

    def open_grammar(self, gbnf: str) -> Grammar:
        """Returns a grammar's state at its start; raises SettingsError on text that isn't GBNF."""
        return Grammar(self._vocab, self.n_vocab, gbnf)

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


def _load(options: ModelOptions, is_trimmed: bool) -> Any:
    for endpoint in options.rpc:
        add_rpc_server(endpoint)
    if options.spreads_numa:
        _spread_numa()
    params = C.llama_model_default_params()
    params.n_gpu_layers = options.n_gpu_layers
    params.load_mode = getattr(C, f"LLAMA_LOAD_MODE_{LOAD_MODES[options.load_mode].native}")
    params.load_mtp = options.load_heads
    overrides, shares = _overrides(options.overrides), _shares(options.tensor_split)  # llama.cpp borrows both
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p) if overrides else None
    params.tensor_split = shares
    params.kv_overrides = _renamed() if is_trimmed else None
    params.vocab_only = options.vocab_only
    forget_errors()
    handle = C.llama_model_load_from_file(os.fsencode(options.path), params)
    if not handle:
        raise _refused(options, reason())
    return handle


def _refused(options: ModelOptions, why: str) -> Step35Error:
    if remedy := memory_remedy(why):
        return DoesNotFit(f"can't load {options.path}: {why}; {remedy}")
    return ModelError(f"can't load {options.path}: {why}; if a download was cut short, fetch the file again")


@cache  # llama.cpp borrows it
def _renamed() -> "ctypes.Array[Any]":
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
_cpu_buffer_type = bind("ggml_backend_cpu_buffer_type", "", [], ctypes.c_void_p)
_HOST = "CPU"


def _overrides(pairs: Sequence[tuple[str, str]]) -> "ctypes.Array[_Override] | None":
    unknown = [name for _, name in pairs if name != _HOST]
    if unknown:
        raise SettingsError(f"bad override: buffer type expected {_HOST}, got {unknown[0]!r}")
    rows = [_Override(pattern.encode(), _cpu_buffer_type()) for pattern, _ in pairs]
    return (_Override * (len(rows) + 1))(*rows) if rows else None


def _shares(shares: Sequence[float]) -> "ctypes.Array[ctypes.c_float] | None":
    return (ctypes.c_float * C.llama_max_devices())(*shares) if shares else None
