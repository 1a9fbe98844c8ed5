"""What is known of each checkpoint and recipe: models.yaml, read strictly."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from convert_step35.errors import ConvertError

_TOP_LEVEL = {"checkpoints", "templates", "recipes"}
_Entry = TypeVar("_Entry")


@dataclass(frozen=True, slots=True)
class KnownShape:
    """The dimensions that tell a published model from any other."""

    n_layers: int
    n_mtp_layers: int
    hidden_size: int
    vocab_size: int
    n_experts: int
    n_experts_used: int
    context_length: int


@dataclass(frozen=True, slots=True)
class KnownCheckpoint:
    """One published checkpoint. `n_bytes` counts tensor data only; None where it is not published."""

    title: str
    repository: str
    license: str
    dtype: str
    shape: KnownShape
    n_tensors: int
    n_bytes: int | None
    sampling: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One ggml type for each group of matrices; router, norms and biases are always F32."""

    name: str
    about: str
    experts_gate_up: str
    experts_down: str
    rest: str
    mtp: str


@dataclass(frozen=True, slots=True)
class Models:
    """The whole file. `recipes` keeps the file's order: best quality first."""

    checkpoints: dict[str, KnownCheckpoint]
    templates: dict[str, str]
    recipes: dict[str, Recipe]


def models_path() -> Path:
    """models.yaml at the root of a checkout, or beside the package in an installed wheel."""
    here = Path(__file__).resolve()
    candidates = (here.parents[2] / "models.yaml", here.parents[1] / "step35-models.yaml")
    for path in candidates:
        if path.is_file():
            return path
    raise ConvertError(f"models.yaml is missing: expected {candidates[0]} or {candidates[1]}; reinstall step35")


def load_models(path: Path | None = None) -> Models:
    """Read and check models.yaml; ConvertError names the first key that is unknown or missing."""
    path = path or models_path()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as exc:
        raise ConvertError(f"{path} is not YAML: {exc}") from exc
    _check_keys(data, _TOP_LEVEL, str(path))
    return Models(
        checkpoints={name: _checkpoint(entry, f"{path}: checkpoints.{name}") for name, entry in data["checkpoints"].items()},
        templates=dict(data["templates"]),
        recipes={name: _build(Recipe, {"name": name, **entry}, f"{path}: recipes.{name}") for name, entry in data["recipes"].items()},
    )


def _checkpoint(entry: dict[str, Any], where: str) -> KnownCheckpoint:
    _check_keys(entry, {field.name for field in fields(KnownCheckpoint)}, where)
    return KnownCheckpoint(**{**entry, "shape": _build(KnownShape, entry["shape"], f"{where}.shape")})


def _build(cls: type[_Entry], entry: dict[str, Any], where: str) -> _Entry:
    _check_keys(entry, {field.name for field in fields(cls)}, where)
    return cls(**entry)


def _check_keys(entry: Any, wanted: set[str], where: str) -> None:
    got = set(entry) if isinstance(entry, dict) else set()
    if got != wanted:
        unknown, missing = sorted(got - wanted), sorted(wanted - got)
        raise ConvertError(f"{where}: unknown keys {unknown}, missing keys {missing}; expected {sorted(wanted)}")
