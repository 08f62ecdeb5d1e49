"""What a server accepts."""

from __future__ import annotations

from dataclasses import dataclass, fields

from qalora_compile.errors import UserInputError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server.

    Attributes:
        max_tokens: Largest number of new tokens of an answer, and their number if a request names
            none.
        max_body: Largest request, in bytes.
        max_queue: Largest number of texts that wait or are generated.
        max_rows: Largest number of texts that are generated at once.
        max_inputs: Largest number of texts in one request.
        body_seconds: Longest time for a request to arrive.
    """

    max_tokens: int = 1024
    max_body: int = 1 << 20
    max_queue: int = 128
    max_rows: int = 8
    max_inputs: int = 64
    body_seconds: int = 30

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) < 1:
                name = each.name.replace("_", "-")
                raise UserInputError(
                    f"--{name} is {getattr(self, each.name)}", hint="use 1 or more"
                )
