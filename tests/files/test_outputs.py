"""`--overwrite` replaces what this package wrote, and never what is read or where the user is."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from qalora_compile.errors import OutputError, UserInputError
from qalora_compile.files import atomic_files, atomic_folder, check_output, reserve, write_json
from qalora_compile.files.marks import GENERATOR, GGUF_KEY
from qalora_compile.ir.safetensors_io import save_tensors

RECORDS = {
    "run.json": {"format": "qalora-run"},
    "qalora.json": {"format": "qalora-edge"},
    "export.json": {"format": "qalora-export"},
    "state.json": {"format": "qalora-checkpoint"},
    "program.json": {"format": "qalora-program"},
    "reproduction.json": {"format": "qalora-reproduction"},
    "adapter_config.json": {"use_qalora": True, "qalora_pooling": "sum"},
}


def ours(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(RECORDS["run.json"]), "utf-8")
    return folder


def refused(path: Path, match: str, *inputs: Path, is_file: bool = False) -> None:
    with pytest.raises(UserInputError, match=match):
        check_output(path, overwrite=True, inputs=inputs, is_file=is_file)


@pytest.mark.parametrize("name", RECORDS)
def test_a_folder_with_a_record_of_ours_is_replaced(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    check_output(folder, overwrite=True)  # an empty one: nothing is lost
    for text in ("{}", "no JSON", '{"format": "another"}', "[1]"):
        (folder / name).write_text(text, "utf-8")
        refused(folder, "was not written by this tool")
    (folder / name).write_text(json.dumps(RECORDS[name]), "utf-8")
    check_output(folder, overwrite=True)


def test_a_folder_of_others_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all of it", "utf-8")
    busy = pytest.raises(UserInputError, match="was not written by this tool")
    with busy, atomic_folder(tmp_path / "out", overwrite=True):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "thesis.txt").read_text("utf-8") == "all of it"


def test_the_input_and_what_holds_it_are_never_replaced(tmp_path: Path) -> None:
    out, other = ours(tmp_path / "out"), ours(tmp_path / "other")
    inside = ours(out / "a" / "run")
    link, to_inside = tmp_path / "link", other / "link"
    link.symlink_to(out)
    to_inside.symlink_to(inside)
    refused(out, "is the input", out)
    refused(out, "is the input", link)
    refused(out, "is the input", tmp_path / "other" / ".." / "out")
    refused(out, "holds the input", inside)
    refused(out, "holds the input", to_inside)
    check_output(other, overwrite=True, inputs=[out, "package.module:factory", "a/hub-model"])
    check_output(inside, overwrite=True, inputs=[out])  # next to an input


def test_the_working_directory_and_what_holds_it_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ours(tmp_path / "out")
    (out / "below").mkdir()
    for place in (out, out / "below"):
        monkeypatch.chdir(place)
        refused(out, "holds the working directory")
        refused(Path(os.path.relpath(out)), "holds the working directory")
    refused(Path(), "holds the working directory")
    refused(Path("/"), "no name")


def test_a_link_is_never_replaced(tmp_path: Path) -> None:
    out, link = ours(tmp_path / "out"), tmp_path / "link"
    link.symlink_to(out)
    refused(link, "is a link")
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    refused(link, "is a link")


def files_of_ours() -> Iterator[tuple[str, bytes]]:
    """Single files as this package writes them."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    made = helper.make_model(graph, producer_name="qalora-compile")
    yield "model.onnx", made.SerializeToString()
    yield "model.gguf", b"GGUF\x03\x00\x00\x00" + GGUF_KEY.encode()
    yield "page.html", f"<html><head>{GENERATOR}</head></html>".encode()
    yield "certificate.json", b'{"format": "qalora-certificate"}'
    yield "empty", b""


def test_a_file_is_replaced_if_it_is_ours(tmp_path: Path) -> None:
    for name, content in files_of_ours():
        path = tmp_path / name
        path.write_bytes(content)
        check_output(path, overwrite=True, is_file=True)
        refused(path, "is the input", path, is_file=True)
        path.write_bytes(content.replace(b"qalora", b"others") or b"text")
        refused(path, "was not written by this tool", is_file=True)


def test_another_libraries_model_is_no_file_of_ours(tmp_path: Path) -> None:
    graph = helper.make_graph([], "qalora-compile", [], [])
    onnx.save(helper.make_model(graph, producer_name="pytorch"), tmp_path / "model.onnx")
    refused(tmp_path / "model.onnx", "was not written by this tool", is_file=True)


def test_a_companion_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_text("mine", "utf-8")
    busy = pytest.raises(UserInputError, match="model.onnx.data, which belongs to the output")
    with busy, atomic_files(tmp_path / "model.onnx") as scratch:
        scratch.write_text("new", "utf-8")
        scratch.with_name("model.onnx.data").write_text("new", "utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx.data"]
    assert (tmp_path / "model.onnx.data").read_text("utf-8") == "mine"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
def test_the_umask_is_respected(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1", "utf-8")
            (folder / "inner").mkdir(mode=0o700)
            (folder / "inner" / "copy.so").write_text("1", "utf-8")
            (folder / "inner" / "copy.so").chmod(0o700)
            (folder / "a").chmod(0o400)
            save_tensors({"t": torch.zeros(1)}, folder / "t.safetensors")
        save_tensors({"t": torch.zeros(1)}, tmp_path / "t.safetensors")
        write_json(tmp_path / "b.json", 1)
        with atomic_files(tmp_path / "c") as scratch:
            scratch.write_text("1", "utf-8")
            scratch.chmod(0o600)
    finally:
        os.umask(old)
    plain, folders = 0o666 & ~umask, 0o777 & ~umask
    for name in ("out/a", "out/t.safetensors", "t.safetensors", "b.json", "c"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == plain, name
    for name in ("out", "out/inner", "out/inner/copy.so"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == folders, name


def test_files_and_folders_are_synced_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def note(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", renamed)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("1", "utf-8")
    assert done == ["a", "inner", ".out.qalora.tmp", "rename", tmp_path.name]


def test_an_output_where_nothing_can_be_written_says_so(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    with pytest.raises(OutputError, match="File name too long"), atomic_folder(long):
        pytest.fail("the block must not run")


def test_folders_made_for_an_output_that_failed_are_gone(tmp_path: Path) -> None:
    with pytest.raises(KeyError), reserve(tmp_path / "a" / "b" / "out", overwrite=False):
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
