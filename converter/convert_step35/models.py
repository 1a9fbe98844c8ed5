"""What is known of each checkpoint and recipe: models.yaml, read strictly."""

from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_origin

import yaml

from convert_step35.errors import ConvertError

_TOP_LEVEL = {"checkpoints", "templates", "recipes", "machines"}
_SAMPLING = {"temperature", "top_p"}


class _Dataclass(Protocol):
    """Any class that is a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


_Entry = TypeVar("_Entry", bound=_Dataclass)


@dataclass(frozen=True, slots=True)
class KnownShape:
    """The dimensions that identify a published model."""

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
    """Read and check models.yaml; ConvertError names the first key that is unknown, missing, double or mistyped."""
    path = path or models_path()
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConvertError(f"{path} is not YAML: {' '.join(str(exc).split())}") from exc
    _check_keys(data, _TOP_LEVEL, str(path))
    groups = {key: _group(data, key, str(path)) for key in _TOP_LEVEL}
    return Models(
        checkpoints={
            name: _checkpoint(entry, f"{path}: checkpoints.{name}") for name, entry in groups["checkpoints"].items()
        },
        templates={
            digest: _typed(title, str, f"{path}: templates.{digest}") for digest, title in groups["templates"].items()
        },
        recipes={name: _recipe(name, entry, f"{path}: recipes.{name}") for name, entry in groups["recipes"].items()},
    )


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key written twice, where PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        double = next((key for key in keys if keys.count(key) > 1), None)
        if double is not None:
            raise yaml.YAMLError(f"expected each key once, got {double} twice at line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def _group(data: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    group = _typed(data[key], dict, f"{where}: {key}")
    return {_typed(name, str, f"{where}: {key}: a name"): entry for name, entry in group.items()}


def _checkpoint(entry: Any, where: str) -> KnownCheckpoint:
    _check_keys(entry, {field.name for field in fields(KnownCheckpoint)}, where)
    for name, preset in _typed(entry["sampling"], dict, f"{where}.sampling").items():
        _check_keys(preset, _SAMPLING, f"{where}.sampling.{name}")
        for key, value in preset.items():
            _typed(value, float, f"{where}.sampling.{name}.{key}")
    shape = _build(KnownShape, entry["shape"], f"{where}.shape")
    return _build(KnownCheckpoint, {**entry, "shape": shape}, where)


def _recipe(name: str, entry: Any, where: str) -> Recipe:
    return _build(Recipe, {"name": name, **_typed(entry, dict, where)}, where)


def _build(cls: type[_Entry], entry: Any, where: str) -> _Entry:
    _check_keys(entry, {field.name for field in fields(cls)}, where)
    return cls(**{field.name: _typed(entry[field.name], field.type, f"{where}.{field.name}") for field in fields(cls)})


def _typed(value: Any, kind: Any, where: str) -> Any:
    # To Python true and false are numbers; in this file they are a slip.
    if isinstance(value, bool) or not isinstance(value, dict if get_origin(kind) is dict else kind):
        raise ConvertError(f"{where} expected {getattr(kind, '__name__', kind)}, got {value!r}")
    return value


def _check_keys(entry: Any, wanted: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ConvertError(f"{where} expected the keys {sorted(wanted)}, got {entry!r}")
    got = set(entry)
    if got != wanted:
        unknown, missing = sorted(map(str, got - wanted)), sorted(wanted - got)
        raise ConvertError(f"{where}: unknown keys {unknown}, missing keys {missing}; expected {sorted(wanted)}")
