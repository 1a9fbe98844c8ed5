"""How an engine gets its model: what reads the headers, loads a file, and checks the memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35.choices import LOAD_MODES
from step35.native.interface import ModelInterface
from step35.options import EngineOptions, ModelOptions
from step35.planning.model_header import Header, Headers, read_headers

if TYPE_CHECKING:
    from step35.planning.admission import Guard


@dataclass(frozen=True, slots=True)
class Loading:
    """Three steps of opening an engine; tests put a fake llama.cpp in their place."""

    read: Callable[[EngineOptions], Headers]
    load: Callable[[ModelOptions, Header], ModelInterface]
    admit: "Callable[[EngineOptions, Headers], Guard | None]"
    """Raises DoesNotFit where the memory can't hold the engine; None where the memory is unknown."""


def _read(options: EngineOptions) -> Headers:
    return read_headers(options.model, options.mtp)


def _load(options: ModelOptions, header: Header) -> ModelInterface:
    from step35.native.model import Model
    from step35.planning.admission import drop_from_page_cache

    model = Model(options, header.draft_vocabulary)
    if LOAD_MODES[options.load_mode].copies:
        drop_from_page_cache(header.files)
    return model


def _admit(options: EngineOptions, headers: Headers) -> "Guard | None":
    from step35.planning.admission import check_memory

    return check_memory(options, headers)


ON_THIS_BOX = Loading(_read, _load, _admit)
