"""Finds embedding lookups on codes in an exported graph by the tables that they read."""

from __future__ import annotations

from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.weights.onnx_embeddings import lookup_values


def find_lookups(graph: Graph) -> Graph:
    """Assign every lookup site its value, which the file's metadata do not name.

    Sites without a value are dropped: the file does not hold them as codes. Returns `graph`.
    """
    missing: dict[str, list[str]] = {}
    for site in graph.sites:
        if site not in graph.site_values:
            missing.setdefault(graph.sites[site].path, []).append(site)
    for path, sites in missing.items():
        found = lookup_values(graph, path)
        if len(found) == len(sites):
            graph.site_values.update(zip(sites, found, strict=True))
    for site in [site for site in graph.sites if site not in graph.site_values]:
        del graph.sites[site]
    return graph
