"""The model card of an edge folder: what it says, safely, and that its code runs."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.api.card_clients import client_sections, traits_of
from qalora_compile.api.card_text import is_unedited, sealed, words
from qalora_compile.api.edge import read_edge_record
from qalora_compile.api.model_card import add_findings, base_facts, card_text, read_findings
from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError
from qalora_compile.verify import Certificate, check_certificate
from tests import forked
from tests.cli.tiny import WORDS
from tests.models import slow

Capture = pytest.CaptureFixture[str]
yaml: Any = pytest.importorskip("yaml", reason="PyYAML, of transformers, is not installed")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> Path:
    """A run with a license and a chat template, folded and exported."""
    root = tmp_path_factory.mktemp("card")
    shutil.copytree(model_folder, root / "base")
    (root / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n", "utf-8")
    (root / "base" / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    run = ["finetune", str(root / "base"), "--data", str(data_file), "--steps", "2"]
    assert main([*run, "--rank", "2", "--seq-len", "16", "--out", str(root / "run")]) == 0
    assert main(["fold", str(root / "run"), "--out", str(root / "folded")]) == 0
    assert main(["export", str(root / "folded"), "--out", str(root / "edge")]) == 0
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own."""
    for name in ("folded", "edge"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def card(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


def head(text: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return value


def block(text: str, client: str) -> str:
    """The code for a client."""
    found = re.search(rf"### {re.escape(client)}\n\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found is not None, client
    return found[1]


@pytest.mark.slow
def test_the_card_says_what_the_model_is(made: Path, data_file: Path) -> None:
    text = card(made / "edge")
    front = head(text)
    tags = {"onnx", "quantized", "qalora-compile", "qa-lora", "4-bit"}
    assert tags <= set(front.pop("tags")) <= tags | {"8-bit"}
    assert front == {
        "license": "apache-2.0",
        "library_name": "transformers.js",
        "pipeline_tag": "text-generation",
    }
    plain = text.replace("\\", "")
    digest = json.loads((made / "run" / "run.json").read_text("utf-8"))["options"]["data"]
    for part in (
        *(
            "LlamaForCausalLM",
            "| base model | base |",
            "| examples | 6 |",
            f"| SHA-256 | {digest} |",
        ),
        *("| tokens |", "| bits | 4 |", "| group size | 32 |", "| rank | 2 |", "| seed | 0 |"),
        *("| learning rate | 0.001 |", "| target | ort |", "| all files |", "onnx/model_q4.onnx"),
        *("Folding was checked on inputs", "No certificate was made yet", "| bits per weight |"),
        *("### ONNX Runtime\n", "### ONNX Runtime GenAI", "### transformers.js", "### optimum"),
    ):
        assert part in plain, part
    assert str(made) not in plain, "no path of this machine"
    assert not any(f"{word} is a" in plain for word in WORDS), "figures of the data, not their text"


def test_the_code_of_the_card_generates_what_generate_does(made: Path, capsys: Capture) -> None:
    code, edge = block(card(made / "edge"), "ONNX Runtime"), made / "edge"
    code = code.replace("The capital of France is", "red is a").replace("range(16)", "range(4)")
    ended, output, errors = forked.code(code, folder=edge).wait()
    assert ended == 0, errors[-2000:]
    assert main(["generate", str(edge), "--prompt", "red is a", "--max-new-tokens", "4"]) == 0
    own, found = capsys.readouterr().out.split(), output.split()
    new = found[found.index("a") + 1 :]
    new = new[: new.index("<end>")] if "<end>" in new else new
    assert " ".join(new) in " ".join(own)


def test_the_code_for_an_encoder_runs(encoder_folder: Path, tmp_path: Path) -> None:
    edge = tmp_path / "edge"
    given = ["--pooling", "mean", "--normalize", "--bits", "8", "--group-size", "8"]
    assert main(["quantize", str(encoder_folder), "--out", str(edge), *given]) == 0
    text = card(edge)
    assert head(text)["library_name"] == "sentence-transformers"
    assert head(text)["pipeline_tag"] == "sentence-similarity"
    assert "license" not in head(text) and "base_model" not in head(text), "unknown"
    assert "### sentence-transformers" in text and "### optimum" not in text
    code = block(text, "ONNX Runtime")
    ended, output, errors = forked.code(code, folder=edge).wait()
    assert ended == 0, errors[-2000:]
    assert "sentence_embedding (1, 32)" in output


def test_each_target_names_the_clients_that_fit_it() -> None:
    lm = {"architecture": "LlamaForCausalLM", "kv_cache": True, "genai": "yes"}
    whole = dict.fromkeys(("onnx/model_q4.onnx", "config.json", "tokenizer.json"), 1)
    openvino = dict.fromkeys(("openvino_model.xml", "config.json", "tokenizer.json"), 1)
    pair = dict.fromkeys(("onnx/encoder_model_q4.onnx", "onnx/decoder_model_q4.onnx"), 1)
    classes = {"architecture": "BertForSequenceClassification", "classes": ["a", "b"]}

    def clients(record: dict[str, Any], files: dict[str, int]) -> list[str]:
        return [name for name, _ in client_sections(traits_of(record, files))]

    every = ["ONNX Runtime", "qalora-compile", "ONNX Runtime GenAI", "transformers.js", "optimum"]
    assert clients(lm, whole) == every
    assert clients(lm, openvino) == ["OpenVINO GenAI"]
    assert clients(classes, whole) == ["ONNX Runtime", "transformers.js", "optimum"]
    t5 = {"architecture": "T5ForConditionalGeneration", "kv_cache": True}
    read = dict.fromkeys(("config.json", "tokenizer.json"), 1)
    assert clients(t5, pair) == []
    assert clients(t5, pair | read) == ["qalora-compile"]
    merged = dict.fromkeys(("onnx/encoder_model_q4.onnx", "onnx/decoder_model_merged_q4.onnx"), 1)
    everyone = ["ONNX Runtime", "qalora-compile", "transformers.js", "optimum"]
    assert clients(t5, merged | read) == everyone
    assert traits_of(t5, merged | read).library == "transformers.js"
    assert clients({}, {"onnx/model_q4.onnx": 1}) == ["ONNX Runtime"]
    assert traits_of({}, {"onnx/model_q4.onnx": 1}).task is None


HOSTILE = (
    "<script>x</script> [a](http://e) | b |\n---\nlicense: mit\n# big `c` @d www.e $f$ ![i](j)"
)


def test_foreign_words_add_no_markup(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model_q4.onnx").write_bytes(b"x")
    record = {
        "model": HOSTILE.replace("/", "_"),
        "architecture": HOSTILE,
        "base": {"license": HOSTILE, "base_model": HOSTILE, HOSTILE: HOSTILE},
        "data_figures": {HOSTILE: HOSTILE},
        "quant": {"bits": HOSTILE, "group_size": [HOSTILE]},
        "layers": {"by_width": {HOSTILE: 1}},
        "export": {"target": HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "classes": [HOSTILE],
        "verified": {"fold": {"outputs": [{"max_rel": HOSTILE}, HOSTILE, 3]}},
        "preset": {"bits_per_weight": HOSTILE},
    }
    text = card_text(tmp_path, record)
    front, _, body = text[4:].partition("\n---\n")
    value = yaml.safe_load(front)
    assert value["license"] == HOSTILE and set(value) <= {
        *("license", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags")
    }
    prose = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    for wrong in ("<script", "[a]", "![i]", "`c`", "http://", "www.", "@d"):
        assert re.search(rf"(?<!\\){re.escape(wrong)}", prose) is None, wrong
    assert [line for line in prose.splitlines() if line.startswith(("---", "license:"))] == []
    assert {line[:2] for line in prose.splitlines() if line.startswith("#")} == {"# ", "##"}
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}, "two columns"
    assert len(words("x" * 999)) == 200


@pytest.mark.slow
def test_a_card_that_a_person_wrote_is_kept(copy: Path, capsys: Capture) -> None:
    edge, again = copy / "edge", ["export", str(copy / "folded"), "--out", str(copy / "edge")]
    first = card(edge)
    assert is_unedited(first)
    assert main([*again, "--overwrite"]) == 0
    assert is_unedited(card(edge)) and not (edge / "MODEL_CARD.md").exists()
    for mine in ("# My own words\n", first.replace("quantized", "mine", 1)):
        (edge / "README.md").write_text(mine, "utf-8")
        capsys.readouterr()
        assert main([*again, "--overwrite"]) == 0
        assert card(edge) == mine
        assert is_unedited((edge / "MODEL_CARD.md").read_text("utf-8"))
        said = capsys.readouterr()
        assert "it is kept" in " ".join((said.out + said.err).split())


def test_only_the_text_that_was_sealed_is_unedited() -> None:
    assert is_unedited(sealed("a\n"))
    for text in ("", "a\n", sealed("a\n") + "b\n", sealed("a\n").replace("a", "b", 1)):
        assert not is_unedited(text)


def test_a_proof_is_written_into_the_card(copy: Path) -> None:
    models = [str(copy / "folded"), str(copy / "edge")]
    assert main(["verify", *models, "--prove", "--card"]) == 0
    plain = card(copy / "edge").replace("\\", "")
    digest = hashlib.sha256((copy / "edge" / "onnx" / "model_q4.onnx").read_bytes()).hexdigest()
    for part in (
        "**PROVED UNDER**",
        "at least one key",
        "| tokenizer | equal:",
        digest,
        "chat_template.jinja",
    ):
        assert part in plain, part
    assert "No certificate" not in plain
    speeds = [{"form": "<b>", "after it, tokens/s": "12.0"}]
    add_findings(copy / "edge", read_edge_record(copy / "edge"), speeds=speeds)
    plain = card(copy / "edge")
    assert "## Speed" in plain and "| \\<b\\> | 12.0 |" in plain and "**PROVED UNDER**" in plain
    assert read_findings(copy / "edge")["speeds"]["rows"] == [["<b>", "12.0"]]


def test_a_card_needs_a_proof_of_an_edge_folder(copy: Path) -> None:
    folded, edge = str(copy / "folded"), str(copy / "edge")
    before = card(copy / "edge")
    assert main(["verify", folded, edge, "--max-rel", "1", "--card"]) == 2
    assert main(["verify", edge, folded, "--prove", "--card"]) == 2
    assert card(copy / "edge") == before
    with pytest.raises(UserInputError, match="no edge folder"):
        add_findings(copy / "folded", {})


def change(folder: Path, name: str) -> None:
    """Change what a tokenizer's file says."""
    path = folder / name
    if name.endswith(".json"):
        value = json.loads(path.read_text("utf-8"))
        value["added"] = 1
        path.write_text(json.dumps(value), "utf-8")
    else:
        path.write_text(path.read_text("utf-8") + "!", "utf-8")


FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("name", [*slow(*FILES[:2]), FILES[2]])
def test_a_changed_tokenizer_is_found(copy: Path, name: str, capsys: Capture) -> None:
    folded, edge, path = str(copy / "folded"), str(copy / "edge"), str(copy / "equal.json")
    assert main(["verify", folded, edge, "--prove", "--certificate", path]) == 0
    _, problems = check_certificate(path)
    assert problems == []
    change(copy / "edge", name)
    assert main(["verify", "--certificate", path]) == 1
    _, problems = check_certificate(path)
    assert f"{copy / 'edge'}: the tokenizer has changed: {name}" in problems
    capsys.readouterr()
    assert main(["verify", folded, edge, "--prove", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "DIFFERENT"
    assert found["difference"].startswith("the tokenizers differ: ") and name in found["difference"]


@pytest.mark.slow
def test_a_template_that_only_one_client_reads_is_bound_too(copy: Path) -> None:
    """transformers.js reads the template in `tokenizer_config.json`."""
    settings = copy / "edge" / "tokenizer_config.json"
    value = json.loads(settings.read_text("utf-8"))
    assert value["chat_template"] == TEMPLATE
    settings.write_text(json.dumps(value, indent=1), "utf-8")
    models = [str(copy / "folded"), str(copy / "edge")]
    assert main(["verify", *models, "--prove"]) == 0, "only the layout of the JSON is another"
    settings.write_text(json.dumps(value | {"chat_template": "other"}), "utf-8")
    assert main(["verify", *models, "--prove"]) == 1


@pytest.mark.slow
def test_an_older_certificate_binds_no_tokenizer(copy: Path) -> None:
    path = copy / "equal.json"
    models = [str(copy / "folded"), str(copy / "edge")]
    assert main(["verify", *models, "--prove", "--certificate", str(path)]) == 0
    value = json.loads(path.read_text("utf-8"))
    assert value["version"] == 4
    value["version"] = 2
    for side in ("reference", "candidate"):
        assert set(value[side].pop("tokenizer")) >= set(FILES)
    path.write_text(json.dumps(value), "utf-8")
    change(copy / "edge", "tokenizer.json")
    assert check_certificate(path)[1] == []
    assert "older" in Certificate.read(path).tokenizer


@pytest.mark.parametrize("wrong", [3, {"tokenizer.json": 3}, ["a"]])
def test_a_malformed_tokenizer_in_a_certificate_is_refused(copy: Path, wrong: object) -> None:
    path = copy / "equal.json"
    models = [str(copy / "folded"), str(copy / "edge")]
    assert main(["verify", *models, "--prove", "--certificate", str(path)]) == 0
    value = json.loads(path.read_text("utf-8"))
    value["candidate"]["tokenizer"] = wrong
    path.write_text(json.dumps(value), "utf-8")
    with pytest.raises(UserInputError, match="malformed"):
        Certificate.read(path)


def test_license_and_repository_are_read_where_they_are_known(tmp_path: Path) -> None:
    cached = tmp_path / "models--org--a-model.v2" / "snapshots" / "123"
    cached.mkdir(parents=True)
    assert base_facts(str(cached)) == {"base_model": "org/a-model.v2"}
    readme = cached / "README.md"
    readme.write_text("---\nlanguage: en\nlicense: 'mit'\n---\ntext", "utf-8")
    assert base_facts(str(cached))["license"] == "mit"
    for text in ("# license: mit", "---\nlicense: [a, b]\n---", "---\nx: 1\n---\nlicense: mit\n"):
        readme.write_text(text, "utf-8")
        assert "license" not in base_facts(str(cached))
    assert base_facts("some.module:factory") == {}
