"""Write and read a checkpoint as StepFun publishes it: bf16 safetensors in shards, the MTP layers in the first."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference.config import Config
from reference.model import Step35

INDEX_NAME = "model.safetensors.index.json"


def save_checkpoint(model: Step35, raw_config: dict, folder: Path) -> None:
    """Weights, index and config.json; everything bf16 but the router biases, which stay float32."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards({name: _stored(name, tensor) for name, tensor in model.state_dict().items()}, model.config.n_trunk)
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    write_json(folder / INDEX_NAME, _index(shards))
    write_json(folder / "config.json", raw_config)


def _stored(name: str, tensor: Tensor) -> Tensor:
    return tensor.float() if name.endswith("router_bias") else tensor.to(torch.bfloat16)


def _shards(tensors: dict[str, Tensor], n_trunk: int) -> dict[str, dict[str, Tensor]]:
    """Three shards: MTP layers, dense trunk layers with the embedding, the rest."""
    names = [f"model-{i:05}.safetensors" for i in (1, 2, 3)]
    shards: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for tensor_name, tensor in tensors.items():
        shards[names[_shard_of(tensor_name, n_trunk)]][tensor_name] = tensor.contiguous()
    return shards


def _shard_of(name: str, n_trunk: int) -> int:
    if not name.startswith("model.layers."):
        return 1 if name == "model.embed_tokens.weight" else 2
    layer = int(name.split(".")[2])
    return 0 if layer >= n_trunk else 1 if layer < n_trunk // 2 else 2


def _index(shards: dict[str, dict[str, Tensor]]) -> dict:
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def write_json(path: Path, value: dict) -> None:
    """Indented, as such files are published."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's shards, as stored."""
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    return {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}


def load_checkpoint(folder: Path) -> Step35:
    """The model in float32, in evaluation mode."""
    model = Step35(Config.from_file(folder / "config.json"))
    model.load_state_dict({name: tensor.float() for name, tensor in load_tensors(folder).items()})
    return model.eval()
