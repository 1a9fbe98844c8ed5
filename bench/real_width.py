"""Generates a GGUF of the real model's width and few layers, with random weights, for timing.

One dense and four MoE layers of 288 experts, three MTP heads, all 128896 vocabulary rows: 13 GB at
Q4_K_S. Its text means nothing; a decode reads and computes what five layers of the real model do.
The header is the converter's own, planned from a checkpoint of holes. A matrix is put together from a
pool of quantized blocks of Gaussian weights, each drawn at random, so no two rows are alike.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import click
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from convert_step35.cli.workspace import open_workspace
from convert_step35.gguf.ggml_types import block_size, row_bytes
from convert_step35.models import load_models
from convert_step35.planning.plan import ConversionOptions, MtpMode, PlannedFile, PlannedTensor
from convert_step35.quantization.libggml import load_ggml
from convert_step35.source.mapping import Kind
from convert_step35.source.rope_freqs import rope_freqs

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]  # the tests' checkpoint generator

from checkpoints import REAL, write_checkpoint

SHAPE = replace(REAL, num_hidden_layers=5, first_moe_layer=1)
PRESET = "Q4_K_S"
POOL_BLOCKS = 4096
CHUNK_BLOCKS = 1 << 19


def write_model(out: Path, *, preset: str = PRESET, mtp: MtpMode = MtpMode.KEEP) -> Path:
    """Writes the GGUF and returns its path."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "step35-slice", SHAPE, sparse=True)
        models = load_models()
        workspace = open_workspace(checkpoint, models, mtp=mtp)
        (planned,) = workspace.plan(ConversionOptions(out, preset, mtp=mtp), models).files
    _write(planned, {Kind.ROPE_FREQS: rope_freqs(workspace.checkpoint.arch)})
    return out


def _write(planned: PlannedFile, generated: dict[Kind, np.ndarray]) -> None:
    partial = planned.path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(planned.header)
        for tensor in planned.tensors:
            file.seek(tensor.offset)
            for data in _data(tensor, generated):
                file.write(data.data.cast("B"))
        file.truncate(planned.n_bytes)
    partial.rename(planned.path)


def _data(tensor: PlannedTensor, generated: dict[Kind, np.ndarray]) -> Iterator[np.ndarray]:
    mapped = tensor.mapped
    rng = np.random.default_rng(tensor.offset)
    if mapped.kind is Kind.MATRIX:
        yield from _matrix(tensor, rng)
    elif mapped.kind is Kind.ROPE_FREQS:
        yield generated[mapped.kind]
    elif mapped.kind is Kind.NORM:
        yield np.ones(mapped.shape, np.float32)
    elif len(mapped.shape) == 1:  # the router's bias
        yield np.zeros(mapped.shape, np.float32)
    else:
        yield _gaussian(rng, mapped.shape, mapped.row_size)


def _matrix(tensor: PlannedTensor, rng: np.random.Generator) -> Iterator[np.ndarray]:
    pool = _pool(tensor.ggml_type, tensor.mapped.row_size)
    n_left = tensor.n_bytes // pool.shape[1]
    while n_left:
        n = min(n_left, CHUNK_BLOCKS)
        yield pool[rng.integers(0, POOL_BLOCKS, n, np.uint16)]
        n_left -= n


@cache
def _pool(kind: GgmlType, row_size: int) -> np.ndarray:
    """Returns quantized blocks (POOL_BLOCKS, bytes of a block) uint8 whose products keep a row's variance."""
    n = block_size(kind)
    weights = _gaussian(np.random.default_rng(row_size), (POOL_BLOCKS, n), row_size)
    blocks = np.empty((POOL_BLOCKS, row_bytes(kind, n)), np.uint8)
    load_ggml().quantize(kind, weights, blocks, None)
    return blocks


def _gaussian(rng: np.random.Generator, shape: tuple[int, ...], row_size: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) * np.float32(row_size**-0.5)


@click.command(help=__doc__)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--type", "preset", default=PRESET, show_default=True, help="Preset of llama-quantize.")
def main(out: Path, preset: str) -> None:
    click.echo(write_model(out, preset=preset))


if __name__ == "__main__":
    main()
