"""The synthetic model that `doctor` runs: the same bytes everywhere, and a Step-3.5 by its header."""

import hashlib
from pathlib import Path

from step35.planning.model_header import read_header
from step35.selftest import synthetic_model


def test_it_is_written_alike_each_time(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        synthetic_model.write(tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_its_header_is_that_of_a_step35_with_every_kind_of_layer(tmp_path: Path) -> None:
    synthetic_model.write(tmp_path / "synthetic.gguf")
    shape = read_header(tmp_path / "synthetic.gguf").shape
    assert {(layer.is_sliding, layer.is_moe) for layer in shape.layers} == {(False, False), (True, True), (False, True)}
    assert any(layer.clamps_experts for layer in shape.layers) and shape.window == synthetic_model.WINDOW


def test_the_known_logits_are_of_its_vocabulary() -> None:
    known = synthetic_model.known_logits()
    assert known.spread > 0 and known.best in known.logits
    assert all(0 <= token < synthetic_model.N_VOCAB for token in known.logits)
    assert known.logits[known.best] == max(known.logits.values())
