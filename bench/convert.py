"""One pass beside two: this project's converter against upstream's convert and quantize.

The checkpoint is random, with one dense and one MoE layer of the real model's shapes: 9.9 GB of
bfloat16. Each contender starts with the checkpoint out of the page cache. Both use all cores.
The converter's time includes its fsync; upstream does none. With --libggml the converter runs once more
with libggml's quantizers, as where no compiler was at hand. Two limits are measured too: the cold checkpoint read by
the converter's readers and nothing else, and the quantizer of the preset's main type in all threads on as many weights.
"""

import csv
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
from gguf import GGUFReader
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT / "tests"),
    str(ROOT / "tests" / "support"),
]  # the tests' checkpoint generator and upstream driver

import upstream
from checkpoints import REAL, Shape, random_tensors, tensor_shapes, write_checkpoint
from convert_step35.planning.presets import PRESETS
from convert_step35.quantization.quantizers import SWITCH
from measure import Usage, measure

QUANTIZE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import upstream
upstream.quantize(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], n_threads=int(sys.argv[5]))
"""

READ = """
import sys
from pathlib import Path
from threading import Thread
from convert_step35.planning.chunks import Chunk
from convert_step35.reading.read_ahead import N_READERS, SPAN_BYTES, ChunkRead, Place, ReadAhead
files = [(path, path.stat().st_size) for path in sorted(Path(sys.argv[1]).glob("*.safetensors"))]
places = [Place(path, at, min(SPAN_BYTES, size - at)) for path, size in files for at in range(0, size, SPAN_BYTES)]
chunk = Chunk(0, 0, 1, 0)
ahead = ReadAhead((ChunkRead(0, chunk, place) for place in places), 0, 1)
for _ in range(N_READERS):
    Thread(target=ahead.read).start()
while (loaded := ahead.take()) is not None:
    ahead.give_back(loaded)
"""

ONLY_QUANTIZE = """
import sys
from threading import Thread
import numpy as np
from gguf import GGMLQuantizationType
from convert_step35.quantization.quantizers import load_quantizers
kind, n_weights, n_threads = GGMLQuantizationType[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
quantizers = load_quantizers()
quantizers.prepare({kind})
def run():
    rows = np.random.default_rng(35).normal(0, 0.02, (64, 4096)).astype(np.float32)
    out = np.empty(rows.nbytes, np.uint8)
    for _ in range(n_weights // rows.size // n_threads):
        quantizers.quantize(kind, rows, out, None)
for _ in range(n_threads):
    Thread(target=run).start()
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One measured command: `upstream` has two steps, `step35` and `step35-libggml` one, `limit` the two limits."""

    round: int
    contender: str
    step: str
    usage: Usage
    output_bytes: int
    tensors_sha256: str


def bench_shape(n_experts: int) -> Shape:
    """Returns a dense full-attention layer and a sliding MoE layer of the real shapes."""
    return replace(
        REAL,
        num_hidden_layers=2,
        num_nextn_predict_layers=0,
        first_moe_layer=1,
        moe_num_experts=n_experts,
        moe_top_k=min(8, n_experts),
        vocab_size=8192,
    )


def make_checkpoint(folder: Path, n_experts: int) -> Path:
    """Writes the checkpoint, unless it is there from an earlier run."""
    checkpoint = folder / f"step35-{n_experts}-experts"
    if not checkpoint.is_dir():
        partial = checkpoint.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(partial, bench_shape(n_experts)).rename(checkpoint)
    return checkpoint


def evict(folder: Path) -> None:
    """Writes dirty pages out and drops a folder's files from the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tensors_sha256(path: Path) -> str:
    """Digests every tensor's name, type and data, by name: the order in the file does not matter."""
    digest = hashlib.sha256()
    for tensor in sorted(GGUFReader(path).tensors, key=lambda t: t.name):
        digest.update(f"{tensor.name} {tensor.tensor_type.name} {tensor.shape}\n".encode())
        digest.update(tensor.data.data.cast("B"))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Bench:
    """The checkpoint, the folder for outputs and the type to make."""

    checkpoint: Path
    work: Path
    preset: str
    with_libggml: bool

    def step35(self, number: int) -> Iterator[Step]:
        yield self._one_pass(number, "step35", "native")

    def step35_libggml(self, number: int) -> Iterator[Step]:
        yield self._one_pass(number, "step35-libggml", "libggml")

    def _one_pass(self, number: int, contender: str, quantizers: str) -> Step:
        out = self.work / f"{contender}.gguf"
        command = ["-m", "convert_step35", "run", str(self.checkpoint), str(out), "--type", self.preset, "--restart"]
        # The switch is inherited by the measured process.
        os.environ[SWITCH] = quantizers
        return self._step(number, contender, "run", command, out)

    def upstream(self, number: int) -> Iterator[Step]:
        middle, out = self.work / "upstream-bf16.gguf", self.work / "upstream.gguf"
        tests, n_threads = str(ROOT / "tests" / "support"), str(len(os.sched_getaffinity(0)))
        convert = [f"{tests}/upstream_convert.py", str(upstream.sources()), str(self.checkpoint)]
        convert += ["--outtype", "bf16", "--outfile", str(middle)]
        yield self._step(number, "upstream", "convert", convert, middle)
        quantize = ["-c", QUANTIZE, tests, str(middle), str(out), self.preset, n_threads]
        yield self._step(number, "upstream", "quantize", quantize, out)

    def limits(self, number: int) -> Iterator[Step]:
        yield Step(number, "limit", "read", self._measured("limit-read", ["-c", READ, str(self.checkpoint)]), 0, "")
        os.environ[SWITCH] = "native"
        n_weights = sum(path.stat().st_size for path in self.checkpoint.glob("*.safetensors")) // 2
        numbers = [str(n_weights), str(len(os.sched_getaffinity(0)))]
        command = ["-c", ONLY_QUANTIZE, PRESETS[self.preset].default.name, *numbers]
        yield Step(number, "limit", "quantize", self._measured("limit-quantize", command), 0, "")

    def _measured(self, name: str, arguments: list[str]) -> Usage:
        return measure([sys.executable, *arguments], self.work / f"{name}.log")

    def _step(self, number: int, contender: str, name: str, arguments: list[str], out: Path) -> Step:
        usage = self._measured(f"{contender}-{name}", arguments)
        digest = "" if name == "convert" else tensors_sha256(out)
        return Step(number, contender, name, usage, out.stat().st_size, digest)

    def run_round(self, number: int) -> Iterator[Step]:
        """Runs all contenders, in the other order in every second round."""
        contenders: list[Callable[[int], Iterator[Step]]] = [self.step35, self.upstream, self.limits]
        if self.with_libggml:
            contenders.append(self.step35_libggml)
        for contender in contenders[:: 1 if number % 2 else -1]:
            evict(self.checkpoint)
            yield from contender(number)
            for path in self.work.glob("*.gguf*"):
                path.unlink()


def best(steps: list[Step], contender: str) -> Usage:
    """Returns a contender's best round: times and bytes of its steps added, memory at its largest."""
    rounds = {s.round for s in steps}
    sums = [_sum([s.usage for s in steps if (s.round, s.contender) == (r, contender)]) for r in rounds]
    return min(sums, key=lambda usage: usage.wall_s)


def _sum(usages: list[Usage]) -> Usage:
    return Usage(
        wall_s=sum(u.wall_s for u in usages),
        user_s=sum(u.user_s for u in usages),
        system_s=sum(u.system_s for u in usages),
        peak_anonymous_bytes=max(u.peak_anonymous_bytes for u in usages),
        peak_rss_bytes=max(u.peak_rss_bytes for u in usages),
        written_bytes=sum(u.written_bytes for u in usages),
    )


def show(steps: list[Step], source_bytes: int) -> None:
    """Prints every step, then each contender's best round, and what upstream's takes more."""
    table = Table("round, step", "wall s", "CPU s", "GB/s in", "own GB", "RSS GB", "out GB")
    for step in steps:
        table.add_row(f"{step.round} {step.contender} {step.step}", *_cells(step.usage, source_bytes))
    contenders = [name for name in dict.fromkeys(step.contender for step in steps) if name != "limit"]
    bests = {contender: best(steps, contender) for contender in contenders}
    for contender, usage in bests.items():
        table.add_row(f"best {contender}", *_cells(usage, source_bytes))
    for contender in contenders:
        if contender != "upstream":
            table.add_row(f"upstream / {contender}", *_ratios(bests["upstream"], bests[contender]))
    Console().print(table)
    digests = {step.tensors_sha256 for step in steps if step.tensors_sha256}
    click.echo(f"tensor data: {'identical' if len(digests) == 1 else 'DIFFERENT'}, sha256 {', '.join(sorted(digests))}")


def _cells(usage: Usage, source_bytes: int) -> list[str]:
    sizes = (usage.peak_anonymous_bytes, usage.peak_rss_bytes, usage.written_bytes)
    cpu_s = usage.user_s + usage.system_s
    return [
        f"{usage.wall_s:.1f}",
        f"{cpu_s:.1f}",
        f"{source_bytes / usage.wall_s / 1e9:.2f}",
        *(f"{n / 1e9:.2f}" for n in sizes),
    ]


def _ratios(theirs: Usage, ours: Usage) -> list[str]:
    cpu = (theirs.user_s + theirs.system_s) / (ours.user_s + ours.system_s)
    sizes = [getattr(theirs, k) / getattr(ours, k) for k in ("peak_anonymous_bytes", "peak_rss_bytes", "written_bytes")]
    return [f"{theirs.wall_s / ours.wall_s:.1f}x", f"{cpu:.1f}x", "", *(f"{r:.1f}x" for r in sizes)]


def write_csv(path: Path, steps: list[Step], facts: dict[str, object]) -> None:
    """Writes one line for each step, with the facts of the run in front."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [facts | _flat(step) for step in steps]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _flat(step: Step) -> dict[str, object]:
    row = asdict(step)
    usage = row.pop("usage")
    return row | {k: round(v, 2) if k.endswith("_s") else v for k, v in usage.items()}


def cpu_model() -> str:
    """Returns the processor's name as the kernel gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))


def require_space(folder: Path, source_bytes: int) -> None:
    """Refuses before the work what would fill the disk: the checkpoint, its BF16 copy, the outputs."""
    need, free = int(2.7 * source_bytes), shutil.disk_usage(folder).free
    if free < need:
        raise click.ClickException(
            f"{folder}: expected {need / 1e9:.0f} GB free, got {free / 1e9:.0f} GB; give --work DIR"
        )


@click.command(help=__doc__)
@click.option("--type", "preset", default="Q4_K_S", show_default=True, help="Preset of llama-quantize.")
@click.option("--libggml", "with_libggml", is_flag=True, help="Run the converter with libggml's quantizers too.")
@click.option("--rounds", default=1, show_default=True, type=click.IntRange(1), help="Rounds, each in the other order.")
@click.option("--experts", default=REAL.moe_num_experts, show_default=True, help="Fewer make a smaller checkpoint.")
@click.option(
    "--work",
    default=ROOT / "build" / "bench",
    type=click.Path(path_type=Path),
    show_default="build/bench",
    help="Folder for 27 GB; the checkpoint stays there.",
)
@click.option(
    "--csv",
    "csv_path",
    default=ROOT / "bench" / "results" / "convert.csv",
    type=click.Path(path_type=Path),
    show_default="bench/results/convert.csv",
    help="Where the numbers go.",
)
def main(preset: str, with_libggml: bool, rounds: int, experts: int, work: Path, csv_path: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    source_bytes = sum(t.n_bytes for t in random_tensors(tensor_shapes(bench_shape(experts))).values())
    require_space(work, source_bytes)
    bench = Bench(make_checkpoint(work, experts), work, preset, with_libggml)
    steps = [step for number in range(1, rounds + 1) for step in bench.run_round(number)]
    show(steps, source_bytes)
    write_csv(
        csv_path,
        steps,
        {"cpu": cpu_model(), "n_cpus": len(os.sched_getaffinity(0)), "llama_cpp": upstream.VERSION}
        | {"type": preset, "n_experts": experts, "source_bytes": source_bytes},
    )


if __name__ == "__main__":
    main()
