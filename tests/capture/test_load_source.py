"""Models by reference, and references that lead nowhere."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalora_compile.capture.load_source import load_source
from qalora_compile.errors import QaloraError, UnsupportedError, UserInputError
from tests import forked
from tests.models import bert, llama, token_ids, worst


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    return tmp_path / "model"


def test_a_hugging_face_folder_is_loaded_as_it_is(folder: Path) -> None:
    source = load_source(str(folder))
    program = source.capture()
    assert source.kind == "huggingface"
    assert source.tokenizer is None
    ids = token_ids(3, 7)
    mask = torch.ones_like(ids)
    expected = source.model(input_ids=ids, attention_mask=mask)
    assert worst(program(input_ids=ids, attention_mask=mask), expected) < 1e-5


@pytest.mark.slow
def test_an_encoder_folder_is_loaded(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)  # type: ignore[operator]
    source = load_source(str(tmp_path))
    assert type(source.model).__name__ == "BertModel"
    assert [leaf.name for leaf in source.capture().signature.inputs] == [
        "input_ids",
        "attention_mask",
    ]


def test_a_factory_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_models.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(4, 2), (torch.ones(3, 4),), {}\n"
    )
    monkeypatch.chdir(tmp_path)
    program = load_source("some_models:build").capture()
    assert program(torch.ones(5, 4)).shape == (5, 2)


FACTORIES = {
    "not there": ("x = 1\n", "cannot find"),
    "raises": ("def build():\n    raise OSError('disk')\n", "OSError: disk"),
    "returns a number": ("def build():\n    return 3\n", "returned a int"),
    "does not import": ("import nothing_of_this_name\n", "cannot find"),
}


@pytest.mark.parametrize("kind", FACTORIES)
def test_a_broken_factory_is_explained(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, expected = FACTORIES[kind]
    name = "broken_" + kind.replace(" ", "_")
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserInputError, match=expected):
        load_source(f"{name}:build")


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def test_truncated_weights_are_refused(folder: Path) -> None:
    truncate(folder / "model.safetensors", 5000)
    with pytest.raises(UserInputError, match="model.safetensors is truncated"):
        load_source(str(folder))


def test_a_missing_or_broken_config_is_refused(folder: Path) -> None:
    truncate(folder / "config.json", 20)
    with pytest.raises(UserInputError, match="not valid JSON"):
        load_source(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserInputError, match=r"config\.json is missing"):
        load_source(str(folder))


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for names in ([], ["NoSuchModelForAnything"]):
        (folder / "config.json").write_text(json.dumps(config | {"architectures": names}))
        with pytest.raises(UnsupportedError, match="no architecture"):
            load_source(str(folder))


@pytest.mark.parametrize("given", ["folder", "file"])
def test_pickled_weights_are_refused_with_a_command_that_converts_them(
    given: str, tmp_path: Path
) -> None:
    folder, wanted = tmp_path / "a model's", llama()
    wanted.save_pretrained(folder)  # type: ignore[operator]
    (folder / "model.safetensors").unlink()
    parts = list(wanted.state_dict().items())
    for number, some in enumerate((parts[:4], parts[4:])):
        torch.save(dict(some), folder / f"pytorch_model-0000{number}-of-00002.bin")
    (folder / "training_args.bin").write_bytes(b"no tensors")
    reference = folder if given == "folder" else folder / "pytorch_model-00000-of-00002.bin"
    with pytest.raises(UserInputError, match="pickle") as caught:
        load_source(str(reference))
    hint = str(caught.value.hint)
    program, *words = shlex.split(hint[hint.index("python -c") :])
    assert (program, words[0]) == ("python", "-c")
    if given == "file":
        words.append(str(folder / "pytorch_model-00001-of-00002.bin"))
    assert forked.code(words[1], words[2:]).wait()[0] == 0
    found = load_source(str(folder)).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in parts)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserInputError, match=r"holds no safetensors file\n"):
        load_source(str(folder))


def test_parameters_that_the_checkpoint_lacks_are_not_made_up(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserInputError, match=r"no tensor model\.norm\.weight \(1 in all\)\n"):
        load_source(str(folder))
    save_file(tensors | {"model.norm.odd": norm}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserInputError, match=r"has an unknown model\.norm\.odd"):
        load_source(str(folder))


GGUF_FILES = {
    "missing": None,
    "another kind": b"PK\x03\x04" + bytes(100),
    "header only": b"GGUF\x03\x00\x00\x00" + bytes(16),
    "cut in the header": b"GGUF\x03\x00",
    "garbage after the magic": b"GGUF" + bytes(range(256)) * 4,
}


@pytest.mark.parametrize("kind", GGUF_FILES)
def test_a_broken_gguf_file_is_refused(kind: str, tmp_path: Path) -> None:
    path, content = tmp_path / "model.gguf", GGUF_FILES[kind]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QaloraError) as caught:
        load_source(str(path))
    assert isinstance(caught.value, UserInputError)


def test_a_reference_of_no_kind_is_refused() -> None:
    with pytest.raises(UserInputError, match="no model 'no/such/place'"):
        load_source("no/such/place")
