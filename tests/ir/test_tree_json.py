"""Trees of containers: what survives, and that reading one imports and calls nothing."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.clip.modeling_clip import CLIPOutput

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.tree_json import tree_from_text, tree_to_text

X = torch.zeros(1)
LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


@dataclass
class Answer:
    """A user's own result."""

    scores: Tensor
    hidden: Tensor | None = None


pytree.register_dataclass(Answer, serialized_type_name="tests.ir.Answer")

VALUES: dict[str, Any] = {
    "a tensor": X,
    "arguments": ((X, X), {"a": X, "b": [X, (X,)]}),
    "numbers for keys": {1: X, 0: X},
    "an ordered dict": OrderedDict(b=X, a=X),
    "a model output": CausalLMOutputWithPast(logits=X),
    "an output of one model": CLIPOutput(logits_per_image=X, text_embeds=X),
    "a registered dataclass": {"answer": Answer(X)},
    "nothing": (),
}


@pytest.mark.parametrize("kind", VALUES)
def test_trees_survive(kind: str) -> None:
    leaves, spec = pytree.tree_flatten(VALUES[kind])
    again = tree_from_text(tree_to_text(spec))
    assert again == spec
    assert type(pytree.tree_unflatten(leaves, again)) is type(VALUES[kind])


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize("value", [defaultdict(lambda: X, a=X), Pair(X, X), {(1, 2): X}])
def test_other_containers_are_refused_when_they_are_written(value: Any) -> None:
    with pytest.raises(UnsupportedError, match="no stored form"):
        tree_to_text(pytree.tree_structure(value))


def tree(kind: str, context: Any, *children: Any) -> str:
    """The text of a tree with a context of any value."""
    row = {"type": kind, "context": json.dumps(context), "children_spec": list(children)}
    return json.dumps([1, row])


MALFORMED: dict[str, str] = {
    "an enum for a key": tree("builtins.dict", [{"__enum__": True, "fqn": "evil:E"}], LEAF),
    "a default factory": tree("collections.defaultdict", ["evil:f", ["a"]], LEAF),
    "a named tuple": tree("collections.namedtuple", "evil.Pair", LEAF),
    "a class of another module": tree("evil.Class", [["a"], []], LEAF),
    "no output of transformers": tree("transformers.modeling_outputs.dataclass", ["a"], LEAF),
    "a module that only looks like it": tree("transformers.models.evil.modeling_evil.X", [], LEAF),
    "the base of all outputs": tree("transformers.modeling_outputs.ModelOutput", ["a"], LEAF),
    "an unknown field": tree(
        "transformers.modeling_outputs.CausalLMOutputWithPast", ["__class__"], LEAF
    ),
    "a field that the class lacks": tree("tests.ir.Answer", [["nothing"], []], LEAF),
    "a key twice": tree("builtins.dict", ["a", "a"], LEAF, LEAF),
    "keys without values": tree("builtins.dict", ["a", "b"], LEAF),
    "a tuple with a context": tree("builtins.tuple", ["a"], LEAF),
    "another version": json.dumps([2, LEAF]),
    "no tree": "[]",
    "no JSON": "(",
    "a leaf with children": json.dumps([1, LEAF | {"children_spec": [LEAF]}]),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_or_hostile_tree_is_refused_and_imports_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises((UserInputError, UnsupportedError, ValueError, TypeError, KeyError)):
        tree_from_text(MALFORMED[kind])
    assert "evil" not in sys.modules
    assert not marker.exists()
