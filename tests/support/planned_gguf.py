"""GGUFs of any shape and recipe with the converter's own headers over holes: exact sizes, no weights."""

from pathlib import Path

import checkpoints
from checkpoints import Shape, config
from convert_step35.gguf.metadata import Provenance
from convert_step35.models import load_models
from convert_step35.planning.plan import ConversionOptions, MtpMode, Subject, make_plan
from convert_step35.source.architecture import read_architecture
from convert_step35.source.tokenizer import read_tokenizer


def write(
    path: Path, shape: Shape, recipe: str, *, split_max_bytes: int | None = None, mtp: MtpMode = MtpMode.KEEP
) -> Path:
    """Writes the file, or its shards, and returns the (first) path. Takes a few MB of disk for the vocabulary."""
    settings = config(shape, eos=[1, 2])
    arch = read_architecture(settings)
    tokenizer = read_tokenizer(checkpoints.BUNDLED, arch.vocab_size, arch.eos_token_ids, settings)
    origin = Provenance("planned", None, "none", "0" * 64, "", "0")
    subject = Subject(arch, shape.num_nextn_predict_layers > 0, tokenizer, {}, origin, frozenset())
    plan = make_plan(
        subject, ConversionOptions(path, recipe, mtp=mtp, split_max_bytes=split_max_bytes), load_models().recipes
    )
    for file in plan.files:
        with file.path.open("wb") as out:
            out.write(file.header)
            out.truncate(file.n_bytes)
    return plan.files[0].path
