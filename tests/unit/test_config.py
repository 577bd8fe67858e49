# SPDX-License-Identifier: Apache-2.0
"""Settings: what is accepted, and that wrong ones name themselves and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcached_core.config import Config, ConfigError, is_enabled
from kvcached_core.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("2MiB", 2 << 20),
        ("2 mb", 2 << 20),
        ("1.5GiB", 3 << 29),
        ("3k", 3072),
        ("0", 0),
        (77, 77),
    ],
)
def test_sizes_are_powers_of_1024(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "2 XiB", "1e6", "-2MiB", "two", -1])
def test_what_is_not_a_size_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_sizes_print_in_the_largest_unit() -> None:
    assert [format_size(n) for n in (0, 1023, 2 << 20, 3 << 29, 5 << 40)] == [
        "0 B",
        "1023 B",
        "2.0 MiB",
        "1.5 GiB",
        "5.0 TiB",
    ]


@pytest.mark.parametrize("value", ["true", "1", "YES", " on "])
def test_the_switch_is_on(value: str) -> None:
    assert is_enabled({"ENABLE_KVCACHED": value})


@pytest.mark.parametrize("environ", [{}, {"ENABLE_KVCACHED": "false"}, {"ENABLE_KVCACHED": ""}])
def test_the_switch_is_off(environ: dict[str, str]) -> None:
    assert not is_enabled(environ)


def test_a_misspelt_switch_is_not_silently_off() -> None:
    with pytest.raises(ConfigError, match=r"ture.*set it to 'true' or unset"):
        is_enabled({"ENABLE_KVCACHED": "ture"})


def test_flags_win_over_the_environment() -> None:
    environ = {"KVCACHED_PAGE_SIZE": "4MiB", "KVCACHED_LEDGER_DIR": "/tmp/l", "HOME": "x"}
    config = Config.load({"page_size": "16MiB"}, environ)
    assert config.page_size == 16 << 20
    assert config.ledger_dir == Path("/tmp/l")


def test_every_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        Config.load({"page_sise": 1, "layout": "diagonal"}, {"KVCACHED_CAPACITY": "lots"})
    text = str(error.value)
    assert "no setting 'page_sise'" in text and "page_size" in text
    assert "KVCACHED_LAYOUT" in text
    assert "KVCACHED_CAPACITY" in text and "'512MiB'" in text


@pytest.mark.parametrize("name", ["../etc/passwd", "", "a b", "x" * 40])
def test_host_ledger_names_cannot_leave_the_directory(name: str) -> None:
    with pytest.raises(ConfigError, match="KVCACHED_HOST_NAME"):
        Config.load({"host_name": name}, {})
