"""What made newcomers stop: 20 complaints and 17 bugs, each with the test that closes it.

`CLOSED` says where each is; those without a better place are tested here. The numbers are those of
the list of complaints (`C`) and of bugs (`B`) that the first new user wrote.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import qalora_compile as qc
from qalora_compile._version import __version__
from qalora_compile.capture.peft_adapters import read_peft_adapter
from qalora_compile.cli.main import main
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.view.netron import structure_model
from tests.media import write_image_model
from tests.models import MLP

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]

CLOSED: dict[str, tuple[str, ...]] = {
    "C1, one INT4 ONNX file is two": (
        "exporters/test_one_file.py::test_the_file_is_the_one_that_onnx_reads",
        "cli/test_commands.py::test_weights_in_a_second_file_are_said_to_transformers_js",
    ),
    "C2, 80 columns cut numbers and the bar": (
        "cli/test_ui.py::test_numbers_are_never_cut_and_names_fold",
        "cli/test_ui.py::test_a_bar_in_80_columns_has_step_rate_and_time_left",
        "cli/test_parser.py::test_help_fits_80_columns",
    ),
    "C3, the advice for PEFT is a dead end": (
        "cli/test_newcomer.py::test_plain_lora_is_sent_to_finetune",
    ),
    "C4, Ctrl-C says nothing": (
        "cli/test_train_on.py::test_an_interrupt_says_what_is_saved_and_how_to_go_on",
        "cli/test_train_on.py::test_a_second_interrupt_says_what_is_left",
    ),
    "C5, inspect --group lists every layer of a pass": (
        "cli/test_inspect.py::test_it_fits_80_columns_and_cuts_nothing_off",
        "cli/test_newcomer.py::test_passes_are_named_without_their_layers",
    ),
    "C6, no way to train on": (
        "cli/test_train_on.py::test_more_steps_at_a_constant_rate_are_those_of_one_run",
        "cli/test_train_on.py::test_a_run_from_another_goes_on_with_its_adapters",
        "cli/test_train_on.py::test_a_finished_run_says_so_at_once",
    ),
    "C7, encoders get wrong advice, no classes, no pooling": (
        "cli/test_hints.py::test_a_hint_names_options_that_there_are",
        "cli/test_data_options.py::test_a_classifier_learns_its_classes",
        "cli/test_encoders.py::test_an_encoder_is_quantized_and_pooled",
    ),
    "C8, options hide their defaults": (
        "cli/test_parser.py::test_every_option_has_help_and_states_its_default",
        "cli/test_train_on.py::test_epochs_are_steps_over_all_examples",
        "cli/test_config_file.py::test_options_come_from_the_file_and_the_command_line_goes_before",
    ),
    "C9, an output or a file is found missing after minutes": (
        "cli/test_newcomer.py::test_an_output_that_cannot_be_written_is_found_first",
        "cli/test_train_on.py::test_data_files_are_looked_for_before_the_model_is_loaded",
    ),
    "C10, a wrong example prints hundreds of lines": (
        "capture/test_model.py::test_examples_that_do_not_fit_are_refused",
        "capture/test_model.py::test_a_refusal_prints_no_graph_and_no_traceback",
    ),
    "C11, verify --numeric without a time left": (
        "verify/numeric/test_compare_nodes.py::test_the_time_left_covers_all_of_the_work",
        "verify/numeric/test_compare_nodes.py::test_an_interrupt_keeps_the_modes_that_are_done",
    ),
    "C12, own passes are second-class": (
        "test_extend.py::test_a_pass_parses_with_its_options_and_stands_in_the_history",
        "test_extend.py::test_its_history_replays_from_a_saved_program_too",
        "ir/test_program.py::test_history_parses_back_and_reproduces_the_program",
    ),
    "C13, --version and typos import everything": (
        "cli/test_parser.py::test_nothing_heavy_is_imported_to_answer",
    ),
    "C14, a typo has no suggestion, and nothing completes": (
        "cli/test_parser.py::test_a_typo_is_answered_in_three_lines",
        "cli/test_newcomer.py::test_dashes_alone_are_no_likeness",
        "cli/test_parser.py::test_completion_knows_commands_and_options",
    ),
    "C15, pages": (
        "pages/test_in_a_browser.py::test_no_text_is_clipped_and_no_page_scrolls_to_the_side",
        "pages/test_page.py::test_a_longer_bar_is_a_larger_value_and_begins_at_zero",
        "pages/test_charts.py::test_ticks_of_steps_are_integers_and_large_numbers_are_grouped",
    ),
    "C16, docs without an index, a tutorial, a reference": (
        "ground/test_docs_site.py::test_every_page_is_in_the_navigation",
        "ground/test_docs_site.py::test_the_api_pages_have_every_public_name",
        "ground/test_docs_site.py::test_every_command_is_accepted",
    ),
    "C17, Python's words on the command line": (
        "cli/test_option_names.py::test_a_field_is_called_by_its_option",
    ),
    "C18, export refuses a saved program; a vision model": (
        "cli/test_newcomer.py::test_export_says_what_a_saved_program_lacks",
        "cli/test_newcomer.py::test_a_vision_model_on_texts_says_what_it_reads",
        "cli/test_media.py::test_images_from_data_to_onnx_runtime",
    ),
    "C19, forms of data, byte order marks, labels": (
        "training/data/test_read_rows.py::test_the_rows_are_the_same",
        "cli/test_data_options.py::test_a_table_with_names_of_its_own_is_learned",
        "cli/test_data_options.py::"
        "test_labels_and_a_model_that_generates_are_refused_before_it_is_loaded",
    ),
    "C20, ranks above the number of groups": (
        "passes/test_insert_adapters.py::test_a_rank_above_the_number_of_groups_is_said",
    ),
    "B1, markup in paths and labels": (
        "cli/test_ui.py::test_commands_with_markup_in_paths_labels_and_notes",
    ),
    "B2, numbers are cut": ("cli/test_ui.py::test_numbers_are_never_cut_and_names_fold",),
    "B3, inspect calls real zero-points integers": (
        "cli/test_newcomer.py::test_real_zero_points_are_called_real",
    ),
    "B4, producer_version; B6, opset": (
        "cli/test_newcomer.py::"
        "test_the_model_names_the_version_that_wrote_it_and_the_record_its_opset",
    ),
    "B5, --last-logits --no-kv-cache": (
        "cli/test_newcomer.py::test_last_logits_without_a_cache_are_refused",
    ),
    "B7, files lacks the data file": (
        "cli/test_commands.py::test_weights_in_a_second_file_are_said_to_transformers_js",
    ),
    "B8, hints name options that the command lacks": (
        "cli/test_hints.py::test_a_hint_names_options_that_there_are",
    ),
    "B9, next-step commands are not quoted": (
        "cli/test_newcomer.py::"
        "test_the_model_names_the_version_that_wrote_it_and_the_record_its_opset",
    ),
    "B10, mypy passes a misspelt name; B17, dir and reprs": (
        "ground/test_public_api.py::test_type_checkers_refuse_a_misspelt_name",
        "cli/test_newcomer.py::test_dir_and_reprs_are_short",
    ),
    "B11, stderr stays 80 wide; tokens/s of labels": (
        "cli/test_newcomer.py::test_without_a_terminal_lines_are_wide",
        "cli/test_newcomer.py::test_a_classifier_counts_the_tokens_that_it_reads",
    ),
    "B12, seconds leave out answers and report": (
        "cli/test_newcomer.py::test_seconds_are_those_of_the_complete_command",
    ),
    "B13, a tensor in place of a call": (
        "cli/test_newcomer.py::test_a_tensor_in_place_of_a_call_is_explained",
    ),
    "B14, LoftQ gets a hint for PiSSA": ("cli/test_newcomer.py::test_loftq_has_a_hint_of_its_own",),
    "B15, a missing path": ("cli/test_newcomer.py::test_a_missing_path_is_called_missing",),
    "B16, GGUF reports what the model does not have": (
        "cli/test_newcomer.py::test_an_export_reports_only_what_concerns_the_model",
    ),
}


@pytest.mark.parametrize(
    "number", [*(f"C{n}" for n in range(1, 21)), *(f"B{n}" for n in range(1, 18))]
)
def test_every_complaint_is_closed_by_a_test(number: str) -> None:
    tests = [each for name, each in CLOSED.items() if re.search(rf"\b{number},", name)]
    assert tests, f"{number} is closed by nothing"
    for place in tests[0]:
        file, name = place.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8"), place


@pytest.fixture(scope="module")
def folded(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folded model, with a blank in its path."""
    root = tmp_path_factory.mktemp("a folder")
    run = ["finetune", str(model_folder), "--data", str(data_file), "--steps", "1"]
    assert main([*run, "--out", str(root / "run")]) == 0
    assert main(["fold", str(root / "run"), "--out", str(root / "folded")]) == 0
    return root / "folded"


def test_the_model_names_the_version_that_wrote_it_and_the_record_its_opset(
    folded: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["export", str(folded), "--out", str(tmp_path / "edge")]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert f"qalora-compile verify '{folded}' {tmp_path / 'edge'} --max-rel" in said
    model = onnx.load(tmp_path / "edge" / "onnx" / "model_q4.onnx", load_external_data=False)
    assert (model.producer_name, model.producer_version) == ("qalora-compile", __version__)
    (opset,) = (each.version for each in model.opset_import if not each.domain)
    record = json.loads((tmp_path / "edge" / "qalora.json").read_text("utf-8"))
    assert record["export"]["opset"] == opset
    structure = structure_model(qc.Program.load(folded))
    assert structure.producer_version == __version__


def test_last_logits_without_a_cache_are_refused(
    folded: Path, model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    for line in (["export", str(folded)], ["quantize", str(model_folder)]):
        words = [*line, "--out", str(tmp_path / "edge"), "--last-logits", "--no-kv-cache"]
        assert main(words) == 2
        assert "--last-logits is given with --no-kv-cache" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_merged_decoder_is_refused_where_there_is_none(
    folded: Path, model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    said = "for models with an encoder and a decoder", "is given with --no-kv-cache"
    for line in (["export", str(folded)], ["quantize", str(model_folder)]):
        words = [*line, "--out", str(tmp_path / "edge"), "--merged-decoder"]
        for more, expected in zip(([], ["--no-kv-cache"]), said, strict=True):
            assert main([*words, *more]) == 2
            assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_path_is_called_missing(folded: Path, capsys: Capture) -> None:
    for words in (["none", str(folded)], [str(folded), "none"], ["none", "nothing"]):
        for way in (["--max-rel", "1e-3"], ["--prove"], ["--numeric"]):
            assert main(["verify", *words, *way]) == 2
            assert "there is no file or folder no" in capsys.readouterr().err


def test_a_tensor_in_place_of_a_call_is_explained(tmp_path: Path) -> None:
    program = qc.capture_model(MLP(64, 64, 8), (torch.randn(2, 64),))
    with pytest.raises(UserInputError, match="a call is a tensor") as caught:
        calls: list[Any] = [torch.randn(2, 64)]
        qc.verify_equivalence(program, program, calls, qc.Tolerance(max_abs=1e-3))
    assert "[(x,)]" in str(caught.value)


def test_loftq_has_a_hint_of_its_own(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    for start, wanted in (("loftq", "LoftQ, whose base"), ("pissa", "changes the base")):
        text = json.dumps(settings | {"init_lora_weights": start})
        (tmp_path / "adapter_config.json").write_text(text, "utf-8")
        with pytest.raises(UnsupportedError, match=wanted) as caught:
            read_peft_adapter(tmp_path)
        named = "path_initial_model_for_weight_conversion" in str(caught.value)
        assert named == (start == "pissa")


def test_an_export_reports_only_what_concerns_the_model(
    folded: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["export", str(folded), "--out", str(tmp_path / "hqq"), "--target", "hqq"]) == 0
    said = capsys.readouterr().out
    assert "real zero-point: " in said
    assert "codes of 4, 3 and 2 bits: " in said
    for absent in ("codes of 8 bits: ", "activation order: ", "other architectures: "):
        assert absent not in said


def test_plain_lora_is_sent_to_finetune(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "plain")
    words = ["adapt", str(model_folder), "--adapter", str(tmp_path / "plain")]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "or train with finetune, whose adapters fold" in said
    assert "use_qalora=True pools on GPTQ layers alone" in said


def test_passes_are_named_without_their_layers(folded: Path, capsys: Capture) -> None:
    assert main(["inspect", str(folded), "--group"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "insert-adapters → " in shown and "fold-adapters" in shown
    assert "q_proj=" not in shown


def test_an_output_that_cannot_be_written_is_found_first(
    model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        pytest.fail("the model is loaded before the output is looked at")

    monkeypatch.setattr("qalora_compile.api.finetune_data.load_source", loaded)
    words = ["finetune", str(model_folder), "--data", str(data_file), "--steps", "1"]
    assert main([*words, "--out", "/proc/nowhere/run"]) == 2
    assert "cannot write /proc/nowhere/run" in capsys.readouterr().err


def test_dashes_alone_are_no_likeness(capsys: Capture) -> None:
    assert main(["finetune", "model", "--label", "x"]) == 2
    assert "there is no option --label\n" in capsys.readouterr().err
    assert main(["finetune", "model", "--dta", "x"]) == 2
    assert "did you mean --data?" in capsys.readouterr().err


def test_export_says_what_a_saved_program_lacks(
    folded: Path, tmp_path: Path, capsys: Capture
) -> None:
    qc.Program.load(folded).save(tmp_path / "program")
    assert main(["inspect", str(tmp_path / "program")]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "program"), "--out", str(tmp_path / "edge")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "was not written by finetune or fold: it holds no run.json" in said
    assert "qc.export_model" in said


def test_a_vision_model_on_texts_says_what_it_reads(
    data_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = write_image_model(tmp_path / "vit")
    words = ["finetune", str(model), "--data", str(data_file), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "ViTModel reads pixel_values, and not texts" in said
    assert '{"image": path, "label": …}' in said


def test_real_zero_points_are_called_real(folded: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(folded), "--out", str(tmp_path / "edge")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "edge"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = {row["zero-point"] for row in found["layers"] if row["bits"]}
    assert kinds == {"real"}


def test_dir_and_reprs_are_short(folded: Path) -> None:
    assert dir(qc) == sorted(qc.__all__)
    program = qc.Program.load(folded)
    report = qc.verify_equivalence(program, program, [program.example[1]], qc.Tolerance(max_abs=1))
    for value in (program, program.plan, report, program.signature, qc.QuantSpec()):
        assert len(repr(value)) < 500, type(value).__name__


def test_without_a_terminal_lines_are_wide(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    name = "a-long-name-of-a-folder-" * 6
    missing = tmp_path / name
    words = ["finetune", str(model_folder), "--data", str(missing), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert any(str(missing) in line for line in capsys.readouterr().err.splitlines())


@pytest.mark.slow
def test_a_classifier_counts_the_tokens_that_it_reads(encoder_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"the film is {word}", "label": word} for word in ("fine", "dull")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    words = ["finetune", str(encoder_folder), "--data", str(data), "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    (row,) = [
        json.loads(line)
        for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()
    ]
    assert row["tokens"] == 2 * len(["[CLS]", "the", "film", "is", "fine", "[SEP]"])


def test_seconds_are_those_of_the_complete_command(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    from qalora_compile.api.finetune_job import Job

    answer = Job.answer

    def slowly(job: Job) -> list[str]:
        time.sleep(1.1)
        return answer(job)

    monkeypatch.setattr(Job, "answer", slowly)
    started = time.monotonic()
    words = ["finetune", str(model_folder), "--data", str(data_file), "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    taken = time.monotonic() - started
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "│ seconds" in line]
    assert 2.2 <= int(row.split("│")[2]) + 0.5 <= taken + 1
