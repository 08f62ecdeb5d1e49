"""The command line from end to end on a tiny model, and what it says about bad input."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from qalora_compile.cli.commands import COMMANDS
from qalora_compile.cli.main import main
from qalora_compile.ir.safetensors_io import load_tensors
from qalora_compile.runtime import kernel_level, library_path
from qalora_compile.training.records.checkpoint import list_checkpoints
from qalora_compile.untrusted.artifacts import model_file
from tests import forked
from tests.verify.numeric.test_decoding_calls import FAULTS, planted

Capture = pytest.CaptureFixture[str]

TRAIN = ["--steps", "160", "--lr", "1e-2", "--rank", "8", "--alpha", "16", "--batch-size", "6"]


@pytest.fixture(scope="module")
def workspace(
    model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished way through: run, folded, edge."""
    root = tmp_path_factory.mktemp("work")
    out = ["--out", str(root / "run")]
    held_out = ["--eval-data", str(data_file)]
    assert (
        main(["finetune", str(model_folder), "--data", str(data_file), *held_out, *out, *TRAIN])
        == 0
    )
    assert main(["fold", str(root / "run"), "--out", str(root / "folded")]) == 0
    assert main(["export", str(root / "folded"), "--out", str(root / "edge")]) == 0
    return root


def test_training_learned_the_task(workspace: Path) -> None:
    record = json.loads((workspace / "run" / "run.json").read_text("utf-8"))
    assert record["status"] == "finished"
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    assert after["loss"] < 0.2 * before["loss"]
    assert after["exact_match"] == 1.0


def test_the_folders_hold_what_the_design_says(workspace: Path) -> None:
    names = {f.name for f in (workspace / "run").iterdir()}
    assert {"run.json", "quantized.safetensors", "adapters.safetensors", "checkpoints"} <= names
    folded = {f.name for f in (workspace / "folded").iterdir()}
    assert "quantized.safetensors" in folded
    assert "adapters.safetensors" not in folded
    edge = workspace / "edge"
    found = {f.relative_to(edge).as_posix() for f in edge.rglob("*") if f.is_file()}
    assert {"onnx/model_q4.onnx", "tokenizer.json", "config.json", "genai_config.json"} <= found


@pytest.mark.parametrize(("a", "b"), [("run", "folded"), ("folded", "edge"), ("edge", "folded")])
def test_verify_finds_them_equal(workspace: Path, a: str, b: str) -> None:
    paths = [str(workspace / a), str(workspace / b)]
    # So high a rate makes offsets eight times as large, and what is rounded with them.
    assert main(["verify", *paths, "--max-rel", "5e-4"]) == 0


def test_verify_finds_a_difference(workspace: Path, capsys: Capture) -> None:
    paths = [str(workspace / "run"), str(workspace / "folded")]
    assert main(["verify", *paths, "--max-abs", "0", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "DIFFERENT"
    assert report["first_divergence"].startswith("model.layers.0")


def test_verify_runs_the_steps_of_devices_with_the_library_and_without(
    workspace: Path, tmp_path: Path, capsys: Capture
) -> None:
    folded, words = str(workspace / "folded"), ["--max-rel", "5e-4", "--inputs", "1"]
    assert main(["verify", folded, str(workspace / "edge"), *words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["inputs"] == 3, "one random sequence, a long one, and two rows with padding"
    if kernel_level() is not None:
        assert library_path().name in report["with_library"]["candidate"]
        assert report["with_library"]["verdict"] == "EQUAL"
    shutil.copytree(workspace / "edge", tmp_path / "edge")
    faulty = planted(model_file(tmp_path / "edge"), FAULTS["one token of the second row"])
    assert main(["verify", folded, str(faulty), *words]) == 1


def test_verify_says_when_it_cannot_compare(workspace: Path, capsys: Capture) -> None:
    edge = str(workspace / "edge")
    assert main(["verify", edge, edge, "--max-abs", "1"]) == 2
    assert main(["verify", str(workspace / "run"), edge]) == 2
    assert "no tolerance" in capsys.readouterr().err


def test_verify_proves_and_checks_its_certificate(
    workspace: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, folded, edge = (str(workspace / name) for name in ("run", "folded", "edge"))
    assert main(["verify", run, folded, "--prove", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["proved"], len(found["sites"])) == ("PROVED", True, 15)
    path = str(tmp_path / "equal.json")
    assert main(["verify", folded, edge, "--prove", "--certificate", path]) == 0
    shown = capsys.readouterr().out
    assert "PROVED UNDER" in shown and "condition: axis 1 of attention_mask" in shown
    assert main(["verify", "--certificate", path]) == 0
    assert "holds" in capsys.readouterr().out
    assert main(["verify", folded, edge, "--certificate", path]) == 2
    assert main(["verify", folded]) == 2
    assert main(["verify", folded, str(tmp_path), "--prove"]) == 2
    assert "neither a program folder" in capsys.readouterr().err


def test_verify_names_what_a_proof_finds(workspace: Path, tmp_path: Path, capsys: Capture) -> None:
    broken = tmp_path / "model.onnx"
    model = onnx.load(model_file(workspace / "edge"))
    name = "model.layers.1.mlp.gate_proj.joined.scale"  # and those of up_proj below
    proto = next(t for t in model.graph.initializer if t.name == name)
    scale = onnx.numpy_helper.to_array(proto).copy()
    scale[len(scale) // 2 :] *= np.float32(1.001)
    proto.raw_data = scale.tobytes()
    onnx.save(model, broken)
    words = ["verify", str(workspace / "folded"), str(broken), "--prove"]
    assert main(words) == 1
    assert "model.layers.1.mlp.up_proj: weights differ" in capsys.readouterr().out


def test_inspect_lists_every_layer(workspace: Path, capsys: Capture) -> None:
    assert main(["inspect", str(workspace / "folded"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["path"]: row for row in found["layers"]}
    assert rows["model.layers.0.mlp.up_proj"]["bits"] == 4
    assert rows["model.embed_tokens"]["decision"] == "keep"
    assert all(row["reason"] for row in rows.values())
    assert found["totals"]["layers to quantize"] == 15
    assert main(["inspect", str(workspace / "edge"), "--layers"]) == 0
    assert "model.layers.1.self_attn.q_proj" in capsys.readouterr().out


def test_generate_continues_as_it_was_trained(workspace: Path, capsys: Capture) -> None:
    for word, kind in (("red", "colour"), ("two", "number")):
        prompt = ["--prompt", f"{word} is a", "--max-new-tokens", "4"]
        assert main(["generate", str(workspace / "edge"), *prompt]) == 0
        assert capsys.readouterr().out.splitlines()[0].strip() == kind


def test_every_end_token_ends_an_answer(workspace: Path, tmp_path: Path, capsys: Capture) -> None:
    folded, out = tmp_path / "folded", tmp_path / "edge"
    shutil.copytree(workspace / "folded", folded)
    settings = folded / "model" / "generation_config.json"
    value = json.loads(settings.read_text("utf-8")) | {"eos_token_id": [1, 11]}  # <end>, number
    settings.write_text(json.dumps(value), "utf-8")
    assert main(["export", str(folded), "--out", str(out)]) == 0
    capsys.readouterr()
    for word, answer in (("red", "colour"), ("two", "")):
        assert main(["generate", str(out), "--prompt", f"{word} is a"]) == 0
        assert capsys.readouterr().out.splitlines()[0].strip() == answer


def test_the_edge_folder_says_what_it_holds(workspace: Path) -> None:
    record = json.loads((workspace / "edge" / "qalora.json").read_text("utf-8"))
    assert record["format"] == "qalora-edge"
    assert record["architecture"] == "LlamaForCausalLM"
    assert (record["kv_cache"], record["genai"], record["context_length"]) == (True, "yes", 64)
    assert record["layers"]["by_width"] == {"4 bits": record["layers"]["quantized"]}
    assert record["verified"]["fold"]["verdict"] == "EQUAL"
    assert record["export"]["fusion"] == "standard"
    config = json.loads((workspace / "edge" / "genai_config.json").read_text("utf-8"))
    assert config["model"]["type"] == "llama"
    assert config["model"]["eos_token_id"] == 1


def test_genai_runs_the_folder_as_it_is(workspace: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(workspace / "edge"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=5)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([[2, 8, 9]], dtype=np.int32))  # red is a
    generator.generate_next_token()
    assert int(generator.get_sequence(0)[3]) == 10  # colour


def test_the_folder_can_carry_the_library(workspace: Path, tmp_path: Path, capsys: Capture) -> None:
    folded, library = str(workspace / "folded"), tmp_path / "libqalora_ort.so"
    library.write_bytes(b"stands for a library of another machine")
    out = tmp_path / "edge"
    words = ["export", folded, "--out", str(out)]
    assert main([*words, "--with-library", str(library)]) == 0
    config = json.loads((out / "genai_config.json").read_text("utf-8"))
    options = config["model"]["decoder"]["session_options"]
    assert options["custom_ops_library"] == "libqalora_ort.so"
    assert (out / "libqalora_ort.so").read_bytes() == library.read_bytes()
    again = ["export", folded, "--out", str(tmp_path / "other")]
    assert main([*again, "--with-library", str(tmp_path / "none.so")]) == 2
    assert main([*again, "--with-library", str(library), "--target", "onnx"]) == 2
    assert not (tmp_path / "other").exists()
    assert "there is no library" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_in_a_second_file_are_said_to_transformers_js(
    workspace: Path, tmp_path: Path
) -> None:
    folded, out = str(workspace / "folded"), tmp_path / "edge"
    assert main(["export", folded, "--out", str(out), "--external-data"]) == 0
    assert {f.name for f in (out / "onnx").iterdir()} == {"model_q4.onnx", "model_q4.onnx_data"}
    record = json.loads((out / "qalora.json").read_text("utf-8"))
    assert record["files"] == ["onnx/model_q4.onnx", "onnx/model_q4.onnx_data"]
    stated = [
        json.loads((folder / "config.json").read_text("utf-8"))["transformers.js_config"]
        for folder in (out, workspace / "edge")
    ]
    assert stated == [
        {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}},
        {"dtype": "q4", "use_external_data_format": False},
    ]
    assert main(["verify", folded, str(out), "--max-rel", "5e-4", "--inputs", "1"]) == 0


@pytest.mark.slow
def test_without_a_cache_and_without_a_tokenizer(
    workspace: Path, tmp_path: Path, capsys: Capture
) -> None:
    folded = tmp_path / "folded"
    shutil.copytree(workspace / "folded", folded)
    shutil.rmtree(folded / "tokenizer")
    out = tmp_path / "edge"
    assert main(["export", str(folded), "--out", str(out), "--no-kv-cache"]) == 0
    names = {"README.md", "config.json", "generation_config.json", "onnx", "qalora.json"}
    assert {f.name for f in out.iterdir()} == names
    assert [f.name for f in (out / "onnx").iterdir()] == ["model_q4.onnx"]
    assert main(["verify", str(folded), str(out), "--max-rel", "1e-4"]) == 0
    assert main(["generate", str(out), "--prompt", "red"]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_a_context_that_is_too_long_is_refused(workspace: Path, capsys: Capture) -> None:
    edge = str(workspace / "edge")
    assert main(["generate", edge, "--prompt", "red is a", "--max-new-tokens", "62"]) == 2
    assert "more than the 64" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_measures_every_form(workspace: Path, capsys: Capture) -> None:
    sizes = ["--prompts", "4", "8", "--decode", "3", "--rounds", "2", "--threads", "1"]
    run = ["--run", str(workspace / "run")]
    assert main(["bench", str(workspace / "edge"), *run, *sizes, "--json"]) == 0
    results = {row["form"]: row for row in json.loads(capsys.readouterr().out)}
    wanted = {"merged, stock kernels", "adapters unmerged, stock kernels", "float32"}
    assert wanted <= set(results)
    for row in results.values():
        assert set(row["prompts"]) == {"4", "8"}
        assert min(*row["prompts"].values(), row["decode"], row["first_token"]) > 0
        assert row["size"] > 50_000
        assert row["memory"] > 1_000_000
    assert not list(workspace.glob(".bench.*")), "the forms made for it are gone"
    edge = str(workspace / "edge")
    assert main(["bench", edge]) == 2  # 512 tokens are more than its context
    assert main(["bench", edge, *sizes, "--run", str(workspace / "folded")]) == 2
    assert "with adapters" in capsys.readouterr().err


def test_doctor_knows_its_libraries(capsys: Capture) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"].startswith("2.")
    assert facts["kernels, target ort-stock"] == "MatMulNBits, 4 bits: works"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: Capture) -> None:
    assert main([command, "--help"]) == 0
    assert f"qalora-compile {command}" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.slow
def test_a_factory_trains_on_token_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "from tests.models import llama\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return llama(), (torch.randint(0, 128, (2, 8)),), {}\n",
        "utf-8",
    )
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3, 4]}\n', "utf-8")
    monkeypatch.chdir(tmp_path)
    command = ["finetune", "my_models:build", "--data", "ids.jsonl", "--out", "run", "--steps", "2"]
    assert main([*command, "--bits", "3", "--group-size", "24"]) == 0
    assert main(["export", "run", "--out", "edge", "--allow-unfolded"]) == 0
    assert main(["verify", "run", "edge", "--max-rel", "1e-4"]) == 0
    capsys.readouterr()
    assert main(["inspect", "run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert {row["bits"] for row in rows if row["decision"] == "quantize"} == {3}


@pytest.mark.slow
def test_bits_ranks_and_start_are_chosen_by_the_data(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Mixed bits and ranks through finetune, fold, export with a cache, verify and inspect."""
    run, folded, edge = (str(tmp_path / name) for name in ("run", "folded", "edge"))
    command = ["finetune", str(model_folder), "--data", str(data_file), "--out", run]
    command += ["--bits", "auto", "--budget", "3.2", "--group-size", "16", "--init", "svd"]
    command += ["--rank", "auto", "--rank-budget", "6000", "--steps", "2"]
    assert main([*command, "--calibration-samples", "4"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert (record["quant"]["bits"], record["adapter"]["rank"]) == ("auto", "auto")
    assert main(["fold", run, "--out", folded]) == 0
    assert main(["export", folded, "--out", edge]) == 0
    assert main(["verify", folded, edge, "--max-rel", "1e-4"]) == 0
    capsys.readouterr()
    chosen = []
    for path, words in ((run, ("of the loss", "ranks correct")), (folded, ("of the loss",))):
        assert main(["inspect", path, "--json"]) == 0
        rows = [
            row
            for row in json.loads(capsys.readouterr().out)["layers"]
            if row["decision"] == "quantize"
        ]
        assert all(word in row["why"] for row in rows for word in words)
        chosen.append([row["bits"] for row in rows])
    assert len(set(chosen[0])) > 1
    assert chosen[0] == chosen[1]
    assert main(["inspect", edge, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert [row["bits"] for row in rows if row["decision"] == "quantize"] == chosen[0]
    assert main(["inspect", run, "--group"]) == 0
    assert main(["inspect", run, "--layers"]) == 0
    assert "why" in capsys.readouterr().out


BAD_COMMANDS = {
    "fold before finetune": (["fold", "{model}", "--out", "{new}"], "not written by finetune"),
    "fold twice": (["fold", "{root}/folded", "--out", "{new}"], "folded already"),
    "export before fold": (["export", "{root}/run", "--out", "{new}"], "fold RUN"),
    "unknown target": (["export", "{root}/folded", "--out", "{new}", "--target", "x"], "ort-stock"),
    "existing output": (["fold", "{root}/run", "--out", "{root}/edge"], "--overwrite"),
    "no such model": (["finetune", "nothing", "--data", "{data}", "--out", "{new}"], "no model"),
    "no data": (["finetune", "{model}", "--data", "none.jsonl", "--out", "{new}"], "cannot read"),
    "pattern without a match": (
        ["finetune", "{model}", "--data", "{data}", "--out", "{new}", "--exclude", "q_porj"],
        "q_proj",
    ),
    "group size": (
        ["finetune", "{model}", "--data", "{data}", "--out", "{new}", "--group-size", "0"],
        "--group-size is 0",
    ),
    "budget": (
        [
            "finetune",
            "{model}",
            "--data",
            "{data}",
            "--out",
            "{new}",
            "--bits",
            "auto",
            "--budget",
            "1.5",
        ],
        "the least is 2 bits",
    ),
    "rank budget": (
        [
            "finetune",
            "{model}",
            "--data",
            "{data}",
            "--out",
            "{new}",
            "--rank",
            "auto",
            "--rank-budget",
            "9",
        ],
        "the least is",
    ),
    "auto without a budget": (
        ["finetune", "{model}", "--data", "{data}", "--out", "{new}", "--bits", "auto"],
        "takes a budget",
    ),
    "no calibration": (
        [
            "finetune",
            "{model}",
            "--data",
            "{data}",
            "--out",
            "{new}",
            "--init",
            "svd",
            "--calibration-samples",
            "0",
        ],
        "use 1 or more",
    ),
    "no tokenizer": (["generate", "{root}/folded", "--prompt", "x"], "no file"),
}


@pytest.mark.parametrize("kind", BAD_COMMANDS)
def test_bad_input_is_explained_and_writes_nothing(
    kind: str, workspace: Path, model_folder: Path, data_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    words, expected = BAD_COMMANDS[kind]
    new = tmp_path / "new"
    before = sorted(f.name for f in workspace.iterdir())
    filled = [w.format(root=workspace, model=model_folder, data=data_file, new=new) for w in words]
    assert main(filled) == 2
    message = capsys.readouterr().err
    assert "error:" in message
    assert expected in message
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []
    assert sorted(f.name for f in workspace.iterdir()) == before


def test_models_and_tokens_that_cannot_train_are_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "two_models.py").write_text(
        "import torch\n"
        "from tests.models import OneLinear, gpt2\n"
        "def regressor():\n"
        "    return OneLinear(8, 4), (torch.randn(2, 8),), {}\n"
        "def decoder():\n"
        "    return gpt2(), (torch.randint(0, 128, (2, 8)),), {}\n",
        "utf-8",
    )
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 128]}\n', "utf-8")
    monkeypatch.chdir(tmp_path)
    cases = {
        "decoder": "token 128; the model knows 0 to 127",
        "regressor": "gives no logits",
    }
    for name, expected in cases.items():
        command = ["finetune", f"two_models:{name}", "--data", "ids.jsonl", "--out", "run"]
        assert main(command) == 2
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [[], ["nonsense"], ["fold"], ["finetune", "m", "--bits", "5"]])
def test_bad_usage_exits_with_2(words: list[str]) -> None:
    assert main(words) == 2


def test_a_run_with_truncated_tensors_is_refused(
    workspace: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(workspace / "run", run)
    tensors = run / "quantized.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1000])
    assert main(["fold", str(run), "--out", str(tmp_path / "folded")]) == 2
    assert "truncated" in capsys.readouterr().err
    assert not (tmp_path / "folded").exists()


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_ends_bit_for_bit_alike(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    steps = 150
    command = ["finetune", str(model_folder), "--data", str(data_file)]
    command += ["--steps", str(steps), "--lr", "1e-2", "--save-every", "5"]
    whole, cut = ([*command, "--out", str(tmp_path / name)] for name in ("whole", "cut"))
    assert forked.command(whole).wait()[0] == 0
    child = forked.command(cut)
    while not list_checkpoints(tmp_path / "cut" / "checkpoints"):
        assert child.running(), "it ended before its first checkpoint"
        time.sleep(0.02)
    child.send(signal.SIGINT)
    assert child.wait()[0] == 130
    record = json.loads((tmp_path / "cut" / "run.json").read_text("utf-8"))
    assert record["status"] == "interrupted"
    assert 0 < record["step"] < steps
    assert forked.command([*cut, "--resume"]).wait()[0] == 0
    ends = [load_tensors(tmp_path / name / "adapters.safetensors") for name in ("whole", "cut")]
    assert ends[0].keys() == ends[1].keys()
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])
