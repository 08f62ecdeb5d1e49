"""Devices to train on: what is not there is refused."""

from __future__ import annotations

import pytest
import torch

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.training.forward.autocast import find_device


def test_the_cpu_is_everywhere() -> None:
    assert find_device("cpu") == torch.device("cpu")


def test_names_that_torch_does_not_know_are_refused() -> None:
    with pytest.raises(UserInputError, match="no device is called gpu"):
        find_device("gpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "meta", "xpu"])
def test_devices_that_are_not_there_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    with pytest.raises(UnsupportedError, match=f"no device {name} on this machine") as caught:
        find_device(name)
    assert caught.value.hint == "it has only cpu"


def test_an_accelerator_is_found_by_kind_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert find_device("cuda") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UnsupportedError, match="there is no cuda:2"):
        find_device("cuda:2")
    with pytest.raises(UnsupportedError, match="no device xpu") as caught:
        find_device("xpu")
    assert caught.value.hint == "it has cpu and cuda"
