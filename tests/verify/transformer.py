"""Small transformers, exported for every target, whose faults `mutations` generates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

import qalora_compile as qc
from qalora_compile.errors import QaloraError
from qalora_compile.verify import compare_structure
from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.graphs.read_fx import program_graph
from qalora_compile.verify.proof.match_structure import PROVED
from qalora_compile.verify.proof.prove import prove_site
from tests.models import HIDDEN, VOCABULARY, adapted, bert, gpt2, llama, token_ids
from tests.verify.mutations import Mutant
from tests.verify.rewrites import by_tools

TARGETS = ("ort", "ort-stock", "onnx")


@dataclass(frozen=True)
class Exported:
    """The program as a graph, and its exports by target."""

    program: qc.Program
    graph: Graph
    paths: dict[str, Path]

    def model(self, target: str) -> Any:
        """An export in memory."""
        return onnx.load(self.paths[target])

    def is_proved(self, target: str, model: Any) -> bool:
        """Whether a changed export is proved equal to the program."""
        path = self.paths[target].with_name("changed.onnx")
        onnx.save(model, path)
        try:
            found = compare_structure(self.graph, path)
        except QaloraError:  # the file is refused
            return False
        return found.same and all(prove_site(pair).status == PROVED for pair in found.pairs)


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=16)
    config.use_cache = False
    return Qwen3ForCausalLM(config).eval()


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=HIDDEN, n_layers=1, n_heads=4, hidden_dim=96
    )
    return DistilBertForSequenceClassification(config).eval()


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**_SIZES)).eval()


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
DECODERS = {"llama": llama, "gpt2": gpt2, "qwen3": _qwen3}
ENCODERS = {"bert": bert, "distilbert": _distilbert, "roberta": _roberta}


def export_transformer(folder: Path, name: str = "llama") -> Exported:
    """Make one, a decoder with its cache, in folders by target."""
    torch.manual_seed(0)
    model = (DECODERS | ENCODERS)[name]()
    ids = token_ids(2, 16)
    if name in DECODERS:
        program = qc.add_kv_cache(qc.fold_adapters(adapted(model, (ids,))), model)
    else:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        program = qc.quantize_groups(qc.capture_model(model, (), given), qc.QuantSpec())
    paths = {}
    for target in TARGETS:
        paths[target] = folder / target / "model.onnx"
        paths[target].parent.mkdir(parents=True)
        qc.export_model(program, paths[target], qc.ExportSpec(target=target))
    return Exported(program, program_graph(program), paths)


def judged_tools(exported: Exported, target: str) -> dict[str, bool]:
    """Whether each rewrite of an export by a tool is proved equal."""
    found = by_tools(exported.paths[target])
    return {f"{target}: {name}": exported.is_proved(target, made) for name, made in found}


def judged(
    exported: Exported,
    target: str,
    changes: Callable[[Any], Iterator[Mutant]],
    every: int = 1,
    first: int = 0,
) -> dict[str, bool]:
    """Whether each change of an export, or every so many-th from `first` on, is proved equal."""
    chosen = itertools.islice(changes(exported.model(target)), first, None, every)
    return {f"{target}: {name}": exported.is_proved(target, made) for name, made in chosen}
