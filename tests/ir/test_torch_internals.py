"""Each private name of torch is there and does what this package needs, one case a name.

When an upgrade of torch breaks one, the failing case has its name.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from qalora_compile.ir import torch_internals as internals
from qalora_compile.ir.ops import linear
from qalora_compile.ir.torch_internals import pytree
from tests.ground.private_names import Cases

CASES = case = Cases()
ATEN = torch.ops.aten
SEAM = Path(internals.__file__)


def a_graph() -> fx.Graph:
    """A graph that adds one to its argument."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(ATEN.add.Tensor, (x, 1))
    graph.output((y,))
    return graph


def trees() -> tuple[Any, Any]:
    """Trees of ((x,), {}) and of (y,)."""
    return pytree.tree_structure(((0,), {})), pytree.tree_structure((0,))


@case("torch._C.FunctionSchema")
def function_schema() -> None:
    schema = internals.schema_of(ATEN.add_.Tensor)
    assert type(schema) is internals.FunctionSchema and schema.is_mutable
    assert [(a.name, a.kwarg_only) for a in schema.arguments] == [
        ("self", False), ("other", False), ("alpha", True),
    ]  # fmt: skip
    assert [str(a.real_type) for a in schema.arguments] == ["Tensor", "Tensor", "number"]
    assert schema.arguments[2].has_default_value() and schema.arguments[2].default_value == 1
    assert not schema.arguments[0].is_out
    mark = schema.arguments[0].alias_info
    assert mark is not None and mark.is_write
    assert [str(each.type) for each in schema.returns] == ["Tensor"]


@case("torch._dispatch.python.enable_python_dispatcher")
def python_dispatcher() -> None:
    mode = internals.symbolic_mode()
    with mode, internals.enable_python_dispatcher():
        size = internals.new_size(mode, "batch", 3)
        value = torch.empty((size, 4))
        shape = ATEN.matmul.default(value, torch.empty((4, 5))).shape
    assert str(shape[0]) == str(size) and shape[1] == 5


@case("torch._dynamo.source.ConstantSource")
def constant_source() -> None:
    size = internals.new_size(internals.symbolic_mode(), "batch", 3)
    assert isinstance(size, torch.SymInt) and str(2 * size + 1) == f"2*{size} + 1"


@case("torch.fx.experimental.symbolic_shapes.ShapeEnv")
def shape_env() -> None:
    assert isinstance(internals.symbolic_mode().shape_env, internals.ShapeEnv)


@case("torch.fx.experimental.symbolic_shapes.DimDynamic")
def dim_dynamic() -> None:
    mode = internals.symbolic_mode()
    first, second = (internals.new_size(mode, name, 3) for name in ("batch", "sequence"))
    assert internals.DimDynamic.DYNAMIC.name == "DYNAMIC" and str(first) != str(second)


@case("torch.fx.experimental.symbolic_shapes.is_concrete_int")
def concrete_int() -> None:
    size = internals.new_size(internals.symbolic_mode(), "batch", 3)
    assert internals.is_concrete_int(3) and not internals.is_concrete_int(size)


@case("SymInt.node.shape_env.bound_sympy")
def bounds_of_sizes() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.shape[0] < 10 else x - 1

    shapes = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(Branches(), (torch.ones(4),), dynamic_shapes=shapes)
    (size,) = next(iter(exported.graph.nodes)).meta["val"].shape
    bounds = internals.size_bounds(size)
    assert (int(bounds.lower), int(bounds.upper)) == (2, 9)


@case("torch._check")
def stated_sizes() -> None:
    class Cut(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            internals.state_size(x.shape[0] <= y.shape[0])
            return y[x.shape[0] :]

    shapes = {name: {0: torch.export.Dim.AUTO} for name in ("x", "y")}
    exported = torch.export.export(Cut(), (torch.ones(2), torch.ones(5)), dynamic_shapes=shapes)
    assert exported.module()(torch.ones(3), torch.ones(7)).shape == (4,)
    with pytest.raises(RuntimeError):
        internals.state_size(False)


@case("torch._ops.OpOverload")
def overload() -> None:
    operator = ATEN.add.Tensor
    assert isinstance(operator, internals.OpOverload)
    assert (str(operator), operator.name(), operator.namespace) == (
        "aten.add.Tensor", "aten::add.Tensor", "aten",
    )  # fmt: skip
    assert ATEN.transpose.int.is_view and not operator.is_view


@case("torch._ops.OpOverloadPacket")
def overload_packet() -> None:
    assert isinstance(ATEN.add, internals.OpOverloadPacket)
    assert "Tensor" in ATEN.add.overloads() and ATEN.add.Tensor.overloadpacket is ATEN.add


@case("torch._ops.HigherOrderOperator")
def higher_order_operator() -> None:
    cond = torch.ops.higher_order.cond
    assert isinstance(cond, internals.HigherOrderOperator) and cond.name() == "cond"


@case("torch._ops.OpOverload._schema")
def schema() -> None:
    assert not internals.schema_of(ATEN.add.Tensor).is_mutable


@case("torch._C._dispatch_has_kernel_for_dispatch_key")
def composed() -> None:
    assert internals.is_composed(ATEN.matmul.default)
    assert not internals.is_composed(ATEN.mm.default)


@case("torch._library.custom_ops.CustomOpDef")
def custom_op() -> None:
    assert isinstance(linear.group_linear, internals.CustomOpDef)


@case("torch._library.custom_ops.CustomOpDef._opoverload")
def overload_of_a_definition() -> None:
    assert internals.overload_of(linear.group_linear) is torch.ops.qalora.group_linear.default


@case("torch._subclasses.fake_tensor.FakeTensor")
def fake_tensor() -> None:
    mode = internals.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        made = torch.empty(2, 3)
    assert isinstance(made, internals.FakeTensor) and made.fake_mode is mode
    made._qalora_recipe = 1  # type: ignore[attr-defined]
    assert made._qalora_recipe == 1  # type: ignore[attr-defined]


@case("torch._subclasses.fake_tensor.FakeTensorMode")
def fake_mode() -> None:
    mode = internals.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        product = torch.empty(2, 3) @ torch.ones(3, 5)
    assert product.shape == (2, 5)
    assert isinstance(mode.from_tensor(torch.ones(2)), internals.FakeTensor)


@case("torch.fx.graph._PyTreeCodeGen")
def tree_codegen() -> None:
    graph = a_graph()
    assert internals.call_tree(graph) is None
    internals.set_call_tree(graph, internals.CallTree(["x"], *trees()))
    assert fx.GraphModule({}, graph)(torch.ones(2))[0].tolist() == [2.0, 2.0]


@case("torch.fx.graph._PyTreeInfo")
def tree_info() -> None:
    graph = a_graph()
    internals.set_call_tree(graph, internals.CallTree(["x"], *trees()))
    internals.set_output_tree(graph, pytree.tree_structure({"y": 0}))
    tree = internals.call_tree(graph)
    assert tree is not None and tree.orig_args == ["x"] and tree.in_spec == trees()[0]
    assert set(fx.GraphModule({}, graph)(torch.ones(2))) == {"y"}


@case("torch.fx.Graph._codegen")
def codegen() -> None:
    first, second = a_graph(), a_graph()
    internals.set_call_tree(first, internals.CallTree(["x"], *trees()))
    internals.share_call_tree(first, second)
    assert internals.call_tree(second) == internals.call_tree(first)


@dataclasses.dataclass
class Pair:
    """A container that pytrees know by name."""

    left: Any
    right: Any


@case("torch.utils._pytree")
def trees_of_containers() -> None:
    value = {"a": [1, (2, None)]}
    leaves, spec = pytree.tree_flatten(value)
    assert leaves == [1, 2, None] and spec == pytree.tree_structure(value)
    assert pytree.tree_unflatten(leaves, spec) == value and spec.num_leaves == 3
    assert pytree.tree_leaves(value, is_leaf=lambda leaf: leaf is None) == leaves
    assert pytree.tree_map(str, value) == {"a": ["1", ("2", "None")]}
    assert pytree.tree_map_only(int, str, value) == {"a": ["1", ("2", None)]}
    paths = pytree.tree_map_with_path(lambda path, _: len(path), value)
    assert paths == {"a": [2, (3, 3)]}
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(value)[0]]
    assert keys == ["['a'][0]", "['a'][1][0]", "['a'][1][1]"]
    assert (spec.type, spec.context, spec.children()[0].num_children) == (dict, ["a"], 2)
    rebuilt = pytree.TreeSpec(tuple, None, [pytree.treespec_leaf()])
    assert rebuilt == pytree.tree_structure((0,))
    version, text = json.loads(pytree.treespec_dumps(spec))
    assert version == 1 and text["type"] == "builtins.dict"
    name = f"{__name__}.Pair"
    if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        pytree.register_dataclass(Pair, serialized_type_name=name)
    assert pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE[name] is Pair


@case("torch.utils._python_dispatch.TorchDispatchMode")
def dispatch_mode() -> None:
    class Records(internals.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Records():  # type: ignore[no-untyped-call]
        torch.ones(2).float().to(torch.float64)
    assert internals.TO_COPY.default in seen


@case("torch.ops.aten._to_copy")
def to_copy() -> None:
    assert internals.TO_COPY.default(torch.ones(2), dtype=torch.float64).dtype is torch.float64


@case("torch.ops.aten._softmax")
def softmax() -> None:
    assert internals.SOFTMAX(torch.zeros(4), 0, False).tolist() == [0.25] * 4


@case("torch.ops.aten._grouped_mm")
def grouped_mm() -> None:
    names = [a.name for a in internals.schema_of(internals.GROUPED_MM).arguments]
    assert names == ["self", "mat2", "offs", "bias", "out_dtype"]


@case("torch.ops.aten._local_scalar_dense")
def local_scalar() -> None:
    assert internals.LOCAL_SCALAR(torch.tensor(3)) == 3


@case("torch.ops.aten._assert_tensor_metadata")
def assert_metadata() -> None:
    class Casts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float64)

    exported = torch.export.export(Casts(), (torch.ones(2),))
    assert internals.ASSERT_METADATA in {node.target for node in exported.graph.nodes}


@case("torch.ops.aten._assert_scalar")
def assert_scalar() -> None:
    internals.ASSERTIONS[0](1, "true")
    with pytest.raises(RuntimeError, match="false"):
        internals.ASSERTIONS[0](0, "false")


@case("torch.ops.aten._convert_weight_to_int4pack_for_cpu")
def pack_int4() -> None:
    codes = torch.arange(128 * 16, dtype=torch.int32).reshape(128, 16) % 16
    packed = internals.PACK_INT4(codes, 1)
    assert packed.dtype == torch.uint8 and packed.numel() == codes.numel() // 2


@case("torch.ops.aten._weight_int4pack_mm_for_cpu")
def int4_product() -> None:
    codes = torch.arange(16 * 64, dtype=torch.int32).reshape(16, 64) % 16
    pair = torch.tensor([2.0, 0.75]).expand(2, 16, 2).contiguous()
    x = torch.eye(64)
    found = internals.INT4_PRODUCT(x, internals.PACK_INT4(codes, 1), 32, pair)
    assert torch.equal(found.t(), (codes - 8) * 2.0 + 0.75)


@case("torch._inductor.aoti_compile_and_package")
def compiles_packages() -> None:
    from torch._inductor import aoti_compile_and_package

    assert "package_path" in inspect.signature(aoti_compile_and_package).parameters


@case("torch._inductor.aoti_load_package")
def loads_packages() -> None:
    from torch._inductor import aoti_load_package

    assert "path" in inspect.signature(aoti_load_package).parameters


@case("torch.ops.aten._assert_async")
def assert_async() -> None:
    with pytest.raises(RuntimeError, match="not so"):
        internals.ASSERT_TRUE(torch.tensor(data=False), "not so")
    names = {str(operator) for operator in internals.ASSERTIONS[1:]}
    assert names == {"aten._assert_async.msg", "aten._assert_async.default"}


@case("torch.nn.modules.batchnorm._NormBase")
def norm_base() -> None:
    assert issubclass(nn.BatchNorm1d, internals.BatchNormBase)
    assert issubclass(nn.InstanceNorm2d, internals.BatchNormBase)
    assert not issubclass(nn.LayerNorm, internals.BatchNormBase)


@case("torch.fx.Node._update_args_kwargs")
def update_arguments() -> None:
    graph = a_graph()
    x, y, output = graph.nodes
    internals.set_arguments(y, (x, 2), {"alpha": 3})
    assert (y.args, y.kwargs, list(x.users)) == ((x, 2), {"alpha": 3}, [y])
    internals.set_arguments(output, (x,), {})
    assert not y.users


@case("torch.fx.Node._erased")
def erased() -> None:
    graph = a_graph()
    x, y, output = graph.nodes
    internals.set_arguments(output, (x,), {})
    graph.erase_node(y)
    assert internals.is_erased(y) and not internals.is_erased(x)


@case("torch.UntypedStorage._cdata")
def storage_data() -> None:
    tensor = torch.ones(4)
    assert internals.storage_id(tensor) == internals.storage_id(tensor[2:])
    assert internals.storage_id(tensor) != internals.storage_id(tensor.clone())


@case("torch.Tensor._version")
def version() -> None:
    tensor = torch.ones(4)
    before = internals.write_count(tensor)
    tensor[1:].add_(1)
    assert internals.write_count(tensor) == before + 1


@case("torch.nn.Module._buffers")
def buffers() -> None:
    module = nn.BatchNorm1d(2)
    copied: Any = internals.with_buffer(module, "running_mean", torch.ones(2))
    assert copied.running_mean.tolist() == [1, 1] and copied.running_var is module.running_var
    assert module.running_mean is not None and module.running_mean.tolist() == [0, 0]


class Moves(internals.LazyGraphModule):
    """Counts how often its tensors move."""

    moved = 0

    def after_move(self) -> None:
        self.moved += 1


@case("torch.nn.Module._apply")
def apply() -> None:
    module = Moves({}, a_graph())
    module.to(torch.float64)
    assert module.moved == 1


@case("torch.fx.GraphModule._graph")
def graph_of_a_module() -> None:
    module = Moves({}, a_graph())
    assert not module.is_compiled and "add" in module.code and module.is_compiled
    lazy = Moves({}, a_graph())
    assert lazy(torch.ones(1))[0].item() == 2 and lazy.is_compiled
    other = a_graph()
    (_, y, _) = other.nodes
    y.update_arg(1, 5)
    lazy.graph = other
    assert lazy.graph.owning_module is lazy and lazy(torch.ones(1))[0].item() == 6


@case("torch.onnx._internal.fx.passes.type_promotion._TypePromotionInterpreter")
def type_promotion() -> None:
    from torch.onnx._internal.fx.passes.type_promotion import InsertTypePromotion

    def promoted() -> tuple[list[str], list[torch.dtype]]:
        """A sum of integers and floats, reshaped."""
        graph, mode = fx.Graph(), internals.symbolic_mode()
        x, y = graph.placeholder("x"), graph.placeholder("y")
        total = graph.call_function(ATEN.add.Tensor, (x, y))
        flat = graph.call_function(ATEN.reshape.default, (total, [4]))
        graph.output((flat,))
        with mode:
            x.meta["val"] = torch.ones(2, 2)
            y.meta["val"] = torch.ones(2, 2, dtype=torch.int64)
            total.meta["val"] = x.meta["val"] + y.meta["val"]
            flat.meta["val"] = total.meta["val"].reshape(4)
        module = fx.GraphModule({}, graph)
        InsertTypePromotion(module).run()
        nodes = list(module.graph.nodes)
        values = [node.meta["val"].dtype for node in nodes if "val" in node.meta]
        return [str(node.target) for node in nodes], values

    computed = promoted()
    with internals.quick_type_promotion():
        assert promoted() == computed
    assert any("_to_copy" in name or "prims.convert" in name for name in computed[0]), computed


@pytest.mark.parametrize("name", CASES)
def test_private_name(name: str) -> None:
    CASES[name]()


def test_every_private_name_has_a_case() -> None:
    assert CASES.without_case(SEAM) == []
    assert CASES.without_use(SEAM) == ["SymInt.node.shape_env.bound_sympy"]  # has no underscore
