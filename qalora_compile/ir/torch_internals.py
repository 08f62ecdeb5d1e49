"""Every private name of torch that this package uses, once each.

A torch release that changes one needs a fix only in this file; `make test-newest` names it. "Wish"
names the public interface that would make a private name unnecessary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import FunctionSchema  # wish: torch.library.OperatorSchema
from torch._dispatch.python import enable_python_dispatcher  # wish: part of a public fake mode
from torch._dynamo.source import ConstantSource  # wish: torch.export.Dim makes symbols by itself
from torch._library.custom_ops import CustomOpDef  # wish: torch.library.CustomOpDef, documented
from torch._ops import (  # wish: torch.library has the types of operators
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # wish: torch.fake_tensor
from torch.fx.experimental.symbolic_shapes import (  # wish: torch.SymInt says what it is
    DimDynamic,
    ShapeEnv,
    is_concrete_int,
)
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo  # wish: fx.Graph(in_spec=, out_spec=)
from torch.utils import _pytree as pytree  # wish: torch.utils.pytree, with paths and text forms
from torch.utils._python_dispatch import TorchDispatchMode  # wish: in torch.overrides

__all__ = [
    "CustomOpDef",
    "DimDynamic",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionSchema",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "ShapeEnv",
    "TorchDispatchMode",
    "enable_python_dispatcher",
    "is_concrete_int",
    "pytree",
]
"""Values that are passed on unchanged."""

_ATEN = torch.ops.aten
# Wish: names without an underscore for the operators of the core ATen set.
TO_COPY = _ATEN._to_copy
SOFTMAX = _ATEN._softmax.default
GROUPED_MM = _ATEN._grouped_mm.default
LOCAL_SCALAR = _ATEN._local_scalar_dense.default
ASSERT_METADATA = _ATEN._assert_tensor_metadata.default
ASSERTIONS = (
    _ATEN._assert_scalar.default,
    _ATEN._assert_async.msg,
    _ATEN._assert_async.default,
)
"""Run-time assertions on values in a model's own code."""
ASSERT_TRUE = _ATEN._assert_async.msg
"""Raises its text unless a tensor of one boolean is true."""
PACK_INT4 = _ATEN._convert_weight_to_int4pack_for_cpu.default
INT4_PRODUCT = _ATEN._weight_int4pack_mm_for_cpu.default
"""Codes in the layout of torch's own kernel for 4-bit weights on this processor, and the kernel."""

BatchNormBase = nn.modules.batchnorm._NormBase  # wish: a public base class
"""The layers that keep running statistics, which training updates."""
CallTree = _PyTreeInfo  # wish: see above
"""The names of a graph's arguments, and the trees of its inputs and its output."""


def schema_of(operator: OpOverload) -> FunctionSchema:
    """Arguments and results of an operator. Wish: `OpOverload.schema`."""
    return operator._schema


def overload_of(definition: CustomOpDef) -> OpOverload:
    """The operator that a definition has registered. Wish: `CustomOpDef.overload`."""
    return definition._opoverload


def is_composed(operator: OpOverload) -> bool:
    """Whether torch composes an operator of others. Wish: `OpOverload.is_composite`."""
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)


def symbolic_mode() -> FakeTensorMode:
    """Fake tensors whose sizes may be symbols."""
    return FakeTensorMode(shape_env=ShapeEnv())


def new_size(mode: FakeTensorMode, name: str, hint: int) -> Any:
    """A symbol for the size of an axis, in a `symbolic_mode`; `hint` is its value in an example."""
    shapes = mode.shape_env
    assert shapes is not None, "the mode comes from symbolic_mode"
    source = ConstantSource(name)
    symbol = shapes.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    return shapes.create_symintnode(symbol, hint=hint, source=source)


def size_bounds(size: torch.SymInt) -> Any:
    """`lower` and `upper` of a symbolic size. Wish: `ExportedProgram.range_constraints` by size."""
    return size.node.shape_env.bound_sympy(size.node.expr)


def state_size(condition: bool) -> None:
    """State a relation of sizes that holds in every call of a trace. Wish: torch.check."""
    torch._check(condition)


def call_tree(graph: fx.Graph) -> CallTree | None:
    """The nesting of a graph's inputs and outputs; None if both are flat."""
    codegen = graph._codegen
    return codegen.pytree_info if isinstance(codegen, _PyTreeCodeGen) else None


def set_call_tree(graph: fx.Graph, tree: CallTree) -> None:
    """Make a graph take and return these containers."""
    graph.set_codegen(_PyTreeCodeGen(tree))


def set_output_tree(graph: fx.Graph, outputs: pytree.TreeSpec) -> None:
    """Make a graph that has a call tree return another container."""
    tree = call_tree(graph)
    assert tree is not None, "a captured graph has a call tree"
    set_call_tree(graph, tree._replace(out_spec=outputs))


def share_call_tree(source: fx.Graph, target: fx.Graph) -> None:
    """Make `target` take and return what `source` does; a call tree is immutable."""
    target.set_codegen(source._codegen)


def set_arguments(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Replace the arguments of a node at once. Wish: `fx.Node.set_arguments`."""
    node._update_args_kwargs(args, kwargs)


def is_erased(node: fx.Node) -> bool:
    """Whether a node was erased from its graph. Wish: `fx.Node.is_erased`."""
    return node._erased


def storage_id(tensor: Tensor) -> int:
    """Equal for tensors in the same memory, fake ones too. Wish: `UntypedStorage.is_same`."""
    found: int = tensor.untyped_storage()._cdata
    return found


def write_count(tensor: Tensor) -> int:
    """How often a tensor was written to in place. Wish: `Tensor.version`."""
    return tensor._version


def with_buffer(module: nn.Module, name: str, value: Tensor) -> nn.Module:
    """A shallow copy with another buffer. Wish: `functional_call` of another forward."""
    copied = copy.copy(module)
    copied._buffers = {**copied._buffers, name: value}
    return copied


class LazyGraphModule(fx.GraphModule):
    """A GraphModule that is compiled when it is first called, and can follow its tensors.

    Relies on `GraphModule` storing its graph as `_graph` and compiling it to `forward` of its
    class, and on `to()`, `cuda()`, … calling `_apply`. Wish: `fx.GraphModule(…, lazy=True)`, and a
    hook that runs when a module's tensors have moved.
    """

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._graph = graph
        graph.owning_module = self
        if self.is_compiled:
            self.recompile()

    @property
    def is_compiled(self) -> bool:
        """Whether Python code was generated from the graph."""
        return "forward" in vars(type(self))  # every GraphModule has a class of its own

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The compiled graph; compiling puts a method in the place of this property."""
        self.recompile()
        return self.forward

    @property
    def code(self) -> str:
        """Python code of the graph."""
        if not self.is_compiled:
            self.recompile()
        return super().code

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LazyGraphModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.after_move()
        return self

    def after_move(self) -> None:
        """Called after `to()`, `cuda()` and the like have moved the tensors."""


@contextmanager
def quick_type_promotion() -> Iterator[None]:
    """torch.onnx computes anew only those nodes whose operands may need another dtype.

    Its pass that inserts casts computes each node of a graph a second time, with symbolic sizes: a
    quarter of the time of an export. An operator that has no rule of promotion gives the value that
    the graph has recorded. Wish: `torch.onnx` takes `meta["val"]` there.
    """
    from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter

    compute = _TypePromotionInterpreter.run_node

    def run_node(interpreter: Any, node: fx.Node) -> Any:
        known = node.op == "call_function" and "val" in node.meta
        rule = getattr(node.target, "overloadpacket", None)
        if known and (rule is None or interpreter.type_promotion_table.get_rule(rule) is None):
            return node.meta["val"]
        return compute(interpreter, node)

    _TypePromotionInterpreter.run_node = run_node  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        _TypePromotionInterpreter.run_node = compute  # type: ignore[method-assign]


def compile_package(exported: torch.export.ExportedProgram, path: str) -> None:
    """Compile with AOTInductor to a `.pt2` package for C++. Wish: `torch.export.compile`."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(exported, package_path=path)


def load_package(path: str) -> Callable[..., Any]:
    """A compiled package, which is machine code: for files that are trusted. Wish: as above."""
    from torch._inductor import aoti_load_package

    package: Callable[..., Any] = aoti_load_package(path)
    return package
