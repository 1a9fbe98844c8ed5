"""models.yaml is read strictly, and everything it names exists."""

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from checkpoints import REAL, config, tensor_shapes
from convert_step35.errors import ConvertError
from convert_step35.models import Models, load_models, models_path
from convert_step35.planning.presets import PRESETS
from convert_step35.planning.recipes import choose_types, parse_ggml_type
from convert_step35.source.architecture import read_architecture
from convert_step35.source.mapping import map_tensors


@pytest.fixture(scope="module")
def models() -> Models:
    return load_models()


def test_it_is_found_at_the_root_of_the_checkout() -> None:
    assert models_path() == Path(__file__).parents[2] / "models.yaml"


def test_every_type_of_a_recipe_exists(models: Models) -> None:
    for recipe in models.recipes.values():
        for name in (recipe.experts_gate_up, recipe.experts_down, recipe.rest, recipe.mtp):
            assert parse_ggml_type(name).name == name, recipe.name


def test_recipes_are_ordered_by_size_and_none_hides_a_preset(models: Models) -> None:
    """--target-size takes the first that fits, so each must be smaller than the one before."""
    arch = read_architecture(config(REAL, eos=[1]))
    tensors = map_tensors(arch, trunk=True, mtp=True)
    sizes = []
    for name in models.recipes:
        types = choose_types(name, tensors, arch, models.recipes).types
        sizes.append(sum(math.prod(t.shape) * bits(types[t.name]) for t in tensors))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert not models.recipes.keys() & PRESETS.keys() and all(name == name.upper() for name in models.recipes)


def bits(kind: GGMLQuantizationType) -> float:
    n_weights, n_bytes = GGML_QUANT_SIZES[kind]
    return 8 * n_bytes / n_weights


def test_a_recipe_that_needs_an_imatrix_says_so(models: Models) -> None:
    for recipe in models.recipes.values():
        needs = any(
            kind.startswith(("IQ2", "IQ1", "IQ3_XXS")) for kind in (recipe.experts_gate_up, recipe.experts_down)
        )
        assert needs == recipe.about.endswith("needs an imatrix"), recipe.name


def test_the_published_numbers_are_those_of_the_shapes(models: Models) -> None:
    flash = models.checkpoints["step-3.5-flash"]
    shapes = tensor_shapes(REAL)
    n_bytes = sum(math.prod(s) * (4 if name.endswith("router_bias") else 2) for name, s in shapes.items())
    assert (flash.n_tensors, flash.n_bytes) == (len(shapes), n_bytes)
    arch = read_architecture(config(REAL, eos=[1]))
    assert asdict(flash.shape) == {
        "n_layers": arch.n_trunk,
        "n_mtp_layers": arch.n_mtp,
        "hidden_size": arch.hidden_size,
        "vocab_size": arch.vocab_size,
        "n_experts": arch.n_experts,
        "n_experts_used": arch.n_experts_used,
        "context_length": arch.context_length,
    }
    assert models.checkpoints["step-3.5-flash-fp8"].n_tensors == flash.n_tensors + 42 * 3


def test_templates_are_known_by_sha256(models: Models) -> None:
    assert models.templates and all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in models.templates)


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    data = yaml.safe_load(models_path().read_text(encoding="utf-8"))
    change(data)
    return yaml.safe_dump(data)


REFUSED = {
    "unknown top-level key": (
        lambda d: d.update(machine={}),
        r"unknown keys \['machine'\], missing keys \[\]; expected",
    ),
    "missing top-level key": (lambda d: d.pop("recipes"), r"unknown keys \[\], missing keys \['recipes'\]"),
    "group that is a list": (lambda d: d.update(recipes=[]), r"recipes expected dict, got \[\]"),
    "unknown recipe key": (
        lambda d: d["recipes"]["MOE_Q8_0"].update(mpt="Q8_0"),
        r"recipes\.MOE_Q8_0: unknown keys \['mpt'\]",
    ),
    "missing recipe key": (
        lambda d: d["recipes"]["MOE_Q8_0"].pop("mtp"),
        r"recipes\.MOE_Q8_0: unknown keys \[\], missing keys \['mtp'\]",
    ),
    "empty recipe": (lambda d: d["recipes"].update(MOE_Q8_0=None), r"recipes\.MOE_Q8_0 expected dict, got None"),
    "recipe type that is a number": (
        lambda d: d["recipes"]["MOE_Q8_0"].update(rest=8),
        r"recipes\.MOE_Q8_0\.rest expected str, got 8",
    ),
    "recipe name that is a number": (lambda d: d["recipes"].update({8: {}}), r"recipes: a name expected str, got 8"),
    "unknown shape key": (
        lambda d: d["checkpoints"]["step-3.7-flash"]["shape"].update(n_head=1),
        r"\.shape: unknown keys \['n_head'\]",
    ),
    "dimension that is text": (
        lambda d: d["checkpoints"]["step-3.7-flash"]["shape"].update(n_experts="288"),
        r"\.shape\.n_experts expected int, got '288'",
    ),
    "dimension that is true": (
        lambda d: d["checkpoints"]["step-3.7-flash"]["shape"].update(n_experts=True),
        r"\.shape\.n_experts expected int, got True",
    ),
    "size that is text": (
        lambda d: d["checkpoints"]["step-3.7-flash"].update(n_bytes="big"),
        r"\.n_bytes expected int \| None, got 'big'",
    ),
    "unknown sampling key": (
        lambda d: d["checkpoints"]["step-3.7-flash"]["sampling"]["chat"].update(top_k=1),
        r"\.sampling\.chat: unknown keys \['top_k'\]",
    ),
    "temperature that is text": (
        lambda d: d["checkpoints"]["step-3.7-flash"]["sampling"]["chat"].update(top_p="1"),
        r"\.sampling\.chat\.top_p expected float, got '1'",
    ),
    "template without a name": (lambda d: d["templates"].update({"ab": None}), r"templates\.ab expected str, got None"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_a_slip_in_the_file_is_named_with_its_place(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    refused(tmp_path, edited(change), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipes: {\n", "is not YAML: .*line"),
        ("recipes: {A: 1, A: 2}", "is not YAML: expected each key once, got A twice at line 1"),
        ("- 1", r"expected the keys \['checkpoints', 'machines', 'recipes', 'templates'\], got \[1\]"),
        ("", "got None"),
        ("a: !!python/object:os.system x", "is not YAML: "),
    ],
)
def test_what_is_no_such_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    refused(tmp_path, text, message)


def refused(folder: Path, text: str, message: str) -> None:
    path = folder / "models.yaml"
    path.write_text(text)
    with pytest.raises(ConvertError, match=f"^{re.escape(str(path))}.*{message}") as caught:
        load_models(path)
    assert "\n" not in str(caught.value)
