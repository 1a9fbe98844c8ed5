"""What the cells of a session depend on: a session file is read only where all of it is the same."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from step35.engine.engine import Engine

N_SAMPLES, SAMPLE_BYTES = 64, 1 << 16


def session_key(engine: Engine) -> dict[str, str]:
    """Returns the model's digest, the type of the KV cache, llama-cpp-python's version and the template's digest."""
    template = (engine.chat_template or "").encode()
    return {
        "model": model_digest(engine.headers.model.files),
        "kv_type": engine.options.kv_type,
        "llama-cpp-python": version("llama-cpp-python"),
        "template": hashlib.blake2b(template, digest_size=8).hexdigest(),
    }


def model_digest(files: Sequence[Path]) -> str:
    """Returns a digest of a model's files: their sizes, and pieces from the first byte to the last.

    The whole of a hundred gigabytes would take minutes at every start.
    """
    digest = hashlib.blake2b(digest_size=16)
    for shard in files:
        n_bytes = shard.stat().st_size
        digest.update(str(n_bytes).encode())
        with open(shard, "rb") as file:
            for i in range(N_SAMPLES):
                file.seek(max(n_bytes - SAMPLE_BYTES, 0) * i // (N_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
