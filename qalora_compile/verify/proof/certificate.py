"""Certificates: the findings of a proof, as JSON that can be checked again without torch."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.brief import Brief
from qalora_compile.errors import UserInputError, VerificationError
from qalora_compile.files import atomic_files, write_json
from qalora_compile.untrusted import quoted, read_json
from qalora_compile.verdict import PROVEN, Verdict
from qalora_compile.verify.proof.compare_weights import RULE, Coefficients
from qalora_compile.verify.proof.match_structure import DIFFERENT, OPEN, PROVED, SAMPLED
from qalora_compile.verify.proof.tokenizer_digests import changed_files

FORMAT, VERSION = "qalora-certificate", 4
_VERSIONS = range(1, VERSION + 1)
_NONE = type(None)


@dataclass(frozen=True)
class GraphRecord:
    """One of the two graphs of a comparison.

    Attributes:
        label: Its name in messages.
        kind: `fx` (a program) or `onnx`.
        stage: The stage of a program, or the target of a model.
        path: Path of the folder or file; None for a program in memory.
        files: SHA-256 of its files, by name.
        tensors: SHA-256 over the names and values of the tensors of a program in memory.
        graph: The graph of a program in memory whose tensors are those of the folder `path`.
        tokenizer: See `tokenizer_digests`; None in certificates before version 3, which do not
            bind tokenizers.
    """

    label: str
    kind: str
    stage: str
    path: str | None
    files: Mapping[str, str]
    tensors: str | None
    graph: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, str] | None = None


@dataclass(frozen=True)
class SiteProof:
    """The findings for one site.

    Attributes:
        name, k, n, experts: The site.
        status: `proved`, `different`, or `sampled` if its nodes were not read as a linear map.
        modes: Difference of the weights, with the candidate's operators read by their specification
            or by the functions in the file.
        problem: Why there are no numbers.
    """

    name: str
    k: int
    n: int
    experts: int | None
    status: str
    modes: Mapping[str, Coefficients]
    problem: str = ""

    @property
    def max_abs(self) -> float:
        """Largest difference of two coefficients."""
        return max((w.max_abs for w in self.modes.values()), default=math.nan)

    @property
    def worst(self) -> tuple[str, Coefficients] | None:
        """The mode whose difference is the largest multiple of the storage rounding."""
        return max(self.modes.items(), key=lambda item: item[1].max_ratio, default=None)

    def bound(self, norm: float) -> float:
        """Bound on ‖Δy‖₂ for every x with ‖x‖₂ ≤ `norm`, in exact arithmetic."""
        return max((w.operator * norm + w.bias_norm for w in self.modes.values()), default=math.nan)


@dataclass(frozen=True)
class SegmentProof:
    """The findings for the nodes between sites, as in `match_structure.Segment`."""

    name: str
    status: str
    lines: tuple[str, str] | None
    sampled: float | None
    conditions: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, repr=False)
class Certificate(Brief):
    """The outcome of `prove_equivalence`.

    Attributes:
        reference, candidate: What was compared.
        verdict: See `verdict_of`.
        sites: The quantized layers.
        segments: The nodes between them.
        difference: The first difference, as lines of text, or None.
        samples: Number of samples where structure alone is not a proof, and their tolerance.
        notes: Notes on widened tensors and on missing bounds.
        versions: Versions of the software that made it.
    """

    reference: GraphRecord
    candidate: GraphRecord
    verdict: Verdict
    sites: tuple[SiteProof, ...]
    segments: tuple[SegmentProof, ...]
    difference: str | None
    samples: Mapping[str, float]
    notes: tuple[str, ...]
    versions: Mapping[str, str]

    def brief(self) -> dict[str, object]:
        """Verdict, what was compared, the statuses of its parts, and the first difference."""
        return {
            "verdict": self.verdict,
            "for all inputs": self.scope,
            "reference": self.reference.label,
            "candidate": self.candidate.label,
            "layers": counts_text(Counter(site.status for site in self.sites)),
            "between them": counts_text(Counter(segment.status for segment in self.segments)),
            "first difference": self.difference,
        }

    @property
    def passed(self) -> bool:
        """Whether the two are proved equal: PROVED, or PROVED UNDER `conditions`."""
        return self.verdict in PROVEN

    @property
    def parts(self) -> tuple[SiteProof | SegmentProof, ...]:
        """The layers and the segments between them."""
        return (*self.sites, *self.segments)

    @property
    def sampled(self) -> tuple[str, ...]:
        """Names of the parts that were sampled instead of proved; empty if all are proved."""
        return tuple(part.name for part in self.parts if part.status == SAMPLED)

    @property
    def conditions(self) -> tuple[str, ...]:
        """What inputs have to meet for the proof to hold; empty if it holds for all of them."""
        return tuple(dict.fromkeys(c for part in self.segments for c in part.conditions))

    @property
    def proved(self) -> bool:
        """Whether every part is proved, without any that was only sampled."""
        return self.passed and all(part.status == PROVED for part in self.parts)

    @property
    def scope(self) -> str:
        """For which inputs the two are proved equal, as text."""
        if not self.proved:
            return "no"
        return f"that meet {len(self.conditions)} conditions" if self.conditions else "yes"

    @property
    def tokenizer(self) -> str:
        """What is known of the two tokenizers, as text."""
        one, other = self.reference.tokenizer, self.candidate.tokenizer
        if one is None or other is None:
            return "not bound: the certificate is older"
        if not one or not other:
            return f"not compared: {self.candidate.label if one else self.reference.label} has none"
        wrong = tokenizer_difference(self.reference, self.candidate)
        return wrong or f"equal: {', '.join(sorted(one))}"

    @property
    def max_abs(self) -> float:
        """Largest difference of two coefficients of any site."""
        found = [s.max_abs for s in self.sites if s.modes]
        return max(found, default=0.0)

    def passes(self, *, allow_sampled: bool) -> bool:
        """Whether the two are proved equal, or only tried on samples where that is allowed."""
        return self.passed or (allow_sampled and self.verdict == Verdict.SAMPLED)

    def check(self, *, allow_sampled: bool = False) -> Certificate:
        """Return self, or raise.

        Args:
            allow_sampled: Accept parts that were only tried on samples.

        Raises:
            VerificationError: the two are not proved equal.
        """
        if not self.passes(allow_sampled=allow_sampled):
            only = " but only tried on samples" if self.verdict == Verdict.SAMPLED else ""
            raise VerificationError(
                f"{self.candidate.label} is not proved equal to {self.reference.label}{only}",
                report=self,
                where=self.difference,
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """The certificate as JSON types; infinities and NaN become text."""
        value = {"format": FORMAT, "version": VERSION, "tolerance": RULE, **_fields(self)}
        value |= {"conditions": list(self.conditions)}
        return value | {"proved": self.proved, "sampled": list(self.sampled)}

    def write(self, path: str | Path) -> None:
        """Write the certificate as a JSON file; an existing certificate is replaced.

        Raises:
            UserInputError: the path holds something other than a certificate.
            OutputError: it cannot be written.
        """
        with atomic_files(Path(path), overwrite=True) as scratch:
            write_json(scratch, self.to_json())

    @classmethod
    def read(cls, path: str | Path) -> Certificate:
        """Undo `write`.

        Raises:
            UserInputError: the file is missing, malformed or of another version.
        """
        value = read_json(Path(path), finite=True)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserInputError(f"{path} is not a certificate", where=str(path))
        if value.get("version") not in _VERSIONS:
            raise UserInputError(
                f"the certificate has version {value.get('version')}, this package reads "
                f"{_VERSIONS[0]} to {VERSION}",
                where=str(path),
            )
        try:
            made = _certificate(value)
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            IndexError,
        ) as error:
            raise UserInputError(
                f"the certificate is malformed: {error!r}", where=str(path)
            ) from error
        if (value.get("proved") or made.passed) and not made.proved:
            raise UserInputError(
                "the certificate states proved for a part that was not", where=str(path)
            )
        return made

    def __str__(self) -> str:
        sites, parts = (Counter(p.status for p in rows) for rows in (self.sites, self.segments))
        lines = [
            f"{self.verdict}: {self.candidate.label} against {self.reference.label}",
            f"  layers: {counts_text(sites)}; largest difference of a coefficient "
            f"{self.max_abs:.3g}",
            f"  between them: {counts_text(parts)}",
        ]
        if self.sampled:
            worst = max((s.sampled or 0.0 for s in self.segments), default=0.0)
            lines.append(
                f"  not proved but tried on {self.samples['count']:g} samples: "
                f"{len(self.sampled)} parts, largest relative difference {worst:.3g}"
            )
        problems = dict.fromkeys(s.problem for s in self.segments if s.problem)
        lines += [f"  not proved because of {problem}" for problem in problems]
        lines += [f"  condition: {condition}" for condition in self.conditions]
        if self.difference:
            lines.append(f"  first difference: {self.difference}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def tokenizer_difference(reference: GraphRecord, candidate: GraphRecord) -> str | None:
    """The files in which the tokenizers differ; None if they do not, or one of them is unknown."""
    if not reference.tokenizer or not candidate.tokenizer:
        return None
    names = changed_files(reference.tokenizer, candidate.tokenizer)
    return f"the tokenizers differ: {', '.join(names)}" if names else None


_WORDS = {DIFFERENT: Verdict.DIFFERENT, OPEN: Verdict.UNDECIDED, SAMPLED: Verdict.SAMPLED}


def verdict_of(statuses: Iterable[str], conditions: Collection[str] = ()) -> Verdict:
    """The verdict of a proof, from the statuses of its layers and segments.

    One part that differs makes the result DIFFERENT; otherwise one that could be neither proved nor
    sampled makes it UNDECIDED, and one that was only sampled SAMPLED. What is proved is PROVED, or
    PROVED UNDER the conditions if there are any.
    """
    proved = Verdict.PROVED_UNDER if conditions else Verdict.PROVED
    return Verdict.worst([proved, *(_WORDS.get(status, proved) for status in statuses)])


def counts_text(counts: Mapping[str, int]) -> str:
    """How many parts have each status: `3 proved, 1 sampled`."""
    order = (PROVED, SAMPLED, DIFFERENT, OPEN)
    return ", ".join(f"{counts[s]} {s}" for s in order if counts.get(s)) or "none"


def _fields(value: Any) -> Any:
    """Dataclasses as dictionaries, tuples as lists, infinities and NaN as text."""
    if dataclasses.is_dataclass(value):
        return {f.name: _fields(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _fields(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_fields(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _certificate(value: Mapping[str, Any]) -> Certificate:
    sites = []
    for row in value["sites"]:
        if "ways" in row:  # the name in version 1
            row["modes"] = row.pop("ways")
        modes = {name: _coefficients(mode) for name, mode in row["modes"].items()}
        _check_types(row, name=str, k=int, n=int, status=str, problem=str)
        sites.append(SiteProof(**(row | {"modes": modes})))
    segments = []
    for row in value["segments"]:
        lines = None if row["lines"] is None else (str(row["lines"][0]), str(row["lines"][1]))
        sampled = None if row["sampled"] is None else float(row["sampled"])
        _check_types({"problem": ""} | row, name=str, status=str, problem=str)
        conditions = tuple(map(str, row.get("conditions", ())))
        read = {"lines": lines, "sampled": sampled, "conditions": conditions}
        segments.append(SegmentProof(**(row | read)))
    for rows in (value["sites"], value["segments"]):
        names = Counter(row["name"] for row in rows)
        if names and max(names.values()) > 1:
            raise ValueError(f"{names.most_common(1)[0][0]} is there twice")
    for name in ("reference", "candidate"):
        _check_types(value[name], label=str, kind=str, stage=str, files=dict, path=(str, _NONE))
        _check_types(value[name]["files"], **dict.fromkeys(value[name]["files"], str))
        _check_types(value[name], tensors=(str, _NONE), graph=(dict, _NONE))
        if value[name].setdefault("tokenizer", None) is not None:
            _check_types(value[name], tokenizer=dict)
            _check_types(value[name]["tokenizer"], **dict.fromkeys(value[name]["tokenizer"], str))
    records = [GraphRecord(**value[name]) for name in ("reference", "candidate")]
    return Certificate(
        reference=dataclasses.replace(records[0], files=dict(records[0].files)),
        candidate=dataclasses.replace(records[1], files=dict(records[1].files)),
        verdict=_verdict(value["verdict"], [*sites, *segments]),
        sites=tuple(sites),
        segments=tuple(segments),
        difference=None if value["difference"] is None else str(value["difference"]),
        samples={name: float(value["samples"][name]) for name in ("count", "tolerance")},
        notes=tuple(map(str, value["notes"])),
        versions={str(k): str(v) for k, v in value["versions"].items()},
    )


def _verdict(word: str, parts: Iterable[SiteProof | SegmentProof]) -> Verdict:
    """A stated verdict; before version 4, EQUAL is PROVED or SAMPLED by the statuses."""
    if word == Verdict.EQUAL:
        return verdict_of(part.status for part in parts)
    return Verdict(word)


def _check_types(row: Mapping[str, Any], **kinds: type | tuple[type, ...]) -> None:
    """Check the types of the values of a row.

    Raises:
        TypeError: a value has another type, or is missing.
    """
    for name, kind in kinds.items():
        value = row[name] if name != "graph" else row.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise TypeError(f"{name} is {quoted(value)}")


def _coefficients(mode: Mapping[str, Any]) -> Coefficients:
    numbers: dict[str, Any] = {
        name: None if v is None and name == "float32" else float(v)
        for name, v in mode.items()
        if name != "worst"
    }
    numbers["terms"] = int(mode["terms"])
    return Coefficients(**numbers, worst=tuple(mode["worst"]))
