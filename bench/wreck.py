"""Wrecks a GGUF's MTP heads: their matrices become noise, and nothing they draft is ever right.

The blocks of every quantized matrix in an MTP layer change places at random. The trunk stays as it is.
"""

import re
import shutil
from pathlib import Path

import click
import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, ReaderTensor


def wreck(source: Path, out: Path) -> Path:
    """Writes the wrecked copy and returns its path."""
    shutil.copyfile(source, out)
    reader = GGUFReader(out, "r+")
    n_layers, n_heads = (_number(reader, f"step35.{key}") for key in ("block_count", "nextn_predict_layers"))
    for tensor in reader.tensors:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        if layer and int(layer[1]) >= n_layers - n_heads and tensor.data.dtype == np.uint8:
            _shuffle_blocks(tensor)
    reader.data.flush()
    return out


def _number(reader: GGUFReader, key: str) -> int:
    return int(reader.fields[key].contents())


def _shuffle_blocks(tensor: ReaderTensor) -> None:
    blocks = tensor.data.reshape(-1, GGML_QUANT_SIZES[tensor.tensor_type][1])
    blocks[:] = np.random.default_rng(len(blocks)).permutation(blocks)


@click.command(help=__doc__)
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def main(source: Path, out: Path) -> None:
    click.echo(wreck(source, out))


if __name__ == "__main__":
    main()
