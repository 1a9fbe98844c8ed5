"""What to try when a plan does not fit: a shorter context, or a smaller recipe."""

from dataclasses import replace

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from step35.planning.machine import Machine, models_path
from step35.planning.memory_usage import matrix_of
from step35.planning.model_header import Group, Header, Tensor
from step35.planning.placement import Constraints, longest_context, place
from step35.yaml_file import Section, read_yaml, text

_DOWN = 2


def advice(header: Header, machine: Machine, constraints: Constraints) -> list[str]:
    """Returns what would fit: at most a context and a recipe, as the user would ask for them."""
    found = []
    n_ctx = longest_context(header, machine, constraints)
    if n_ctx and constraints.n_ctx is not None:
        found.append(f"ctx {min(n_ctx, constraints.n_ctx)}")
    recipe = fitting_recipe(header, machine, constraints)
    if recipe:
        found.append(f"recipe {recipe}")
    return found


def fitting_recipe(header: Header, machine: Machine, constraints: Constraints) -> str | None:
    """Returns the best recipe, smaller than this file, that fits with the context asked for."""
    recipes = read_yaml(models_path()).section("recipes")
    for name in recipes.names():
        smaller = with_recipe(header, recipes.section(name))
        if smaller.n_bytes < header.n_bytes and place(smaller, machine, constraints).fits:
            return name
    return None


def with_recipe(header: Header, recipe: Section) -> Header:
    """Returns the header that the checkpoint would have, converted by a recipe of models.yaml."""
    kinds = {key: recipe.take(key, text, "a ggml type") for key in ("experts_gate_up", "experts_down", "rest", "mtp")}
    return replace(header, tensors=tuple(_converted(tensor, kinds) for tensor in header.tensors))


def _converted(tensor: Tensor, kinds: dict[str, str]) -> Tensor:
    if tensor.group is Group.ROUTER or len(tensor.shape) < 2:
        return tensor  # router, norms and biases are F32 in every recipe
    key = {Group.HEADS: "mtp", Group.IDLE: "mtp", Group.EXPERTS: "experts_gate_up"}.get(tensor.group, "rest")
    if tensor.group is Group.EXPERTS and matrix_of(tensor) == _DOWN:
        key = "experts_down"
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kinds[key]]]
    n_weights = 1
    for size in tensor.shape:
        n_weights *= size
    return replace(tensor, kind=kinds[key], n_bytes=n_weights // block * block_bytes)
