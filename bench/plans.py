"""Writes the tables of docs/plans.md: what step35 plan says for every known machine, and how far its estimates are from
published measurements. Needs no machine but this one: all of it is arithmetic on headers.

    python bench/plans.py            writes them after their mark in docs/plans.md
    python bench/plans.py --stdout   prints it
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]  # the tests' generator of sparse GGUFs

import planned_gguf
from checkpoints import REAL
from step35.planning.context_memory import Run
from step35.planning.machine import Machine, known_machines
from step35.planning.memory_usage import HOST, Layout, gpu_name
from step35.planning.model_header import Header, read_header
from step35.planning.placement import SHORT, Constraints, PlanReport, place
from step35.planning.speed import Deployment, cycle_seconds, expected_tokens, prefill, speed, step_seconds, touched

RECIPES = ("MOE_IQ3_S_IQ4_XS", "MOE_IQ4_XS", "MOE_IQ4_XS_Q4_K", "MOE_Q4_K_Q5_K")
CONTEXTS = (32768, 131072, 262144)
GIB = 2**30

# StepFun's docs/step3.5-flash.md: Q4_K_S, llama-batched-bench -b 2048 -ub 1024 -ntg 128 -npl 1, no MTP.
# Tokens in the context: prefill and decode in tokens a second.
PUBLISHED = {
    ("dgx-spark", "q8_0"): {
        2048: (392, 20.27),
        8192: (534, 20.25),
        16384: (528, 19.24),
        32768: (478, 17.75),
        65536: (391, 15.42),
        262144: (217, 8.39),
    },
    ("mac-studio-128", "f16"): {
        2048: (406, 45.96),
        8192: (392, 43.90),
        16384: (373, 41.27),
        32768: (336, 38.22),
        65536: (274, 31.52),
        262144: (119.5, 8.88),
    },
}

# llama.cpp's pull request 20981, which doesn't name its machine; plain decoding runs like an M4 Max's. Q4_K_S with the
# heads' KV at q4_0. (Recipe, tokens in the context): by depth, the share of drafts accepted and the speed over plain.
POSTED_DRAFTING = {
    ("IQ4_XS", 32768): {1: (0.889, 1.29), 2: (0.758, 1.21), 3: (0.687, 1.13)},
    ("Q4_K_S", 32768): {1: (0.877, 1.12), 2: (0.772, 1.05), 3: (0.686, 0.94)},
    ("Q4_K_S", 65536): {1: (0.880, 1.15), 2: (0.771, 1.07), 3: (0.686, 0.92)},
}
# Posted for a DGX Spark without acceptance: 26.7 tok/s plain, 30.5 at depth 2 with p_min 0.6, 23.5 at depth 3.
POSTED_SPARK = {2: 30.5 / 26.7, 3: 23.5 / 26.7}
SHARED = 0.38
"""A posted share of a token's experts that the tokens before it in the same step use too, beyond chance."""

MARK = "<!-- From here on written by python bench/plans.py -->"


def headers() -> dict[str, Header]:
    """Returns the real model's header in every recipe of the tables, and in Q4_K_S."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: read_header(planned_gguf.write(Path(folder) / f"{name}.gguf", REAL, name))
            for name in (*RECIPES, "Q4_K_S", "IQ4_XS")
        }


def document(found: dict[str, Header]) -> str:
    """Returns the tables."""
    sections = [machine_section(machine, found) for machine in known_machines().values()]
    return "\n".join([*published_section(found["Q4_K_S"]), *drafting_section(found), *sections])


def machine_section(machine: Machine, found: dict[str, Header]) -> str:
    """Returns one machine's table."""
    rows = [
        "| recipe | context | | policy | batch, KV | GPU GiB | RAM GiB | prefill | decode at 2k | decode, full | drafting at 2k |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|---|---|---|")
    rows += [
        _row(found[recipe], n_ctx, place(found[recipe], machine, Constraints(n_ctx=n_ctx)))
        for recipe in RECIPES
        for n_ctx in CONTEXTS
    ]
    return "\n".join([f"## {machine.name}", "", f"{machine.about}.", "", *rows, ""])


def _row(header: Header, n_ctx: int, report: PlanReport) -> str:
    placement = report.placement
    used = {device: sum(sizes.values()) / GIB for device, sizes in report.usage.items()}
    gpus = " + ".join(f"{n:.1f}" for device, n in used.items() if device != HOST) or "-"
    first, last = report.speeds[0], report.speeds[-1]
    drafting = f"{first.drafted:.1f} (depth {first.depth})" if first.depth else "-"
    cells = (
        f"{header.recipe} ({header.n_bytes / GIB:.1f} GiB)",
        f"{n_ctx // 1024}k",
        "fits" if report.fits else "**no**",
        placement.policy,
        f"{placement.run.n_batch}, {placement.run.kv_type}",
        gpus,
        f"{used.get(HOST, 0):.1f}",
        f"{last.prefill:.0f}",
        f"{first.decode:.1f}",
        f"{last.decode:.1f}",
        drafting,
    )
    return f"| {' | '.join(cells)} |"


def published_section(header: Header) -> Iterator[str]:
    """Yields the estimates beside the published measurements."""
    yield "## Estimates beside published measurements"
    yield ""
    yield "Measured: StepFun, docs/step3.5-flash.md; Q4_K_S without MTP, batch 1024. The machine's shares of its bandwidth"
    yield "(models.yaml) are fitted on these decode numbers, one number for weights and one for KV cells."
    yield ""
    yield "| machine, KV | context | prefill measured | estimate | error | decode measured | estimate | error |"
    yield "|---|---|---|---|---|---|---|---|"
    errors = []
    for (name, kv_type), points in PUBLISHED.items():
        box = unified_box(header, known_machines()[name], kv_type)
        for n_past, (pp, tg) in points.items():
            decode = 1 / step_seconds(box, n_past, 1)
            errors.append(abs(decode / tg - 1))
            read = prefill(box, n_past)
            shown = f"{pp:g} | {read:.0f} | {read / pp - 1:+.0%} | {tg:.2f} | {decode:.2f} | {decode / tg - 1:+.0%}"
            yield f"| {name}, {kv_type} | {n_past} | {shown} |"
    yield ""
    yield f"Largest error of plain decode: {max(errors):.0%}. The Spark's first prefill point is slower than its second, which no"
    yield "bandwidth explains; at 262144 tokens the Mac has 12 GiB of KV beside a file of 104 GiB, close to its limit of 120."
    yield ""


def drafting_section(found: dict[str, Header]) -> Iterator[str]:
    """Yields what drafting gains by the estimate, beside what others posted."""
    machines = known_machines()
    yield "## Drafting beside posted measurements"
    yield ""
    yield "Speed over plain decoding on the same box and build. With independent routing, which plans assume without a trace, and"
    yield f"where {SHARED:.0%} of the experts that a further token would add are used already."
    yield ""
    yield "| machine, file, context | depth | accepted | posted | estimate | error | estimate, shared experts |"
    yield "|---|---|---|---|---|---|---|"
    for (recipe, n_past), points in POSTED_DRAFTING.items():
        box = unified_box(found[recipe], machines["mac-studio-128"], "f16")
        for depth, (accepted, gain) in points.items():
            gains = _gains(box, n_past, depth, 1 + depth * accepted)
            yield _drafting_row(f"like an M4 Max, {recipe}, {n_past}", depth, f"{accepted:.3f}", gain, gains)
    box = unified_box(found["IQ4_XS"], machines["dgx-spark"], "q8_0")
    for depth, gain in POSTED_SPARK.items():
        gains = _gains(box, SHORT, depth, expected_tokens(depth))
        yield _drafting_row(f"DGX Spark, IQ4_XS, {SHORT}", depth, "not posted", gain, gains)
    yield ""
    estimate = speed(replace(box, run=replace(box.run, n_heads=3)), SHORT)
    gain = estimate.drafted / estimate.decode
    yield "These are measurements of llama.cpp, which by its source runs 6 head decodes a cycle at depth 3 where step35 runs 3;"
    yield "the estimate counts step35's. DGX Spark with MTP: posted 30 to 37 tok/s where plain decoding made 26.7, so 1.1 to 1.4"
    yield f"of plain. The estimate is {estimate.drafted:.1f} at depth {estimate.depth}, {gain:.2f} of plain: its plain speed is fitted on StepFun's older table."
    yield ""


def _gains(box: Deployment, n_past: int, depth: int, n_tokens: float) -> tuple[float, float]:
    shape = box.header.shape
    shared = tuple(
        shape.n_expert_used + (1 - SHARED) * (touched(shape, n) - shape.n_expert_used) for n in range(1, depth + 2)
    )
    independent, overlapping = (
        n_tokens * step_seconds(routed, n_past, 1) / cycle_seconds(routed, n_past, depth)
        for routed in (box, replace(box, distinct=shared))
    )
    return independent, overlapping


def _drafting_row(what: str, depth: int, accepted: str, gain: float, gains: tuple[float, float]) -> str:
    error = f"{gains[0] / gain - 1:+.0%}"
    return f"| {what} | {depth} | {accepted} | {gain:.2f} | {gains[0]:.2f} | {error} | {gains[1]:.2f} |"


def unified_box(header: Header, machine: Machine, kv_type: str) -> Deployment:
    """Returns everything on the one GPU, as it was measured."""
    device = gpu_name(0)
    experts = tuple((device,) * 3 if layer.is_moe else () for layer in header.shape.layers)
    layout = Layout((device,) * len(header.shape.layers), experts, device)
    return Deployment(header, machine, Run(262144, 1024, 1, 0, kv_type), layout)


@click.command()
@click.option("--stdout", is_flag=True, help="Print the document instead of writing it.")
def main(stdout: bool) -> None:
    """Writes the tables of docs/plans.md; the text before them stays."""
    text = document(headers())
    if stdout:
        click.echo(text, nl=False)
        return
    path = ROOT / "docs" / "plans.md"
    before, mark, _ = path.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        raise click.ClickException(f"no place for the tables: {path} expected the line {MARK}")
    path.write_text(f"{before}{MARK}\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
