"""One start reads each file's header once, whoever starts it, and says what is wrong before anything is loaded."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fake_native import Script, loader
from step35.cli.plan import engine_plan
from step35.engine.engine import Engine
from step35.errors import DoesNotFit
from step35.llama import Llama
from step35.options import EngineOptions
from step35.planning import model_header
from step35.planning.autoplan import file_plan, plan_here
from step35.planning.hardware import probe, this_box
from step35.planning.model_header import read_headers
from step35.planning.placement import Constraints
from step35.planning.plan_file import to_text
from step35.selftest.doctor import examine_model
from tiny_model import tiny_gguf

SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_batch": 32, "n_threads": 1}


@pytest.fixture
def read(monkeypatch) -> list[Path]:
    """The files whose headers were read."""
    paths: list[Path] = []
    read_gguf = model_header.read_gguf
    monkeypatch.setattr(model_header, "read_gguf", lambda path: paths.append(path) or read_gguf(path))
    return paths


@pytest.fixture(scope="module")
def files() -> tuple[Path, Path]:
    """A model without heads, and its side file."""
    return tiny_gguf(mtp="drop"), tiny_gguf(mtp="only")


def test_an_engine_of_a_script_reads_each_header_once(read, files):
    with Engine(EngineOptions(tiny_gguf(), draft="1", **SETTINGS)):
        assert read == [tiny_gguf()]
    with Engine(EngineOptions(*files, draft="1", **SETTINGS)):
        assert read[1:] == [*files]


def test_a_commands_plan_and_engine_read_each_header_once(read, files):
    planned = engine_plan(files[0], None, files[1], draft="1", **SETTINGS)
    with Engine(planned.options, planned.headers) as engine:
        assert engine.n_draft_heads == 1
    assert read == [*files]


def test_a_plan_file_and_its_engine_read_each_header_once(read, files, tmp_path):
    headers = read_headers(*files)
    report = plan_here(headers.joined(), this_box(), Constraints(n_ctx=256, n_batch=32))
    assert report is not None
    (tmp_path / "plan.yaml").write_text(to_text(report.placement, files[0].name))
    planned = file_plan(headers, tmp_path / "plan.yaml", draft="1")
    with Engine(planned.options, planned.headers):
        assert read == [*files]


def test_a_llama_reads_each_header_once(read, files):
    with closing(Llama(str(files[0]), mtp_path=str(files[1]), draft="1", n_ctx=256, verbose=False)):
        assert read == [*files]


def test_the_doctor_reads_a_models_header_once(read):
    assert all(finding.is_well for finding in examine_model(tiny_gguf(), probe(this_box()), Engine))
    assert read == [tiny_gguf()]


def test_what_was_read_may_be_given_again(read):
    """As step35 bench does for each way to draft: the side file's heads are left out where nobody drafts."""
    headers = read_headers(tiny_gguf(mtp="drop"), tiny_gguf(mtp="only"))
    options = EngineOptions(headers.model.path, headers.side_path, draft="off", **SETTINGS)
    with Engine(options, headers) as plain, Engine(replace(options, draft="1"), headers) as drafting:
        assert (plain.n_draft_heads, drafting.n_draft_heads) == (0, 1)
    assert len(read) == 2


def test_nothing_is_loaded_that_the_memory_cant_hold():
    """The check comes between the header and the weights, and a loader without one has none."""
    done = []

    def refuse(options, headers):
        done.append("admit")
        raise DoesNotFit("no room")

    loading = loader(Script())
    steps = replace(
        loading,
        read=lambda options: done.append("read") or loading.read(options),
        load=lambda options, header: done.append("load") or loading.load(options, header),
    )
    with pytest.raises(DoesNotFit, match="no room"):
        Engine(EngineOptions(Path("fake"), draft="off", n_ctx=256), loading=replace(steps, admit=refuse))
    assert done == ["read", "admit"]
    with Engine(EngineOptions(Path("fake"), draft="off", n_ctx=256), loading=steps) as engine:
        assert engine.demand is None
    assert done == ["read", "admit", "read", "load"]
