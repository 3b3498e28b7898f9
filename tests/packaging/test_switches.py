from __future__ import annotations

import pytest

from build_tools.switches import SwitchError, parse_bool, read_switches


@pytest.mark.parametrize("text", ["1", "true", "TRUE", "Yes", " on "])
def test_true(text: str) -> None:
    assert parse_bool("X", text) is True


@pytest.mark.parametrize("text", ["", "0", "false", "No", "OFF"])
def test_false(text: str) -> None:
    assert parse_bool("X", text) is False


def test_neither() -> None:
    with pytest.raises(SwitchError, match=r"X='maybe' is not understood; expected 1/true/yes/on"):
        parse_bool("X", "maybe")


def test_defaults() -> None:
    switches = read_switches({}, pytest.fail)
    assert switches.progress
    assert switches.pybind
    assert not any((switches.force_build, switches.skip_cuda, switches.require_cuda))


def test_flash_attn_spellings_are_read_with_a_notice() -> None:
    notices: list[str] = []
    env = {"FLASH_ATTENTION_FORCE_BUILD": "TRUE", "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    switches = read_switches(env, notices.append)
    assert switches.force_build
    assert switches.skip_cuda
    assert notices == [
        "FLASH_ATTENTION_FORCE_BUILD=TRUE is read as FLASH_ATTN_EXT_FORCE_BUILD=1",
        "FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE is read as FLASH_ATTN_EXT_SKIP_CUDA=1",
    ]


def test_our_spelling_wins() -> None:
    env = {"FLASH_ATTENTION_FORCE_BUILD": "TRUE", "FLASH_ATTN_EXT_FORCE_BUILD": "0"}
    assert not read_switches(env, pytest.fail).force_build


def test_contradiction() -> None:
    env = {"FLASH_ATTN_EXT_SKIP_CUDA": "1", "FLASH_ATTN_EXT_REQUIRE_CUDA": "1"}
    with pytest.raises(SwitchError, match="both on; unset one"):
        read_switches(env, pytest.fail)


@pytest.mark.parametrize("text", ["four", "-1"])
def test_gb_per_job_must_be_a_size(text: str) -> None:
    with pytest.raises(SwitchError, match=rf"GB_PER_JOB='{text}' is not understood"):
        read_switches({"FLASH_ATTN_EXT_GB_PER_JOB": text}, pytest.fail)


def test_values() -> None:
    env = {
        "FLASH_ATTN_EXT_INTROSPECT_PYTHONS": "python3.10 python3.12",
        "FLASH_ATTN_EXT_GB_PER_JOB": "2.5",
        "FLASH_ATTN_EXT_ARCHS": " 80;90a ",
    }
    switches = read_switches(env, pytest.fail)
    assert switches.introspect_pythons == ("python3.10", "python3.12")
    assert switches.gb_per_job == 2.5
    assert switches.archs == "80;90a"
