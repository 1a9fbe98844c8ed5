"""What the commands print for people: rich tables made of plans, reports and findings."""

import math
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from convert_step35.cli.workspace import Workspace
from convert_step35.inspection.inspection import Inspection
from convert_step35.inspection.verification import Verdict
from convert_step35.models import Recipe
from convert_step35.planning.plan import Plan
from convert_step35.planning.presets import Preset
from convert_step35.sizes import format_size
from convert_step35.writing.report import totals

_MAX_PROBLEMS = 12


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def checkpoint_line(workspace: Workspace) -> Text:
    """One line on what was found in the folder."""
    checkpoint = workspace.checkpoint
    title = (
        workspace.known.title if workspace.known is not None else "a checkpoint of a shape not listed in models.yaml"
    )
    vision = f", {checkpoint.n_skipped_vision} vision tensors skipped" if checkpoint.n_skipped_vision else ""
    return Text(
        f"{title}: {checkpoint.arch.n_trunk} layers and {checkpoint.arch.n_mtp if checkpoint.has_mtp else 0} MTP "
        "heads, "
        f"{checkpoint.n_text_tensors} tensors, {checkpoint.n_text_bytes:,} bytes of {checkpoint.dtype}{vision}"
    )


def plan_table(plan: Plan) -> Table:
    """Every tensor in file order."""
    table = _table("tensor", "shape", "type", "bytes", right=("bytes",))
    for tensor in plan.tensors:
        shape = " x ".join(str(n) for n in tensor.mapped.shape)
        table.add_row(tensor.mapped.name, shape, tensor.ggml_type.name, f"{tensor.n_bytes:,}")
    return table


def plan_totals(plan: Plan) -> RenderableType:
    """Bytes by type, the files, and the notes."""
    sums = totals(plan)
    by_type = _table("type", "bytes", "share", right=("bytes", "share"))
    for kind, n_bytes in sums["bytes_by_type"].items():
        by_type.add_row(kind, f"{n_bytes:,}", f"{n_bytes / sums['bytes']:.1%}")
    line = Text(
        f"{plan.recipe}: {sums['tensors']} tensors, {sums['weights']:,} weights, "
        f"{sums['bits_per_weight']:.2f} bits a weight, {format_size(sums['bytes'])}",
        style="bold",
    )
    files = [Text(f"  {file.path.name}  {file.n_bytes:,} bytes ({format_size(file.n_bytes)})") for file in plan.files]
    return Group(Text(), by_type, Text(), line, *files, *_notes(plan.notes))


def report_summary(plan: Plan, report: dict[str, Any]) -> RenderableType:
    """What a conversion made: files, and for each type its bytes and its worst tensor."""
    table = _table(
        *("type", "by", "tensors", "size", "NMSE", "worst tensor", "its NMSE"),
        right=("tensors", "size", "NMSE", "its NMSE"),
    )
    for kind, n_bytes in report["totals"]["bytes_by_type"].items():
        entries = [entry for entry in report["tensors"] if entry["type"] == kind]
        worst = max(entries, key=lambda entry: entry["nmse"])
        mean = math.fsum(entry["nmse"] * entry["n_bytes"] for entry in entries) / n_bytes
        table.add_row(
            kind,
            # The lanes are in the report; the longest names of the real model leave no room for them in 80 columns.
            report["quantizers"][kind].partition(",")[0],
            str(len(entries)),
            format_size(n_bytes),
            f"{mean:.2e}",
            worst["name"].removesuffix(".weight"),
            f"{worst['nmse']:.2e}",
        )
    sums = report["totals"]
    lines = [Text(f"wrote {file.path}  {format_size(file.n_bytes)}") for file in plan.files]
    return Group(
        *lines, Text(f"{plan.recipe}: {sums['tensors']} tensors, {sums['bits_per_weight']:.2f} bits a weight"), table
    )


def heads_summary(out: Path, report: dict[str, Any]) -> RenderableType:
    """What became of the heads, matrix by matrix, and of the file."""
    table = _table("tensor", "was", "is", "bytes", "NMSE", right=("bytes", "NMSE"))
    for entry in report["tensors"]:
        if "was_type" in entry:
            nmse = f"{entry['nmse']:.2e}"
            table.add_row(entry["name"], entry["was_type"], entry["type"], f"{entry['n_bytes']:,}", nmse)
    before, after = format_size(report["source_bytes"]), format_size(report["files"][0]["bytes"])
    return Group(Text(f"wrote {out}  {after}, was {before}; NMSE against the values before"), table)


def verdict(file: Path, found: Verdict) -> RenderableType:
    """One line of what was checked, then the problems."""
    against = f", {found.n_compared_chunks} chunks converted again and compared" if found.n_compared_chunks else ""
    digests = (
        f", {found.n_digests} digests compared with the report"
        if found.n_digests
        else ", no report beside it to compare with"
    )
    state = "sound" if not found.problems else "NOT sound"
    line = Text(f"{file}: {state}; {found.n_tensors} tensors read{digests}{against}")
    return Group(line, *_problems(found.problems), *_notes(found.notes))


def inspection(found: Inspection) -> RenderableType:
    """The file in a few lines, its types by group, its problems and notes."""
    table = _table("group", "type", "tensors", "size", right=("tensors", "size"))
    for use in found.types:
        table.add_row(use.group, use.type, str(use.n_tensors), format_size(use.n_bytes))
    heads = f"{found.n_mtp_complete} MTP heads" + (
        f" of {found.n_mtp_declared} declared" if found.n_mtp_complete != found.n_mtp_declared else ""
    )
    made_by = f", recipe {found.recipe}" if found.recipe else ""
    lines = [
        f"{found.name}: {found.n_trunk_layers} layers, {heads}, context {found.context_length}",
        f"{len(found.files)} file{'s' if len(found.files) > 1 else ''}, {format_size(found.n_bytes)}, "
        f"{found.n_tensors} tensors, {found.file_type}{made_by}",
        f"chat template: {found.template}",
    ]
    end = _problems(found.problems) or [Text("no problems found")]
    return Group(*(Text(line) for line in lines), table, *end, *_notes(found.notes))


def recipe_table(recipes: dict[str, Recipe], presets: dict[str, Preset]) -> RenderableType:
    """The recipes, best quality first, and the presets' names."""
    table = _table("recipe", "what it is", "rest", "MTP")
    for recipe in recipes.values():
        table.add_row(recipe.name, recipe.about, recipe.rest, recipe.mtp)
    return Group(
        table,
        Text(),
        Text("llama-quantize's presets: " + " ".join(presets)),
        Text("or any ggml type for all matrices, such as Q4_K"),
    )


def _problems(problems: tuple[str, ...]) -> list[Text]:
    shown = [Text(f"problem: {problem}", style="red") for problem in problems[:_MAX_PROBLEMS]]
    more = len(problems) - len(shown)
    return [*shown, Text(f"... and {more} more problems; --json has all", style="red")] if more else shown


def _notes(notes: tuple[str, ...]) -> list[Text]:
    return [Text(f"note: {note}") for note in notes]
