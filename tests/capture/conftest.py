"""Here every model is traced."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.captures import Memo


@pytest.fixture(scope="package", autouse=True)
def _traced(captures: Memo) -> Iterator[None]:
    with captures.off():
        yield
