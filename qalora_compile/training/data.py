"""Training data from JSON lines files: read, tokenized, counted.

The forms of a line are those of `training.lines`. Small files become a tuple of examples; large
ones are tokenized once into a cache folder and read from there (`training.corpus`).
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.training.examples import IGNORED, Example
from qalora_compile.training.lines import COMPLETIONS, LineReader, class_name, parse_line
from qalora_compile.untrusted import check_regular

_LOOKED_AT = 1000
Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class FileCount:
    """What became of a file.

    Attributes:
        path: Of the file.
        examples: How many it gave.
        truncated: How many of them were longer than the limit and were cut.
        skipped: How many more had no token left to learn from (a completion that tokenizes to
            nothing).
    """

    path: str
    examples: int
    truncated: int
    skipped: int


@dataclass(frozen=True)
class Dataset:
    """The examples of files, and what was cut to fit.

    Attributes:
        examples: In the order of the files.
        files: What became of each file.
        classes: Names of the classes of a classification task, in the order of the logits.
        token_range: The least and the largest token id, labels too.
    """

    examples: Sequence[Example]
    files: tuple[FileCount, ...] = ()
    classes: tuple[str, ...] = ()
    token_range: tuple[int, int] = (0, 0)

    @property
    def truncated(self) -> int:
        """How many examples were cut."""
        return sum(file.truncated for file in self.files)

    @property
    def skipped(self) -> int:
        """How many examples held nothing to learn."""
        return sum(file.skipped for file in self.files)

    def check_tokens(self, limit: int) -> None:
        """See that a model of `limit` tokens knows every token, and every label.

        Raises:
            UserInputError: it does not; an example with an unknown one is named.
        """
        least, largest = self.token_range
        if least >= 0 and largest < limit:
            return
        for number, example in enumerate(self.examples, start=1):
            kinds = {"token": (*example.source, *example.tokens), "label": _learned(example)}
            for kind, values in kinds.items():
                odd = [value for value in values if not 0 <= value < limit]
                if odd:
                    raise UserInputError(
                        f"example {number} holds the {kind} {odd[0]}; "
                        f"the model knows 0 to {limit - 1}",
                        hint="use the tokenizer that belongs to the model",
                    )


def load_examples(
    paths: Paths,
    tokenizer: Any,
    *,
    max_length: int,
    decoder_start: int | None = None,
    learn: str = COMPLETIONS,
    classes: tuple[str, ...] | None = None,
    cache: str | Path | None = None,
) -> Dataset:
    """Read and tokenize JSON lines files.

    An example longer than `max_length` loses its beginning (a prompt, a chat) or, for plain text,
    its end; the number cut is in the result.

    Args:
        paths: A file, or several; patterns such as `data/*.jsonl` stand for files in sorted order.
        tokenizer: Of the model; None where the lines hold token ids.
        max_length: The most tokens of an example (and as many for the encoder).
        decoder_start: As for `LineReader`.
        learn: As for `LineReader`.
        classes: As for `LineReader`.
        cache: A folder to tokenize into, once, and to read from: memory does not grow with the
            files. Needs the library `datasets`. None: in memory.

    Raises:
        UserInputError: a file is missing, empty or given twice, a line is malformed (its number is
            named), or a file has no usable example.
        UnsupportedError: `datasets` is not installed, and a cache is asked for.
    """
    reader = LineReader(
        tokenizer=tokenizer,
        max_length=max_length,
        decoder_start=decoder_start,
        learn=learn,
        classes=classes,
    )
    files = find_files(paths)
    if cache is not None:
        from qalora_compile.training.corpus import load_corpus

        return load_corpus(files, reader, Path(cache))
    count = ReadCount()
    examples = tuple(count.read(files, reader))
    return Dataset(examples, tuple(count.files), classes or (), count.token_range)


def find_classes(paths: Paths) -> tuple[str, ...]:
    """The labels in files of a classification task, each once, in sorted order.

    Raises:
        UserInputError: a line has no label, or all have the same.
    """
    found: dict[str, str] = {}
    files = find_files(paths)
    for path in files:
        for where, line in _lines(path):
            row = parse_line(line, where)
            name = class_name(row, where)
            kind = type(row["label"]).__name__
            if found.setdefault(name, kind) != kind:
                raise UserInputError(f"the label {name} is a text in one line and none in another")
    if len(found) < 2:
        raise UserInputError(
            f"all examples have the same label ({next(iter(found), 'there is none')})",
            where=", ".join(map(str, files)),
            hint="a classification task needs two classes or more",
        )
    numbers = all(kind == "int" for kind in found.values())
    return tuple(sorted(found, key=int) if numbers else sorted(found))


def find_files(paths: Paths) -> tuple[Path, ...]:
    """Files by name or pattern.

    Raises:
        UserInputError: a pattern fits nothing, or a file is there twice.
    """
    found: list[Path] = []
    for given in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(given)
        if path.exists() or not glob.has_magic(str(given)):
            found.append(path)
            continue
        matched = sorted(map(Path, glob.glob(str(given), recursive=True)))
        if not matched:
            raise UserInputError(f"no file fits {given}", where=str(given))
        found += matched
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            raise UserInputError(f"the data file {path} is given twice", where=str(path))
        seen.add(path.resolve())
    return tuple(found)


@dataclass
class ReadCount:
    """Reads files line by line, and counts."""

    files: list[FileCount] = field(default_factory=list)
    least: int | None = None
    largest: int = 0

    @property
    def token_range(self) -> tuple[int, int]:
        """The least and the largest token id that was read, labels too."""
        return self.least or 0, self.largest

    def read(self, files: Sequence[Path], reader: LineReader) -> Iterator[Example]:
        """The usable examples of the files.

        Raises:
            UserInputError: see `load_examples`.
        """
        for path in files:
            usable, truncated, skipped = 0, 0, 0
            for where, line in _lines(path):
                example, cut = reader.read(line, where)
                if not example.learns:
                    skipped += 1
                    continue
                usable, truncated = usable + 1, truncated + cut
                self._note(example)
                yield example
            if not usable:
                raise UserInputError(
                    f"the data file has no usable example ({skipped} held nothing to learn)",
                    where=str(path),
                    hint='write one JSON object a line: {"prompt": "…", "completion": "…"}',
                )
            self.files.append(FileCount(str(path), usable, truncated, skipped))

    def _note(self, example: Example) -> None:
        tokens = (*example.source, *example.tokens, *_learned(example))
        least = min(tokens)
        self.least = least if self.least is None else min(self.least, least)
        self.largest = max(self.largest, *tokens)


def _learned(example: Example) -> list[int]:
    """The labels that carry loss."""
    return [label for label in example.labels if label != IGNORED]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """File and number, and text, of each line that is not empty."""
    number = 0
    if path.exists():
        check_regular(path)  # a pipe or a device may never end
    try:
        # bytes: not every separator that Python knows in texts ends a line of JSON lines
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8")
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise UserInputError(
            f"cannot read the data file: {error.strerror}", where=str(path)
        ) from error
    except UnicodeDecodeError as error:
        raise UserInputError(
            f"the data file is not UTF-8: {error}", where=f"{path}:{number}"
        ) from error


def taught_ends(data: Dataset, tokenizer: Any) -> list[int]:
    """The tokens that the examples teach as the end of an answer, the most frequent first.

    Of an example that is the last special token that carries loss (a chat's template may put a line
    break behind it); of examples without a tokenizer, the last token, if all share it. The first
    1,000 examples are looked at.

    Args:
        data: What is learned.
        tokenizer: What it was tokenized with, or None.
    """
    learned = [_learned(example) for example in islice(data.examples, _LOOKED_AT)]
    if tokenizer is None:
        last = {labels[-1] for labels in learned if labels}
        return list(last) if len(last) == 1 and len(learned) > 1 else []
    special = set(tokenizer.all_special_ids)
    counts = Counter(
        next((label for label in reversed(labels) if label in special), None) for labels in learned
    )
    return [token for token, _ in counts.most_common() if token is not None]
