"""Files that GenAI's builder and torch.onnx made are proved, and faults planted in them are not."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qalora_compile.api.verify import VerifySpec, prove
from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.verify.proof.foreign.prove_foreign import (
    is_foreign,
    prove_foreign,
    read_foreign,
)
from tests.models import COMPLETE, VOCABULARY, bert, llama, token_ids

MASK = "all elements of attention_mask are 1: the file reads only how many there are"
BUILDER = "onnxruntime_genai.models.builder"
HALVES = [("fp32", 1, 0), ("int4", 1, 0)] if COMPLETE else [("fp32", 2, 0), ("int4", 2, 1)]
"""Each file with every second fault; most that are left out of one are in the other."""


def _saved(model: Any, folder: Path) -> Path:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases that are all equal could be exchanged
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name.lower()), std=0.1)
    model.save_pretrained(folder)
    words = models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w3")
    tokenizer.save_pretrained(folder)
    return folder


pytestmark = pytest.mark.slow  # models are exported by other programs first


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, and what the builder makes of it, in float and in 4 bits."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("decoder")
    _saved(llama(), folder / "model")
    for precision in ("fp32", "int4"):
        made = folder / precision
        command: list[str | Path] = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "onnxruntime_genai.models.builder",
        ]
        command += ["-i", folder / "model", "-o", made, "-c", folder / "cache"]
        subprocess.run([*command, "-p", precision, "-e", "cpu"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def program(decoder: Path) -> Program:
    """The model as captured, with its cache."""
    from qalora_compile.api.forms import add_kv_cache
    from qalora_compile.capture.load_source import load_source

    captured = load_source(str(decoder / "model")).capture()
    return add_kv_cache(captured, decoder / "model")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_what_the_builder_made_is_proved(precision: str, decoder: Path) -> None:
    certificate = prove(VerifySpec(a=str(decoder / "model"), b=str(decoder / precision)))
    assert certificate.verdict == "PROVED UNDER", certificate
    assert MASK in certificate.conditions
    codes = [text for text in certificate.conditions if "the file's codes" in text]
    assert len(codes) == (precision == "int4")
    assert (certificate.max_abs > 0) == (precision == "int4")


def _attributes(model: Any) -> Iterator[tuple[str, Any]]:
    changed = {
        "GroupQueryAttention": {
            "scale": 0.5,
            "softcap": 5.0,
            "do_rotary": 0,
            "rotary_interleaved": 1,
            "local_window_size": 3,
            "smooth_softmax": 1,
        },
        "SkipSimplifiedLayerNormalization": {"epsilon": 1e-3},
        "SimplifiedLayerNormalization": {"epsilon": 1e-3},
    }
    for place, node in enumerate(model.graph.node):
        for name, value in changed.get(node.op_type, {}).items():
            made = copy.deepcopy(model)
            there = made.graph.node[place].attribute
            for old in [a for a in there if a.name == name]:
                there.remove(old)
            there.append(helper.make_attribute(name, value))
            yield f"{name} of {node.name} is {value}", made


def _operands(model: Any) -> Iterator[tuple[str, Any]]:
    swaps = {"GroupQueryAttention": [(3, 4), (7, 8)], "SkipSimplifiedLayerNormalization": [(1, 2)]}
    for place, node in enumerate(model.graph.node):
        for one, other in swaps.get(node.op_type, []):
            made = copy.deepcopy(model)
            read = made.graph.node[place].input
            read[one], read[other] = read[other], read[one]
            yield f"operands {one} and {other} of {node.name}", made
        if node.op_type in ("Sigmoid", "Sub", "Mul"):
            made = copy.deepcopy(model)
            made.graph.node[place].op_type = {"Sigmoid": "Tanh", "Sub": "Add", "Mul": "Add"}[
                node.op_type
            ]
            yield f"{node.name} is another operator", made


def _constants(model: Any) -> Iterator[tuple[str, Any]]:
    for place, proto in enumerate(model.graph.initializer):
        values = numpy_helper.to_array(proto).copy()
        made = copy.deepcopy(model)
        if values.dtype.kind == "f":
            values.reshape(-1)[-1:] += np.float32(0.01)
        elif values.dtype == np.uint8:
            values.reshape(len(values), -1)[1:2] ^= np.uint8(0xFF)
        else:
            values.reshape(-1)[:1] += 1
        made.graph.initializer[place].CopyFrom(numpy_helper.from_array(values, proto.name))
        yield f"the constant {proto.name} is another", made


def _proved(program: Program, decoder: Path, model: Any) -> bool:
    path = decoder / "changed.onnx"
    onnx.save(model, path)
    try:
        return prove_foreign(program, read_foreign(path), decoder / "model").passed
    except UserInputError:  # the file is refused
        return False


@pytest.mark.parametrize(("precision", "every", "first"), HALVES)
@pytest.mark.parametrize("faults", [_attributes, _operands, _constants])
def test_no_fault_of_such_a_file_is_proved(
    faults: Callable[[Any], Iterator[tuple[str, Any]]],
    precision: str,
    every: int,
    first: int,
    decoder: Path,
    program: Program,
) -> None:
    model = onnx.load(decoder / precision / "model.onnx")
    made = list(faults(model))
    if every == 2:  # the second layer has the faults of the first
        made = list({name.replace(".1", ".0"): (name, fault) for name, fault in made}.values())
    made = made[first::every]
    assert made and _proved(program, decoder, model)
    assert [name for name, changed in made if _proved(program, decoder, changed)] == []


def test_an_encoder_of_torch_is_proved_and_matched_by_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert()
    setattr(model.config, "return_dict", False)  # noqa: B010, of any model's configuration
    folder = _saved(model, tmp_path / "model")
    given = {"input_ids": token_ids(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (),
        path,
        kwargs=given,
        dynamo=True,
        dynamic_shapes=dict.fromkeys(given, axes),
        verbose=False,
    )
    certificate = prove(VerifySpec(a=str(folder), b=str(path)))
    assert certificate.verdict == "PROVED UNDER", certificate
    assert "outputs are matched by their order" in certificate.notes[-1]
    assert main(["verify", str(folder), str(path), "--prove"]) == 0
    made = onnx.load(path)
    weights = [t for t in made.graph.initializer if len(t.dims) == 2]
    values = numpy_helper.to_array(weights[-1]).copy()
    values[0, 0] = np.nextafter(values[0, 0], np.float32(9))
    weights[-1].CopyFrom(numpy_helper.from_array(values, weights[-1].name))
    onnx.save(made, path)
    assert not prove(VerifySpec(a=str(folder), b=str(path))).passed


def test_other_inputs_and_layouts_are_refused(decoder: Path, program: Program) -> None:
    model = onnx.load(decoder / "fp32" / "model.onnx")
    past = next(i for i in model.graph.input if "past" in i.name)
    dims = past.type.tensor_type.shape.dim
    first, second = copy.deepcopy(dims[1]), copy.deepcopy(dims[3])
    dims[1].CopyFrom(second)
    dims[3].CopyFrom(first)
    path = decoder / "changed.onnx"
    onnx.save(model, path)
    assert is_foreign(path)
    with pytest.raises(UserInputError, match="has the shape"):
        prove_foreign(program, read_foreign(path), decoder / "model")
    model.graph.input.append(helper.make_tensor_value_info("speaker", 1, [1]))
    onnx.save(model, path)
    with pytest.raises(UserInputError, match="has inputs speaker"):
        prove_foreign(program, read_foreign(path), decoder / "model")
    with pytest.raises(UserInputError, match="no model's folder"):
        prove(VerifySpec(a=str(path), b=str(path)))
