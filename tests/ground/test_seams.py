"""Private names of torch and transformers are in their seams, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import test_newest
from tests.ground.private_names import private_names

PACKAGE = Path(__file__).parents[2] / "qalora_compile"
SEAMS = {"ir/torch_internals.py": "torch", "capture/transformers_internals.py": "transformers"}
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if str(p.relative_to(PACKAGE)) not in SEAMS]


def test_private_names_are_in_the_seams() -> None:
    uses = {str(p.relative_to(PACKAGE)): private_names(p.read_text("utf-8")) for p in FILES}
    assert {name: list(map(str, found)) for name, found in uses.items() if found} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from torch.utils import _pytree as pytree", "torch.utils._pytree"),
        ("import torch._dynamo.source", "torch._dynamo.source"),
        ("def f():\n    from torch._ops import OpOverload", "torch._ops.OpOverload"),
        (
            "from torch.fx.experimental.symbolic_shapes import ShapeEnv",
            "torch.fx.experimental.symbolic_shapes.ShapeEnv",
        ),
        ("import torch\nx = torch._C.get()", "torch._C"),
        ("from torch import fx\nx = fx.graph._PyTreeCodeGen", "torch.fx.graph._PyTreeCodeGen"),
        ("def f(graph):\n    return graph._codegen.pytree_info", "?._codegen"),
        ("def f(x):\n    return x.storage()._cdata", "?._cdata"),
        ("class A:\n    def f(self):\n        return self.node._erased", "?._erased"),
        ("def f(x):\n    return getattr(x, '_schema', None)", "?._schema"),
        ("def f(x):\n    return [*x._modules]", "?._modules"),
        ("from torch import nn\nclass A(nn.Module):\n    def _apply(self): ...", "A._apply"),
        (
            "from torch import nn\nclass A(nn.Module):\n    f = lambda self: self._buffers",
            "A._buffers",
        ),
        ("import transformers\nx = transformers.x._y", "transformers.x._y"),
        ("def f(model):\n    return model._get_dtype_plan(None)", "?._get_dtype_plan"),
        ("def f(caches):\n    return caches.DynamicLayer()", "?.DynamicLayer"),
        (
            "x = require('transformers.modeling_gguf_pytorch_utils', extra='hf', purpose='')",
            "transformers.modeling_gguf_pytorch_utils",
        ),
        (
            "def f():\n    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS",
            "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS",
        ),
        ("import os\nos.environ['HF_DEACTIVATE_ASYNC_LOAD'] = '1'", "HF_DEACTIVATE_ASYNC_LOAD"),
        ("from peft.tuners import _buffer_dict", "peft.tuners._buffer_dict"),
    ],
)
def test_a_private_name_is_found(source: str, found: str) -> None:
    assert [use.name for use in private_names(source)] == [found]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nx = torch.nn.Module.__init__",
        "def f(info):\n    return info._replace(a=1)",
        "class A:\n    def __init__(self):\n        self._x = 1\ndef f(a):\n    return a._x",
        "class A:\n    def f(self):\n        return self._whatever",
        "import argparse\ndef f(p: argparse._ActionsContainer): ...",
        "from torch import nn\nclass A(nn.Module):\n    def _own(self):\n        self._size = 1",
        "from qalora_compile.ir.torch_internals import pytree\npytree.tree_map",
        "def f(rope):\n    return rope['rope_type']",
    ],
)
def test_what_is_not_private_is_passed_over(source: str) -> None:
    assert private_names(source) == []


def test_the_newest_releases_are_tried_on_tests_that_exist() -> None:
    for name in (*test_newest.SEAM_TESTS, *test_newest.ROAD_TESTS):
        assert (test_newest.ROOT / name).is_file(), name


def test_what_breaks_is_named() -> None:
    source = "from torch import fx\nfrom torch._C import Gone\nfrom torch._gone import x\n"
    assert list(test_newest.missing_names(source)) == [
        "torch._C.Gone: No module named 'torch._C.Gone'; 'torch._C' is not a package",
        "torch._gone.x: No module named 'torch._gone'",
    ]
    assert list(test_newest.missing_names(test_newest.TORCH_SEAM.read_text("utf-8"))) == []
    report = """<testsuites><testsuite>
    <testcase classname="tests.ir.test_torch_internals" name="test_private_name[torch.X._y]">
    <failure message="AttributeError: no _y&#10;more">...</failure></testcase>
    <testcase classname="tests.a" name="test_b" />
    <testcase classname="tests.a" name="test_c"><error message="broken" /></testcase>
    </testsuite></testsuites>"""
    assert list(test_newest.failures(report)) == [
        "torch.X._y (tests.ir.test_torch_internals): AttributeError: no _y",
        "test_c (tests.a): broken",
    ]
