"""`prove_equivalence`: proves two programs, or a program and its export, equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.errors import UserInputError
from qalora_compile.progress import track
from qalora_compile.verdict import PROVEN, Verdict
from qalora_compile.verify.proof.certificate import (
    Certificate,
    GraphRecord,
    SegmentProof,
    SiteProof,
    tokenizer_difference,
    verdict_of,
)
from qalora_compile.verify.proof.compare_weights import Coefficients, compare_linears
from qalora_compile.verify.proof.graphs.graph import FX, Graph, Ref
from qalora_compile.verify.proof.graphs.read_fx import read_program_graph
from qalora_compile.verify.proof.match_structure import (
    DIFFERENT,
    OPEN,
    PROVED,
    SAMPLED,
    Pair,
    Segment,
    Structure,
    compare_structure,
)
from qalora_compile.verify.proof.open_graph import files_of, open_graph
from qalora_compile.verify.proof.recheck import recheck, tokenizers_now
from qalora_compile.verify.proof.records import record_of, versions
from qalora_compile.verify.proof.weights.linear_map import (
    TWO_DIGITS,
    Linear,
    NotLinearError,
    remembered,
)

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program

_HALF_STEP = 0.5
SAMPLE_TOLERANCE = 1e-5
"""Largest difference on samples, relative to the largest value, that float32 arithmetic explains
between two layers: about a hundred roundings."""


def prove_equivalence(
    reference: Program | str | Path,
    candidate: Program | str | Path,
    *,
    samples: int = 2,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Certificate:
    """Prove that two programs, or a program and an exported model, compute the same.

    Every quantized layer of both graphs is read as a linear map in float64 and compared coefficient
    by coefficient; the nodes between the layers are compared by structure. This holds for all
    inputs. Operators without a common form in both dialects are compared on samples, separately
    from the layers, and the certificate names them.

    Args:
        reference: A program, or the path of a program folder, export folder or `.onnx` file.
        candidate: A program or path as above.
        samples: How many samples to try where there is no proof; with 0 the verdict is UNDECIDED.
        seed: Seed of the samples.
        folder: The program folder with the tensors of `reference`, if that is a program in memory
            (the same model with a key-value cache), so that the certificate can be checked without
            torch.

    Returns:
        The certificate: `.passed`, `.proved`, one row for every layer and every segment between.

    Raises:
        UserInputError: a path cannot be read.
    """
    things = (reference, candidate)
    graphs = (open_graph(reference), open_graph(candidate))
    structure = compare_structure(*graphs)
    sites = tuple(prove_site(pair) for pair in track(list(structure.pairs), "prove"))
    segments, refused = _sampled(structure, sites, things, graphs, samples, seed)
    structure = dataclasses.replace(structure, notes=(*structure.notes, *refused))
    records = (
        record_of(reference, graphs[0], None if folder is None else Path(folder)),
        record_of(candidate, graphs[1], None),
    )
    return certificate_of(records, structure, sites, segments, samples)


def check_certificate(path: str | Path) -> tuple[Certificate, list[str]]:
    """Check a certificate again, without torch: the files, the structure and every coefficient.

    Args:
        path: The certificate. Its two models must be where they were, or in its folder.

    Returns:
        The certificate as found now, and its deviations from the stated one; none if it holds.
        Results of samples are taken over unchanged, since sampling needs torch.

    Raises:
        UserInputError: the certificate is malformed or was made for a program in memory, or one of
            its models is missing.
    """
    stated = Certificate.read(path)
    places = [_place(record, Path(path)) for record in (stated.reference, stated.candidate)]
    problems = []
    for record, place in zip((stated.reference, stated.candidate), places, strict=True):
        found = files_of(place)
        problems += [
            f"{place / name}: the file has changed"
            for name in sorted(found.keys() | record.files.keys())
            if found.get(name) != record.files.get(name)
        ]
    records, changed = tokenizers_now(stated, places)
    problems += changed
    described = stated.reference.graph
    first = places[0] if described is None else read_program_graph(places[0], described)
    structure = compare_structure(first, places[1])
    sites = tuple(prove_site(pair) for pair in track(list(structure.pairs), "prove"))
    segments = _as_tried(structure.segments, stated)
    now = certificate_of(records, structure, sites, segments, int(stated.samples["count"]))
    problems += recheck(stated, now)
    return now, problems


def _as_tried(segments: Sequence[Segment], stated: Certificate) -> list[Segment]:
    """Segments that structure leaves open, with the stated results of samples."""
    tried = {
        s.name: s.sampled
        for s in stated.segments
        if s.status == SAMPLED and s.sampled is not None and s.sampled <= SAMPLE_TOLERANCE
    }
    if stated.samples["count"] < 1:
        tried = {}
    return [
        dataclasses.replace(s, status=SAMPLED, sampled=tried[s.name])
        if s.status == OPEN and s.name in tried
        else s
        for s in segments
    ]


def _place(record: GraphRecord, certificate: Path) -> Path:
    if record.path is None:
        raise UserInputError(
            f"the certificate was made for a {record.label} in memory, for which there is no file",
            where=str(certificate),
            hint="save the program and make the certificate for its folder",
        )
    for place in (Path(record.path), certificate.parent / Path(record.path).name):
        if _exists(place):
            return place
    raise UserInputError(
        f"{record.path}, which the certificate was made for, is missing", where=str(certificate)
    )


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # not a valid file name
        return False


def prove_site(pair: Pair) -> SiteProof:
    """The findings for one site."""
    site, problem = pair.site, pair.problem
    modes: dict[str, Coefficients] = {}
    status = OPEN
    try:
        for name, maps in _execution_modes(pair):
            modes[name] = compare_linears(*maps)
            status = PROVED if status != DIFFERENT and modes[name].equal else DIFFERENT
    except NotLinearError as error:
        status, problem = DIFFERENT, str(error)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        # numpy: the tensors of a layer do not fit together
        status, problem = DIFFERENT, f"the stored tensors cannot be decoded: {error}"
    return SiteProof(site.name, site.k, site.n, site.experts, status, modes, problem)


def _execution_modes(pair: Pair) -> Iterator[tuple[str, tuple[Linear, Linear]]]:
    """Both maps by their operators, then each by its functions against the other's operators.

    A function's constants are released before the next site.
    """
    if pair.maps is None:
        return
    one, other = map(remembered, pair.maps)
    yield "operators", (one, other)
    for index, make in pair.functions:
        for name, linear in make((one, other)[index]).items():
            yield name, (one, linear) if index else (linear, other)


def _sampled(
    structure: Structure,
    sites: Sequence[SiteProof],
    things: tuple[Program | str | Path, Program | str | Path],
    graphs: tuple[Graph, Graph],
    count: int,
    seed: int,
) -> tuple[list[Segment], list[str]]:
    """The segments, with samples for those that structure leaves open, and notes on failures."""
    open_ones = [
        s
        for s in structure.segments
        if s.status == OPEN and all(isinstance(t, Ref) for t in s.targets)
    ]
    lost = any(s.status == DIFFERENT for s in structure.segments)
    lost |= any(s.status == DIFFERENT for s in sites)
    if not open_ones or not count or lost:
        return list(structure.segments), []
    from qalora_compile.verify.proof.sampled_equality import sample

    cuts = [p.site.name for p in structure.pairs if p.maps is not None]
    programs = (_program(things[0], graphs[0]), _program(things[1], graphs[1]))
    try:
        worst = sample(graphs, programs, cuts, [s.targets for s in open_ones], count, seed)
    except UserInputError as error:  # no program to make inputs from, or a runtime refuses
        return list(structure.segments), [f"nothing was tried on samples: {error.what}"]
    tried = {}
    for segment, found in zip(open_ones, worst, strict=True):
        status = SAMPLED if found <= SAMPLE_TOLERANCE else DIFFERENT
        tried[segment.name] = dataclasses.replace(segment, status=status, sampled=found)
    return [tried.get(segment.name, segment) for segment in structure.segments], []


def _program(thing: Program | str | Path, graph: Graph) -> Program | None:
    """The program of a graph, to run it; None for an exported model."""
    if graph.dialect != FX:
        return None
    if not isinstance(thing, (str, Path)):
        return thing
    from qalora_compile.ir.program import Program

    return Program.load(Path(thing))


def certificate_of(
    records: tuple[GraphRecord, GraphRecord],
    structure: Structure,
    sites: Sequence[SiteProof],
    segments: Sequence[Segment],
    samples: int,
) -> Certificate:
    """The certificate of what was found."""
    wrong = tokenizer_difference(*records)
    states = {s.status for s in segments} | {s.status for s in sites if s.modes}
    around = DIFFERENT if DIFFERENT in states else OPEN if OPEN in states else PROVED
    if around == PROVED and SAMPLED in states:
        around = SAMPLED
    # A site that is not a linear map in both graphs was compared with its surroundings.
    sites = [
        dataclasses.replace(s, status=around) if s.status == OPEN and not s.modes else s
        for s in sites
    ]
    statuses = states | {s.status for s in sites} | ({DIFFERENT} if wrong else set())
    pieces = [
        SegmentProof(s.name, s.status, s.lines, s.sampled, s.conditions, s.problem)
        for s in segments
    ]
    verdict = verdict_of(statuses, [c for s in segments for c in s.conditions])
    return Certificate(
        reference=records[0],
        candidate=records[1],
        verdict=verdict,
        sites=tuple(sites),
        segments=tuple(pieces),
        difference=_first_difference(sites, pieces, verdict) or wrong,
        samples={"count": samples, "tolerance": SAMPLE_TOLERANCE},
        notes=(*structure.notes, *_notes(sites, structure)),
        versions=versions(),
    )


_WRONG = {Verdict.DIFFERENT: DIFFERENT, Verdict.UNDECIDED: OPEN, Verdict.SAMPLED: SAMPLED}


def _first_difference(
    sites: Sequence[SiteProof], segments: Sequence[SegmentProof], verdict: Verdict
) -> str | None:
    """The first difference, or part without a proof, in graph order.

    The input of a site comes before the site, outputs last.
    """
    if verdict in PROVEN:
        return None
    wrong = _WRONG[verdict]
    located = _located(sites, segments, wrong)
    for site in sites:
        if site.problem and site.status in (wrong, DIFFERENT):
            also = "" if located is None or located.startswith(site.name) else f"\n  and {located}"
            return f"{site.name}: {site.problem}{also}"
    return located


def _located(
    sites: Sequence[SiteProof], segments: Sequence[SegmentProof], wrong: str
) -> str | None:
    reads = {s.name.partition(" of ")[2]: s for s in segments if " of " in s.name}
    for site in sites:
        segment = reads.get(site.name)
        if segment is not None and segment.status == wrong:
            return _segment_text(segment)
        if site.status == wrong and site.worst is not None and not site.problem:
            return _site_text(site)
    return next((_segment_text(s) for s in segments if s.status == wrong), None)


def _segment_text(segment: SegmentProof) -> str:
    tried = "" if segment.sampled is None else f" (on samples by {segment.sampled:.3g})"
    lines = "" if segment.lines is None else f"\n    {segment.lines[0]}\n    {segment.lines[1]}"
    return f"{segment.name}{tried}{lines}"


def _site_text(site: SiteProof) -> str:
    assert site.worst is not None
    mode, found = site.worst
    if found.bias_max_abs:
        return f"{site.name}: the biases differ by up to {found.bias_max_abs:.3g}"
    how = "" if mode == "operators" else f" (by {mode})"
    return (
        f"{site.name}: weights differ by up to {found.max_abs:.3g}{how}, most at "
        f"{list(found.worst)}: {found.max_ratio:.3g} times the storage rounding"
    )


def _notes(sites: Sequence[SiteProof], structure: Structure) -> list[str]:
    notes = []
    inexact = [s.name for s in sites if any(w.float32 is None for w in s.modes.values())]
    if inexact:
        notes.append(
            f"{len(inexact)} layers run on int8 activations: equal in exact arithmetic, with no "
            "bound on what rounding x changes"
        )
    digits = sum(any(TWO_DIGITS in m.notes for m in p.maps or ()) for p in structure.pairs)
    if digits:
        notes.append(
            f"{digits} layers run on activations of two int8 digits: equal in exact "
            "arithmetic, and the bound of each contains what rounding x changes"
        )
    coarse = [s.name for s in sites if any(w.coarse >= _HALF_STEP for w in s.modes.values())]
    if coarse:
        notes.append(
            f"in {len(coarse)} layers, {coarse[0]} the first, an offset is so much larger than its "
            "scale that rounding it hides a change of one code"
        )
    maps = [one for pair in structure.pairs for one in pair.maps or ()]
    halves = {stored.name for one in maps for stored in one.bias if stored.widened}
    if halves:
        notes.append(f"{len(halves)} biases are stored in half precision and compared as widened")
    return notes
