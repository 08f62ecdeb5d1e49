"""What a test may switch off for a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Switch:
    """Remembers what was computed, unless it is off."""

    _on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute everything anew."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before
