"""The progress bar of a conversion: bytes, rate, and a time left weighted by what each type costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from gguf import GGMLQuantizationType as T
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from convert_step35.gguf.ggml_types import row_bytes
from convert_step35.planning.chunks import Chunk
from convert_step35.planning.plan import Plan, PlannedTensor

# Relative cost of a weight: ns on one core with libggml's scalar quantizers. Types not listed cost like Q5_K.
_NS = {
    T.F32: 0.5, T.BF16: 0.5, T.F16: 0.5, T.Q8_0: 2.4, T.Q4_0: 1.1, T.MXFP4: 3.7, T.NVFP4: 20, T.Q3_K: 9, T.Q6_K: 24,
    T.Q5_K: 40, T.Q4_K: 45, T.Q2_K: 43, T.IQ4_NL: 160, T.IQ4_XS: 156, T.IQ3_S: 253, T.IQ3_XXS: 357, T.IQ2_S: 154,
    T.IQ2_XS: 465, T.IQ2_XXS: 247,
}  # fmt: skip


class _Bytes(ProgressColumn):
    """Bytes written and their rate."""

    def render(self, task: Task) -> Text:
        done, total = task.fields["done_bytes"], task.fields["total_bytes"]
        rate = done / task.elapsed if task.elapsed else 0.0
        return Text(f"{done / 2**30:.2f}/{total / 2**30:.2f} GiB  {rate / 2**20:.0f} MiB/s")


def cost(kind: T, n_weights: int) -> float:
    """The relative cost of quantizing this many weights."""
    return _NS.get(kind, _NS[T.Q5_K]) * n_weights


@contextmanager
def bytes_bar(what: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar over bytes on stderr where that is a terminal; yields what to call with the bytes done since."""
    with _bar(what, total=n_bytes, total_bytes=n_bytes) as (bar, task):
        lock = Lock()

        def advance(n: int) -> None:
            if bar.disable:
                return
            with lock:
                bar.update(task, advance=n, done_bytes=bar.tasks[0].fields["done_bytes"] + n)

        yield advance


@contextmanager
def _bar(what: str, *, total: float, total_bytes: int) -> Iterator[tuple[Progress, TaskID]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), _Bytes(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield bar, bar.add_task(what, total=total, done_bytes=0, total_bytes=total_bytes)


@contextmanager
def progress_bar(plan: Plan) -> Iterator[Callable[[PlannedTensor, Chunk], None]]:
    """Show a bar on stderr where that is a terminal; yields what to call for each finished chunk."""
    total = sum(
        cost(t.ggml_type, t.mapped.row_size * t.n_bytes // row_bytes(t.ggml_type, t.mapped.row_size))
        for t in plan.tensors
    )
    with _bar("converting", total=total, total_bytes=plan.n_bytes) as (bar, task):
        lock = Lock()

        def advance(tensor: PlannedTensor, chunk: Chunk) -> None:
            # Without a terminal nothing is shown, and the threads skip the lock.
            if bar.disable:
                return
            n_bytes = chunk.n_rows * row_bytes(tensor.ggml_type, tensor.mapped.row_size)
            # Several threads report at once, and none may overwrite what another added.
            with lock:
                done = bar.tasks[0].fields["done_bytes"] + n_bytes
                bar.update(task, advance=cost(tensor.ggml_type, chunk.n_rows * tensor.mapped.row_size), done_bytes=done)

        yield advance
