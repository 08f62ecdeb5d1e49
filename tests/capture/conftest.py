"""What the tests of capturing itself share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.captures import Memo


@pytest.fixture(scope="module")
def traced_anew(captures: Memo) -> Iterator[None]:
    """In a file about tracing, every model is traced."""
    with captures.off():
        yield
