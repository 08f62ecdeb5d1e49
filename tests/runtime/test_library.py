from pathlib import Path

import onnxruntime
import pytest

import qalora_compile
from qalora_compile.errors import UnsupportedError
from qalora_compile.runtime import kernel_level, library, library_path, register
from tests.runtime.layer import Layer


def test_the_library_is_next_to_the_module() -> None:
    assert library_path().is_file()
    assert library.library_version() == qalora_compile.__version__


def test_levels_end_with_the_one_that_runs() -> None:
    levels = library.kernel_levels()
    assert levels[0] == "scalar"
    assert kernel_level() == levels[-1]


def test_a_level_is_there_or_the_library_says_why_not() -> None:
    note = library.kernel_note()
    if "amx" in library.kernel_levels():
        assert note is None
    elif note is not None:
        assert note.startswith("amx is not used: ")


def test_any_number_of_sessions_can_register() -> None:
    layer = Layer()
    model, x = layer.model().SerializeToString(), layer.arrays()["x"]
    found = []
    for _ in range(3):
        options = onnxruntime.SessionOptions()
        register(options)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"x": x})[0])
    expected, bound = layer.reference(layer.arrays())
    assert all((abs(each - expected) <= bound).all() for each in found)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LIBRARY_NAME", "libnowhere.so")


@pytest.mark.usefixtures("no_library")
def test_without_the_library_everything_says_so() -> None:
    with pytest.raises(UnsupportedError, match="was not built") as caught:
        library_path()
    assert "compiler" in str(caught.value)
    with pytest.raises(UnsupportedError, match="was not built"):
        register(onnxruntime.SessionOptions())
    assert kernel_level() is None
    assert library.kernel_levels() == ()
    assert library.kernel_note() is None
    assert library.library_version() is None


def test_a_file_that_is_no_library_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "libbroken.so").write_text("not a library")
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "libbroken.so")
    with pytest.raises(UnsupportedError, match=r"refuses.*libbroken\.so"):
        register(onnxruntime.SessionOptions())
