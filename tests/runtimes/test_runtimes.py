"""What is exported for a release of ONNX Runtime runs in that release (`make test-runtimes`)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qalora_compile.config.onnx_releases import RELEASES
from scripts.test_runtimes import PATCHES, ROOT, changes, run, version_of

ENVIRONMENTS = ROOT / "build" / "runtimes"


def test_each_release_of_the_table_is_run() -> None:
    versions = [version_of(release) for release in RELEASES]
    assert all(v.startswith(f"{r.version}.") for v, r in zip(versions, RELEASES, strict=True))
    assert PATCHES.keys() <= {release.version for release in RELEASES}


def test_ci_runs_each_release_at_which_the_table_changes() -> None:
    chosen, known = changes(), {release.version: release for release in RELEASES}
    assert (chosen[0], chosen[-1]) == (RELEASES[0].version, RELEASES[-1].version)
    for release in RELEASES:
        before = [v for v in chosen if list(known).index(v) <= list(known).index(release.version)]
        assert replace(known[before[-1]], version=release.version) == release


@pytest.mark.slow
def test_each_release_runs_what_is_exported_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    missing = [
        v for v in map(version_of, RELEASES) if not (ENVIRONMENTS / v / "installed").exists()
    ]
    if missing:
        pytest.skip(f"not installed: onnxruntime {', '.join(missing)}; make test-runtimes")
    assert run(ENVIRONMENTS, ()) == 0
    assert f"{len(RELEASES)} releases, 0 of them failed" in capfd.readouterr().out
