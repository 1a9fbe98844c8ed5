"""Wrecks a GGUF's MTP heads: their matrices become noise, and nothing they draft is ever right.

The blocks of every matrix in an MTP layer change places at random. The trunk stays as it is.
"""

import re
import shutil
from pathlib import Path

import click
import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, ReaderTensor

RUN = 32  # weights that stay together, where a block has only one


def wreck(source: Path, out: Path) -> Path:
    """Writes the wrecked copy and returns its path."""
    shutil.copyfile(source, out)
    reader = GGUFReader(out, "r+")
    n_layers, n_heads = (_number(reader, f"step35.{key}") for key in ("block_count", "nextn_predict_layers"))
    for tensor in reader.tensors:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        if layer and int(layer[1]) >= n_layers - n_heads and len(tensor.shape) > 1:
            _shuffle_blocks(tensor)
    reader.data.flush()
    return out


def _number(reader: GGUFReader, key: str) -> int:
    return int(reader.fields[key].contents())


def _shuffle_blocks(tensor: ReaderTensor) -> None:
    n_weights, n_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
    blocks = tensor.data.view(np.uint8).reshape(-1, n_bytes * max(1, RUN // n_weights))
    blocks[:] = np.random.default_rng(len(blocks)).permutation(blocks)


@click.command(help=__doc__)
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def main(source: Path, out: Path) -> None:
    click.echo(wreck(source, out))


if __name__ == "__main__":
    main()
