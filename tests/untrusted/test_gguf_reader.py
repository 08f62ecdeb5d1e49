"""The reader of GGUF files gives what the library's own gives."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from qalora_compile.untrusted.gguf_reader import open_gguf
from tests.capture.checkpoints.gguf_files import write_llama


def test_fields_and_tensors_are_those_of_the_library(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "llama.gguf")
    mine, own = open_gguf(path), gguf.GGUFReader(path)
    assert isinstance(mine, gguf.GGUFReader)
    assert not isinstance(mine.data, np.memmap)
    assert mine.fields.keys() == own.fields.keys()
    for name, field in own.fields.items():
        assert mine.fields[name].contents() == field.contents(), name
    for found, expected in zip(mine.tensors, own.tensors, strict=True):
        assert (found.name, found.tensor_type) == (expected.name, expected.tensor_type)
        assert np.array_equal(found.data, expected.data)
