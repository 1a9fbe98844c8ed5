"""The report beside a finished file: what every tensor became, and totals."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convert_step35.gguf.reader import GgufTensor
from convert_step35.planning.plan import Plan, PlannedTensor
from convert_step35.quantization.measure import TensorErrors
from convert_step35.writing.conversion import TensorResult
from convert_step35.writing.requantizing import HeadsPlan, Requantized
from convert_step35.writing.rewriting import Written
from convert_step35.writing.trimming import TrimPlan

REPORT_SUFFIX = ".report.json"


def report_path(out: Path) -> Path:
    return out.with_name(out.name + REPORT_SUFFIX)


def build_report(plan: Plan, results: Sequence[TensorResult], fingerprint: dict[str, str]) -> dict[str, Any]:
    """The report as JSON data; the same input and command give the same report."""
    return {
        "recipe": plan.recipe,
        "fingerprint": fingerprint,
        "notes": list(plan.notes),
        "files": [{"name": file.path.name, "bytes": file.n_bytes, "tensors": len(file.tensors)} for file in plan.files],
        "totals": totals(plan),
        "quantizers": {result.tensor.ggml_type.name: result.quantizer for result in results},
        "tensors": [{**entry, **_measured(result)} for entry, result in zip(plan_entries(plan), results, strict=True)],
    }


def heads_report(out: Path, plan: HeadsPlan, done: Requantized) -> dict[str, Any]:
    """The report of a file whose heads got another type; errors are against the values they had before."""
    was = {change.stored.name: change.stored for change in plan.changes}
    tensors = [_written(out, tensor, was.get(tensor.name), done.errors.get(tensor.name)) for tensor in done.written]
    return {
        "source": plan.model.path.name,
        "notes": list(plan.notes),
        "files": [{"name": out.name, "bytes": out.stat().st_size, "tensors": len(tensors)}],
        "source_bytes": plan.model.n_bytes,
        "tensors": tensors,
    }


def trim_report(out: Path, plan: TrimPlan, written: Sequence[Written]) -> dict[str, Any]:
    """The report of a side file of trimmed heads."""
    return {
        "source": plan.model.path.name,
        "n_vocab": plan.n_vocab,
        "n_kept": len(plan.kept),
        "share_of_counted": round(plan.share, 6),
        "files": [{"name": out.name, "bytes": out.stat().st_size, "tensors": len(written)}],
        "tensors": [_written(out, tensor, None, None) for tensor in written],
    }


def _written(out: Path, tensor: Written, was: GgufTensor | None, errors: TensorErrors | None) -> dict[str, Any]:
    entry = {
        "file": out.name,
        "name": tensor.name,
        "type": tensor.ggml_type.name,
        "shape": list(tensor.shape),
        "offset": tensor.offset,
        "n_bytes": tensor.n_bytes,
        "sha256": tensor.sha256,
    }
    if was is None or errors is None:
        return entry
    return {**entry, "was_type": was.ggml_type.name, "was_n_bytes": was.n_bytes, **_numbers(errors)}


def totals(plan: Plan) -> dict[str, Any]:
    """Weights, bytes, bits a weight, and bytes by type."""
    by_type: dict[str, int] = {}
    for tensor in plan.tensors:
        by_type[tensor.ggml_type.name] = by_type.get(tensor.ggml_type.name, 0) + tensor.n_bytes
    n_data = sum(by_type.values())
    return {
        "tensors": len(plan.tensors),
        "weights": plan.n_weights,
        "bytes": plan.n_bytes,
        "bits_per_weight": round(n_data * 8 / plan.n_weights, 4),
        "bytes_by_type": dict(sorted(by_type.items(), key=lambda item: -item[1])),
    }


def plan_entries(plan: Plan) -> list[dict[str, Any]]:
    """Every tensor of a plan as JSON data."""
    return [{"file": file.path.name, **tensor_entry(tensor)} for file in plan.files for tensor in file.tensors]


def tensor_entry(tensor: PlannedTensor) -> dict[str, Any]:
    return {
        "name": tensor.mapped.name,
        "source": tensor.mapped.source,
        "type": tensor.ggml_type.name,
        "shape": list(tensor.mapped.shape),
        "offset": tensor.offset,
        "n_bytes": tensor.n_bytes,
    }


def to_json(data: Any) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _measured(result: TensorResult) -> dict[str, Any]:
    return {"sha256": result.sha256, **_numbers(result.errors)}


def _numbers(errors: TensorErrors) -> dict[str, Any]:
    return {key: _rounded(value) for key, value in asdict(errors).items() if value is not None}


def _rounded(value: float | int) -> float | int:
    return float(f"{value:.6g}") if isinstance(value, float) else value
