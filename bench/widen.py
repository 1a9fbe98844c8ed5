"""Widens a checkpoint without changing what it computes.

Every hidden and intermediate feature is repeated, and a matrix that reads repeated features is divided
by their number: each copy carries what the original did, norms see the same mean square, limits act on
the same values. So a tiny trained model becomes a slow one, with its text and its drafts' acceptance.
Factors are powers of two, so that the division is exact in bfloat16. Attention grows by whole heads
(a wider head would have other rotary frequencies). Copies quantize alike where a type's blocks don't
cross them. Further MoE layers, behind the others, are copies of the last ones that add nothing: the matrices that write
into the hidden state are zeros.

By default the bundled checkpoint becomes 3.5 GB of F32 whose shares of a decode's weights resemble the real
model's, in brackets: routed experts .445 (.461), an MTP head .071 (.071).
"""

import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from safetensors.torch import save_file
from torch import Tensor, zeros_like

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]  # the reference model's checkpoint reader

from reference.checkpoint import INDEX_NAME, load_tensors, write_json


@dataclass(frozen=True, slots=True)
class Factors:
    """How often features are repeated: `dense` and `expert` count inside the MLPs; powers of two."""

    hidden: int = 4
    heads: int = 8
    dense: int = 4
    expert: int = 16

    def __post_init__(self) -> None:
        for name in ("hidden", "heads", "dense", "expert"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"bad factor: {name} expected a power of two, got {value}")


# more layers

N_LAYERS = 3
PERIOD = 4  # of layers with full attention
_WRITERS = ("o_proj.weight", "down_proj.weight")
_LAYER_LISTS = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")


def _sources(config: dict, n_more: int) -> list[int]:
    """Returns which old layer each layer of the deep model comes from, MTP heads included."""
    n_trunk = config["num_hidden_layers"]
    last = {i % PERIOD == 0: i for i in range(n_trunk)}  # with full attention, and with a window
    copied = [last[i % PERIOD == 0] for i in range(n_trunk, n_trunk + n_more)]
    return [*range(n_trunk), *copied, *range(n_trunk, n_trunk + config["num_nextn_predict_layers"])]


def deepened(tensors: dict[str, Tensor], config: dict, n_more: int) -> dict[str, Tensor]:
    """Returns a checkpoint's tensors with `n_more` layers before the MTP heads."""
    n_trunk = config["num_hidden_layers"]
    deep = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.")}
    for layer, source in enumerate(_sources(config, n_more)):
        old, is_new = f"model.layers.{source}.", n_trunk <= layer < n_trunk + n_more
        for name in (name for name in tensors if name.startswith(old)):
            adds_nothing = is_new and name.endswith(_WRITERS)
            deep[name.replace(old, f"model.layers.{layer}.")] = (
                zeros_like(tensors[name]) if adds_nothing else tensors[name]
            )
    return deep


def deepened_config(config: dict, n_more: int) -> dict:
    """Returns config.json of the deep model."""
    n_trunk, sources = config["num_hidden_layers"], _sources(config, n_more)
    moe_layers = [config["moe_layers_enum"], *map(str, range(n_trunk, n_trunk + n_more))]
    lists = {key: [config[key][source] for source in sources] for key in _LAYER_LISTS}
    return config | lists | {"num_hidden_layers": n_trunk + n_more, "moe_layers_enum": ",".join(moe_layers)}


# wider ones

# Names by their ending. A matrix: what its rows (outputs) and its columns (inputs) run over.
_KEPT = ("q_norm.weight", "k_norm.weight", "router_bias")
_HIDDEN_VECTORS = ("layernorm.weight", "norm.weight", "embed_tokens.weight")
_MATRICES = {
    "q_proj.weight": ("heads", "hidden"),
    "k_proj.weight": ("heads", "hidden"),
    "v_proj.weight": ("heads", "hidden"),
    "g_proj.weight": ("heads", "hidden"),
    "o_proj.weight": ("hidden", "heads"),
    "mlp.gate_proj.weight": ("dense", "hidden"),
    "mlp.up_proj.weight": ("dense", "hidden"),
    "mlp.down_proj.weight": ("hidden", "dense"),
    "moe.gate.weight": (None, "hidden"),
    "moe.gate_proj.weight": ("expert", "hidden"),
    "moe.up_proj.weight": ("expert", "hidden"),
    "moe.down_proj.weight": ("hidden", "expert"),
    "share_expert.gate_proj.weight": ("expert", "hidden"),
    "share_expert.up_proj.weight": ("expert", "hidden"),
    "share_expert.down_proj.weight": ("hidden", "expert"),
    "eh_proj.weight": ("hidden", "hidden"),
    "lm_head.weight": (None, "hidden"),
    "shared_head.output.weight": (None, "hidden"),
}


def widened(name: str, tensor: Tensor, factors: Factors) -> Tensor:
    """Returns a tensor of the wide model, dtype kept; KeyError for a name without a rule."""
    if name.endswith(_KEPT):
        return tensor
    if name.endswith(_HIDDEN_VECTORS):
        return _repeat(tensor, -1, factors.hidden)
    rows, columns = next(rule for ending, rule in _MATRICES.items() if name.endswith(ending))
    n_parts = 2 if name.endswith("eh_proj.weight") else 1  # its input is two hidden vectors, one after the other
    wide = _repeat(tensor.unflatten(-1, (n_parts, -1)), -1, getattr(factors, columns)).flatten(-2)
    wide = wide / getattr(factors, columns)
    return _repeat(wide, -2, getattr(factors, rows)) if rows else wide


def _repeat(tensor: Tensor, axis: int, n: int) -> Tensor:
    repeats = [1] * tensor.ndim
    repeats[axis] = n
    return tensor.repeat(repeats)


def widened_config(config: dict, factors: Factors) -> dict:
    """Returns config.json of the wide model."""
    sliding = config["attention_other_setting"]
    grown_heads = {key: sliding[key] * factors.heads for key in ("num_attention_heads", "num_attention_groups")}
    return config | {
        "hidden_size": config["hidden_size"] * factors.hidden,
        "intermediate_size": config["intermediate_size"] * factors.dense,
        "num_attention_heads": config["num_attention_heads"] * factors.heads,
        "num_attention_groups": config["num_attention_groups"] * factors.heads,
        "attention_other_setting": sliding | grown_heads,
        "moe_intermediate_size": config["moe_intermediate_size"] * factors.expert,
        "share_expert_dim": config["share_expert_dim"] * factors.expert,
    }


def widen_checkpoint(source: Path, folder: Path, factors: Factors, n_more: int = N_LAYERS) -> Path:
    """Writes the wide checkpoint, one shard a layer, and returns its folder."""
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    weight_map: dict[str, str] = {}
    n_bytes = 0
    for shard, tensors in _by_layer(deepened(load_tensors(source), config, n_more)):
        wide = {name: widened(name, tensor, factors).contiguous() for name, tensor in tensors.items()}
        save_file(wide, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(wide, shard)
        n_bytes += sum(tensor.nbytes for tensor in wide.values())
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": n_bytes}, "weight_map": weight_map})
    write_json(folder / "config.json", widened_config(deepened_config(config, n_more), factors))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(source / name, folder)
    return folder


def _by_layer(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        layers[name.split(".")[2] if name.startswith("model.layers.") else "globals"][name] = tensor
    for i, layer in enumerate(layers.values(), start=1):
        yield f"model-{i:05}.safetensors", layer


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(exists=False, path_type=Path))
@click.option("--hidden", default=Factors().hidden, show_default=True, help="Copies of the hidden state's features.")
@click.option("--heads", default=Factors().heads, show_default=True, help="Copies of the attention heads.")
@click.option(
    "--dense", default=Factors().dense, show_default=True, help="Copies inside dense MLPs, the MTP heads' too."
)
@click.option("--expert", default=Factors().expert, show_default=True, help="Copies inside routed and shared experts.")
@click.option("--layers", default=N_LAYERS, show_default=True, help="Further layers, that add nothing.")
def main(checkpoint: Path, out: Path, layers: int, **factors: int) -> None:
    click.echo(widen_checkpoint(checkpoint, out, Factors(**factors), layers))


if __name__ == "__main__":
    main()
