import pytest

from qalora_compile.runtime import doctor


@pytest.mark.parametrize("forced", ["", "scalar"])
def test_a_level_that_cannot_be_used_is_named_with_the_reason(
    forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = "amx is not used: Linux does not let this process use the tiles"
    monkeypatch.setattr(doctor, "kernel_levels", lambda: ("scalar", "avx512"))
    monkeypatch.setattr(doctor, "kernel_note", lambda: note)
    monkeypatch.setattr(doctor, "register", lambda _options: None)
    monkeypatch.setenv("QALORA_KERNEL", forced)
    found = doctor.describe_machine()["kernels, target ort"]
    assert found.startswith("scalar" if forced else "GroupQuantLinear, avx512")
    assert found.endswith(f"(has scalar, avx512; {note})")
