"""The native quantizers against libggml's, on one core, in one process, taking turns.

Rows are random, 4096 weights long, with scales that vary by row, as the real model's matrices; the imatrix
is random too. Time is the thread's CPU time, the best of the rounds. MB/s count the weights as bfloat16.
"""

import csv
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from rich.console import Console
from rich.table import Table

from convert_step35.gguf.ggml_types import row_bytes
from convert_step35.quantization.libggml import Ggml, load_ggml
from convert_step35.quantization.native_kernels import NativeKernels, native_path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from convert import cpu_model

KINDS = [GgmlType[name] for name in ("Q4_K", "Q8_0", "IQ4_XS", "IQ4_NL", "Q6_K", "Q5_K", "Q3_K", "Q2_K")]
SHAPE = 32, 4096


@dataclass(frozen=True, slots=True)
class Rate:
    """One quantizer's speed at one type; `ratio` is to libggml's."""

    type: str
    imatrix: bool
    quantizer: str
    mb_s: float
    ratio: float


def rates(
    kind: GgmlType, imatrix: np.ndarray | None, makers: Mapping[str, Ggml | NativeKernels], rounds: int
) -> list[Rate]:
    """The speed of every quantizer at one type; RuntimeError where their bytes differ."""
    rng = np.random.default_rng(35)
    rows = (rng.standard_normal(SHAPE) * rng.lognormal(-4, 0.5, (SHAPE[0], 1))).astype(np.float32)
    outs = {name: np.zeros(SHAPE[0] * row_bytes(kind, SHAPE[1]), np.uint8) for name in makers}
    works = {name: partial(maker.quantize, kind, rows, outs[name], imatrix) for name, maker in makers.items()}
    turns = [{name: seconds(work) for name, work in works.items()} for _ in range(rounds)]
    if any(not np.array_equal(out, outs["libggml"]) for out in outs.values()):
        raise RuntimeError(f"{kind.name}: the quantizers' bytes differ")
    best = {name: min(turn[name] for turn in turns) for name in makers}
    return [
        Rate(kind.name, imatrix is not None, name, round(2 * rows.size / s / 1e6, 1), round(best["libggml"] / s, 1))
        for name, s in best.items()
    ]


def seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def show(found: list[Rate]) -> None:
    """Prints a line for each type: libggml's rate, then each width's with its ratio."""
    names = list(dict.fromkeys(rate.quantizer for rate in found))
    table = Table("type", *names, title="MB/s of bf16 on one core (ratio to libggml)")
    for at in range(0, len(found), len(names)):
        line = found[at : at + len(names)]
        cells = [f"{rate.mb_s:.0f}" + (f" ({rate.ratio:.1f}x)" if rate.quantizer != "libggml" else "") for rate in line]
        table.add_row(line[0].type + (", imatrix" if line[0].imatrix else ""), *cells)
    Console().print(table)


def write_csv(path: Path, found: list[Rate]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"cpu": cpu_model(), "load_1min": round(os.getloadavg()[0], 1)} | asdict(rate) for rate in found]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@click.command(help=__doc__)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Turns of each quantizer.")
@click.option(
    "--csv",
    "csv_path",
    default=ROOT / "bench" / "results" / "quantizers.csv",
    type=click.Path(path_type=Path),
    show_default="bench/results/quantizers.csv",
    help="Where the numbers go.",
)
def main(rounds: int, csv_path: Path) -> None:
    widest = NativeKernels(native_path()).lanes
    natives = {f"{lanes} lanes": NativeKernels(native_path(), lanes) for lanes in (4, 8, 16) if lanes <= widest}
    makers = {"libggml": load_ggml(), **natives}
    imatrix = np.random.default_rng(36).lognormal(0, 1, SHAPE[1]).astype(np.float32)
    found = [rate for kind in KINDS for weights in (None, imatrix) for rate in rates(kind, weights, makers, rounds)]
    show(found)
    write_csv(csv_path, found)


if __name__ == "__main__":
    main()
