"""What a person reads of an error: one line, without the system's error numbers."""

from pathlib import Path

import pytest

from step35.cli.error_line import error_line
from step35.errors import ModelError


def test_a_systems_error_names_the_file_and_the_reason() -> None:
    with pytest.raises(OSError) as caught:
        Path("/no/such/file").read_bytes()
    assert error_line(caught.value) == "/no/such/file: No such file or directory"


def test_any_other_error_is_its_text() -> None:
    assert error_line(ModelError("not a model")) == "not a model"
    assert error_line(OSError("it closed the connection")) == "it closed the connection"
