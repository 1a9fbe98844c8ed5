"""From paths and options to what a command works on: the checkpoint, its tokenizer, the plan, the fingerprint."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from convert_step35 import __version__
from convert_step35.gguf.imatrix import Imatrix, check_fit, read_imatrix
from convert_step35.gguf.metadata import Provenance
from convert_step35.models import KnownCheckpoint, Models
from convert_step35.planning.chunks import CHUNK_WEIGHTS
from convert_step35.planning.plan import ConversionOptions, MtpMode, Plan, Subject, make_plan
from convert_step35.quantization.libggml import Ggml, identify
from convert_step35.source.checkpoint import Checkpoint, digest, modification_times, open_checkpoint
from convert_step35.source.mapping import map_tensors
from convert_step35.source.strict_json import read_json
from convert_step35.source.tokenizer import read_tokenizer

MAX_GENERATION_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Workspace:
    """An opened checkpoint, ready to be planned. `known` is its entry in models.yaml, if it has one."""

    checkpoint: Checkpoint
    known: KnownCheckpoint | None
    subject: Subject
    imatrix: Imatrix | None

    def plan(self, options: ConversionOptions, models: Models) -> Plan:
        return make_plan(self.subject, options, models.recipes)


def open_workspace(folder: Path, models: Models, *, mtp: MtpMode, imatrix_path: Path | None = None) -> Workspace:
    """Open and check everything that a plan depends on, before any tensor data is read."""
    checkpoint = open_checkpoint(folder, mtp_only=mtp is MtpMode.ONLY)
    imatrix = read_imatrix(imatrix_path) if imatrix_path is not None else None
    if imatrix is not None:
        check_fit(imatrix, map_tensors(checkpoint.arch, trunk=True, mtp=True))
    known = identify_checkpoint(checkpoint, models)
    return Workspace(checkpoint, known, _subject(checkpoint, known, imatrix), imatrix)


def identify_checkpoint(checkpoint: Checkpoint, models: Models) -> KnownCheckpoint | None:
    """The published checkpoint with this shape, dtype and vision part."""
    arch = checkpoint.arch
    shape = {
        "n_layers": arch.n_trunk,
        "n_mtp_layers": arch.n_mtp,
        "hidden_size": arch.hidden_size,
        "vocab_size": arch.vocab_size,
        "n_experts": arch.n_experts,
        "n_experts_used": arch.n_experts_used,
        "context_length": arch.context_length,
    }
    return next(
        (
            known
            for name, known in models.checkpoints.items()
            if asdict(known.shape) == shape and known.dtype == checkpoint.dtype and ("3.7" in name) == arch.has_vision
        ),
        None,
    )


def fingerprint(workspace: Workspace, plan: Plan, ggml: Ggml) -> dict[str, str]:
    """What a resumed conversion must find unchanged, by name."""
    library = identify(ggml)
    times = modification_times(workspace.checkpoint)
    return {
        "checkpoint": workspace.subject.provenance.source_sha256,
        "checkpoint modification times": ", ".join(f"{name} {time}" for name, time in times.items()),
        "recipe": plan.recipe,
        "imatrix": workspace.imatrix.sha256 if workspace.imatrix is not None else "none",
        "convert-step35": __version__,
        "llama-cpp-python": library.llama_cpp_python,
        "libggml": library.library_sha256,
        "layout": plan.sha256(),
        "weights in a chunk": str(CHUNK_WEIGHTS),
    }


def _subject(checkpoint: Checkpoint, known: KnownCheckpoint | None, imatrix: Imatrix | None) -> Subject:
    arch = checkpoint.arch
    generation_path = checkpoint.folder / "generation_config.json"
    generation = read_json(generation_path, max_bytes=MAX_GENERATION_BYTES) if generation_path.exists() else {}
    # A folder's name may be any bytes; the metadata is UTF-8.
    name = os.fsencode(checkpoint.folder.resolve().name).decode(errors="replace")
    provenance = Provenance(
        title=known.title if known is not None else name,
        license=known.license if known is not None else None,
        source=known.repository if known is not None else name,
        source_sha256=digest(checkpoint),
        recipe="",
        version=__version__,
        imatrix=imatrix.provenance() if imatrix is not None else (),
    )
    return Subject(
        arch=arch,
        has_mtp=checkpoint.has_mtp,
        tokenizer=read_tokenizer(checkpoint.folder, arch.vocab_size, arch.eos_token_ids, checkpoint.config),
        generation=generation,
        provenance=provenance,
        imatrix_names=frozenset(imatrix.entries) if imatrix is not None else None,
    )
