"""The terms of a graph's values, node by node.

An operator without semantics is opaque: it keeps its name, options and operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted.element_types import HALVES
from qalora_compile.verify.proof.graphs.graph import Graph, Node, Ref, Tensor, reachable, refs
from qalora_compile.verify.proof.graphs.onnx_subgraphs import subgraphs
from qalora_compile.verify.proof.terms.op_signatures import accounted
from qalora_compile.verify.proof.terms.term import UNKNOWN, Algebra, Term, term

FUSED = "fused"
"""The dialect of fused operators, which replace patterns."""
_FUSED = ("qalora.rotary_embedding.default", "qalora.attention.default")

OpSemantics = Callable[["Semantics", Node], Term | None]


class Semantics:
    """Terms of the values of one graph.

    Args:
        graph: The graph.
        algebra: Makes terms; shared by the two graphs of a comparison.
        cuts: Values that are the output of a site, by name; the site itself is compared separately.
        operators: Semantics of each operator, by its name in the graph's dialect.
    """

    def __init__(
        self,
        graph: Graph,
        algebra: Algebra,
        cuts: dict[str, str],
        operators: Mapping[str, OpSemantics],
    ) -> None:
        self.graph, self.algebra, self._operators = graph, algebra, operators
        self._terms: dict[str, Term] = {}
        for value, (name, dtype) in graph.inputs.items():
            self._terms[value] = self._input(name, dtype)
        for value, site in cuts.items():
            line = graph.nodes[value].line
            dtype = "float32" if algebra.halves else graph.sites[site].dtype
            # Exports compute layers in float32 at any precision of the program.
            detail = site if algebra.single else f"{site}: {dtype}"
            self._terms[value] = term("site", (), detail, line=line, dtype=dtype)
        self._cuts = frozenset(cuts)

    def _input(self, name: str, dtype: str | None) -> Term:
        """An input; half precision becomes float32 if one of the graphs is widened."""
        algebra = self.algebra
        if dtype in HALVES and (algebra.halves or algebra.single):
            algebra.widened, dtype = True, "float32"
        return term("input", (), f"{name}: {dtype}", line=f"input {name}: {dtype}", dtype=dtype)

    def make(self, targets: list[Any]) -> None:
        """Make the terms of all nodes that compute `targets`, in graph order."""
        wanted = reachable(self.graph, targets, self._cuts)
        for name, node in self.graph.nodes.items():
            if name in wanted and name not in self._terms:
                self._terms[name] = self._semantics(node)
        for ref in (ref for target in targets for ref in refs(target)):
            self.of(ref)

    def computed(self) -> dict[str, Term]:
        """The terms of computed values by name, without the sites."""
        nodes = self.graph.nodes
        return {n: t for n, t in self._terms.items() if n in nodes and n not in self._cuts}

    def of(self, operand: Any) -> Term:
        """The term of an operand."""
        if isinstance(operand, Ref):
            if operand.name not in self._terms:
                raise UserInputError(
                    f"nothing computes the value {operand.name} before it is read",
                    where=self.graph.label,
                    hint="the graph is invalid: write the file again",
                )
            return self._terms[operand.name]
        if isinstance(operand, Tensor):
            return self.algebra.constant(self.graph.tensors[operand.name])
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            return self.algebra.number(operand)
        return term("literal", (), repr(operand), line=repr(operand), dtype=UNKNOWN)

    def _semantics(self, node: Node) -> Term:
        meaning = self._operators.get(node.op)
        known = meaning is not None and accounted(node)
        try:
            found = meaning(self, node) if meaning is not None and known else None
            return self._opaque(node) if found is None else found
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise UserInputError(
                f"a node does not fit the definition of its operator: {error!r}",
                where=f"{self.graph.label}: {node.line}",
            ) from error

    def _opaque(self, node: Node) -> Term:
        operands: list[Term] = []

        def shown(value: Any) -> str:
            if isinstance(value, (Ref, Tensor)):
                operands.append(self.of(value))
                return "·"
            if isinstance(value, (tuple, list)):
                return f"[{', '.join(map(shown, value))}]"
            return repr(value)

        detail = [shown(value) for value in node.args]
        detail += [f"{name}={shown(value)}" for name, value in sorted(node.options.items())]
        if node.output:
            detail.append(f"result {node.output}")
        detail += subgraphs(self.graph, node)
        dialect = FUSED if node.op in _FUSED else self.graph.dialect
        line = self.graph.line(Ref(node.name))
        return term(node.op, operands, ", ".join(detail), line=line, dialect=dialect, dtype=UNKNOWN)

    def line(self, node: Node) -> str:
        """A node as text, with its module path."""
        return self.graph.line(Ref(node.name))
