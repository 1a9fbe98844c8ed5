"""The sampling defaults that models.yaml gives: one for chat, one for work with tools."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from step35.planning.machine import models_path
from step35.yaml_file import Section, positive, read_yaml

CHECKPOINT = "step-3.5-flash"


@dataclass(frozen=True, slots=True)
class Preset:
    """What a client gets that doesn't say otherwise."""

    temperature: float
    top_p: float


@dataclass(frozen=True, slots=True)
class Presets:
    chat: Preset
    agent: Preset


def read_presets(path: Path, checkpoint: str = CHECKPOINT) -> Presets:
    """Returns a checkpoint's presets; raises SettingsError that names the line."""
    sampling = read_yaml(path).section("checkpoints").section(checkpoint).section("sampling")
    presets = Presets(_preset(sampling.section("chat")), _preset(sampling.section("agent")))
    sampling.end()
    return presets


def _preset(entry: Section) -> Preset:
    number = "a number above 0"
    preset = Preset(entry.take("temperature", positive, number), entry.take("top_p", positive, number))
    entry.end()
    return preset


@cache
def shipped_presets() -> Presets:
    """Returns the presets that came with this program; read once."""
    return read_presets(models_path())
