"""A context of llama.cpp is opened as its options say."""

import pytest

from step35.native import context as context_module
from step35.native.model import Model
from step35.options import ContextOptions, ModelOptions
from tiny_model import tiny_gguf


def test_a_context_takes_no_more_threads_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp takes four: on two cores they waited for each other, and a script of a few lines ran at a fifteenth."""
    monkeypatch.setattr(context_module, "usable_cores", lambda: 1)
    model = Model(ModelOptions(tiny_gguf()))
    by_default, as_asked = (
        model.open_trunk(ContextOptions(64, 32)),
        model.open_trunk(ContextOptions(64, 32, n_threads=3)),
    )
    assert [context.n_threads for context in (by_default, as_asked)] == [1, 3]
    for part in (by_default, as_asked, model):
        part.close()
