"""From `--type` to the ggml type of every tensor: presets, recipes, plain types, overrides, target size."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from gguf import GGMLQuantizationType as GgmlType
from gguf import LlamaFileType

from convert_step35.errors import OptionError, PlanError, quoted
from convert_step35.gguf.ggml_types import QUANTIZABLE, row_bytes
from convert_step35.models import Recipe
from convert_step35.planning.presets import PRESETS, ModelFacts, fit_to_row, preset_types, requires_imatrix
from convert_step35.source.architecture import Architecture
from convert_step35.source.mapping import Kind, MappedTensor

# The file type that llama.cpp's loader guesses from the most common tensor type (llama-model-loader.cpp).
_FTYPE_NAMES = {
    "F32": "ALL_F32",
    "Q3_K": "MOSTLY_Q3_K_M",
    "Q4_K": "MOSTLY_Q4_K_M",
    "Q5_K": "MOSTLY_Q5_K_M",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}

MTP_OPTION = "--mtp-type="


@dataclass(frozen=True, slots=True)
class Override:
    """`REGEX=TYPE`: the type of every matrix whose GGUF name the expression is found in; the first match wins."""

    pattern: re.Pattern[str]
    ggml_type: GgmlType

    @property
    def text(self) -> str:
        return f"{self.pattern.pattern}={self.ggml_type.name}"


@dataclass(frozen=True, slots=True)
class TypeChoice:
    """The types of one file's tensors by name, and the file type that goes into the metadata."""

    recipe: str
    ftype: LlamaFileType
    types: dict[str, GgmlType]


def parse_override(text: str) -> Override:
    """Parse `REGEX=TYPE`; OptionError says which half is wrong."""
    pattern, separator, name = text.rpartition("=")
    if not separator or not pattern:
        raise OptionError(f"bad --tensor-type: expected REGEX=TYPE, got {quoted(text)}")
    try:
        return Override(re.compile(pattern), parse_ggml_type(name))
    except (re.error, RecursionError, OverflowError) as exc:
        raise OptionError(f"bad --tensor-type: {quoted(pattern)} is no regular expression: {exc}") from exc


def parse_ggml_type(name: str) -> GgmlType:
    """A ggml type by its name in any case; OptionError lists those that can be made."""
    found = next((kind for kind in QUANTIZABLE if kind.name == name.upper()), None)
    if found is None:
        raise OptionError(
            f"unknown tensor type: expected one of {', '.join(kind.name for kind in QUANTIZABLE)}, got {quoted(name)}"
        )
    return found


def choose_types(
    name: str,
    tensors: Sequence[MappedTensor],
    arch: Architecture,
    recipes: dict[str, Recipe],
    *,
    overrides: Sequence[Override] = (),
    mtp_type: GgmlType | None = None,
    has_imatrix: bool = False,
) -> TypeChoice:
    """The type of every tensor under a preset, a recipe or a plain ggml type, in that order of names.

    `overrides` come first, then `mtp_type` for what only drafting uses.
    """
    wanted = name.upper()
    heads = dict.fromkeys(head_matrices(tensors), mtp_type) if mtp_type is not None else {}
    manual = _manual(overrides, heads)
    recipe = " ".join([wanted, *(o.text for o in overrides), *map(mtp_text, set(heads.values()))])
    if wanted in PRESETS:
        preset = PRESETS[wanted]
        matrices = preset_types(preset, tensors, _facts(arch, tensors, has_imatrix), manual)
        return _choice(recipe, preset.ftype, matrices, tensors)
    if wanted in recipes:
        rule = _recipe_rule(recipes[wanted])
    elif wanted in {kind.name for kind in QUANTIZABLE}:
        kind = parse_ggml_type(wanted)
        rule = _same_for_all(kind)
    else:
        raise _unknown_type(name, [*PRESETS, *recipes, *(k.name for k in QUANTIZABLE)])
    matrices = {
        t.name: fit_to_row(_first(manual(t.name), rule(t)), t.row_size) for t in tensors if t.kind is Kind.MATRIX
    }
    return _choice(recipe, _common_ftype(matrices, tensors), matrices, tensors)


def head_matrices(tensors: Sequence[MappedTensor]) -> frozenset[str]:
    """The matrices of one file that only drafting uses: those of the MTP layers.

    In a file of heads alone also output.weight: llama.cpp requires it, and no head multiplies with it.
    """
    heads = frozenset(t.name for t in tensors if t.is_mtp and t.kind is Kind.MATRIX)
    is_side_file = not any(t.layer is not None and not t.is_mtp for t in tensors)
    return heads | {"output.weight"} if heads and is_side_file else heads


def mtp_text(kind: GgmlType) -> str:
    """How a recipe's text names the heads' own type."""
    return f"{MTP_OPTION}{kind.name}"


def check_overrides(overrides: Sequence[Override], tensors: Sequence[MappedTensor]) -> None:
    """Every override matches a matrix of the conversion; a typing error in one would go unnoticed."""
    matrices = [t.name for t in tensors if t.kind is Kind.MATRIX]
    for override in overrides:
        if not any(override.pattern.search(name) for name in matrices):
            raise PlanError(
                f"--tensor-type {override.text} matches no matrix; names look like {matrices[1]} and {matrices[-1]}"
            )


def _first(forced: GgmlType | None, otherwise: GgmlType) -> GgmlType:
    """The forced type; F32 counts as false to Python."""
    return otherwise if forced is None else forced


def _unknown_type(name: str, known: list[str]) -> OptionError:
    near = list(dict.fromkeys(get_close_matches(name.upper(), known, n=3)))
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return OptionError(
        f"unknown type: --type expected a name that `convert-step35 recipes` lists, got {quoted(name)}{hint}"
    )


def best_fit(target_bytes: int, names: Sequence[str], size_of: Callable[[str], int]) -> str:
    """The first of `names`, best quality first, whose files have at most `target_bytes`."""
    sizes: dict[str, int] = {}
    for name in names:
        sizes[name] = size_of(name)
        if sizes[name] <= target_bytes:
            return name
    smallest = min(sizes, key=lambda name: sizes[name])
    raise PlanError(
        f"target too small: the smallest recipe, {smallest}, needs {sizes[smallest] / 2**30:.2f} GiB, "
        f"got {target_bytes / 2**30:.2f} GiB; "
        "--mtp drop saves the MTP layers, and --imatrix allows lower types"
    )


def imatrix_demands(choice: TypeChoice, tensors: Sequence[MappedTensor]) -> list[str]:
    """The tensors whose type is garbage without an importance matrix."""
    return [
        t.name
        for t in tensors
        if t.kind is Kind.MATRIX and requires_imatrix(t.name, choice.types[t.name], choice.ftype)
    ]


def _facts(arch: Architecture, tensors: Sequence[MappedTensor], has_imatrix: bool) -> ModelFacts:
    has_mtp = any(t.is_mtp for t in tensors)
    first = arch.layers[0]
    n_layers = len(arch.layers) if has_mtp else arch.n_trunk
    return ModelFacts(n_layers, first.n_heads // first.n_kv_heads, arch.n_experts, has_imatrix)


def _manual(overrides: Sequence[Override], by_name: dict[str, GgmlType]) -> Callable[[str], GgmlType | None]:
    def forced(name: str) -> GgmlType | None:
        return next((o.ggml_type for o in overrides if o.pattern.search(name)), by_name.get(name))

    return forced


def _same_for_all(kind: GgmlType) -> Callable[[MappedTensor], GgmlType]:
    return lambda tensor: kind


def _recipe_rule(recipe: Recipe) -> Callable[[MappedTensor], GgmlType]:
    gate_up, down, rest, mtp = (
        parse_ggml_type(t) for t in (recipe.experts_gate_up, recipe.experts_down, recipe.rest, recipe.mtp)
    )

    def rule(tensor: MappedTensor) -> GgmlType:
        if tensor.is_mtp:
            return mtp
        if "_exps." in tensor.name:
            return down if "ffn_down" in tensor.name else gate_up
        return rest

    return rule


def _choice(
    recipe: str, ftype: LlamaFileType, matrices: dict[str, GgmlType], tensors: Sequence[MappedTensor]
) -> TypeChoice:
    return TypeChoice(recipe, ftype, {t.name: matrices.get(t.name, GgmlType.F32) for t in tensors})


def _common_ftype(matrices: dict[str, GgmlType], tensors: Sequence[MappedTensor]) -> LlamaFileType:
    n_bytes: dict[GgmlType, int] = {}
    for tensor in tensors:
        if tensor.name in matrices:
            kind = matrices[tensor.name]
            n_bytes[kind] = n_bytes.get(kind, 0) + tensor_bytes(tensor, kind)
    common = max(n_bytes, key=lambda kind: n_bytes[kind]).name
    return LlamaFileType[_FTYPE_NAMES.get(common, f"MOSTLY_{common}")]


def tensor_bytes(tensor: MappedTensor, kind: GgmlType) -> int:
    """Bytes of a whole tensor in this type."""
    return math.prod(tensor.shape[:-1]) * row_bytes(kind, tensor.row_size)
