"""The option for embeddings and heads, which `finetune` and `quantize` have in common."""

from __future__ import annotations

import argparse
from typing import Any

from qalora_compile.config import QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.passes.quantize_embeddings import BITS

_GROUP_SIZE = 32


def add_embedding_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare the options."""
    parser.add_argument(
        "--embeddings",
        type=int,
        choices=BITS,
        metavar="BITS",
        help="bits of embeddings and of the head, 8 or 4; stored once where they are tied, and "
        "without adapters (left in float)",
    )
    parser.add_argument(
        "--embeddings-group-size", type=int, metavar="G", help=f"their group size ({_GROUP_SIZE})"
    )


def embedding_spec(options: argparse.Namespace) -> QuantSpec | None:
    """What `add_embedding_arguments` has read; None leaves embeddings in float.

    Raises:
        UserInputError: a group size is given, and no bits.
    """
    size = options.embeddings_group_size
    if options.embeddings is None:
        if size is not None:
            raise UserInputError(
                "--embeddings-group-size has no use without --embeddings", hint="add --embeddings 8"
            )
        return None
    return QuantSpec(bits=options.embeddings, group_size=_GROUP_SIZE if size is None else size)


def embedding_record(spec: QuantSpec | None) -> dict[str, Any]:
    """What a folder says of it."""
    if spec is None:
        return {}
    return {"embeddings": {"bits": spec.bits, "group_size": spec.group_size}}
