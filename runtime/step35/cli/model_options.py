"""The options that commands with a model share, and those of sampling."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from step35.choices import DRAFTS, KV_TYPES, LOAD_MODES
from step35.cli.renamed_option import mtp_file_option

Decorator = Callable[[Any], Any]

MODEL_OPTIONS: tuple[Decorator, ...] = (
    click.argument("model", type=click.Path(path_type=Path)),
    mtp_file_option,
    click.option("--draft", type=click.Choice(list(DRAFTS)), default="auto", show_default=True, help="How to draft."),
    click.option(
        "-c", "--ctx", "n_ctx", type=int, help="Context size in tokens; default 32768, or less if that is what fits."
    ),
    click.option(
        "-b", "--batch", "n_batch", type=int, help="Prompt tokens per decode (batch and ubatch); default planned."
    ),
    click.option("-t", "--threads", "n_threads", type=int, help="CPU threads; default the cores."),
    click.option("--ngl", "n_gpu_layers", type=int, help="Layers on the GPU, -1 is all; default planned."),
    click.option("--load-mode", type=click.Choice(list(LOAD_MODES)), help="How weights are read; default planned."),
    click.option("--kv-type", type=click.Choice(list(KV_TYPES)), help="Type of the KV cache; default planned."),
    click.option(
        "--plan", "plan_path", type=click.Path(path_type=Path), help="Run what this plan file says; see step35 plan."
    ),
)
SAMPLING_OPTIONS: tuple[Decorator, ...] = (
    click.option("--temp", default=0.6, show_default=True, help="Temperature; 0 is greedy."),
    click.option("--top-k", default=0, show_default=True, help="Keep the k most probable tokens; 0 is all."),
    click.option("--top-p", default=0.95, show_default=True, help="Keep the most probable tokens up to this sum."),
    click.option("--min-p", default=0.0, show_default=True, help="Drop tokens below this share of the best."),
    click.option("--seed", default=0, show_default=True, help="The same seed gives the same text."),
)


def with_options(options: Sequence[Decorator]) -> Decorator:
    """Returns a decorator that adds options to a command, the first one shown first."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
