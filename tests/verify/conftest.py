"""The exports of the model that faults are planted in, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verify.planted import export_all


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file for each of `planted.SPECS`."""
    folder = tmp_path_factory.mktemp("models")
    export_all(folder)
    return folder
