"""Values as they were typed: YAML 1.1 reads 010 as 8, 1:30 as 90 and 0123 as 83, and says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gare.config import Config, load_config, parse_config
from gare.errors import ConfigError

NAMES = ("0123", "007", "1.10", "1e3", "1_0", "0x10", "0b11", "2024-01-05", "2024-13-45", "1.", "12")
WORDS = ("no", "on", "Yes", "off", "true", "y")


def loaded(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def message_of(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", [*NAMES, *WORDS])
def test_names_that_look_like_something_else_are_names(name: str, tmp_path: Path) -> None:
    """A run called 0123 would be called 83, or be refused as a number that nobody typed."""
    given = loaded(tmp_path, "", f"train.run={name}", f"evaluate.compare=[{name}, a]")
    assert given.train.run == name
    assert loaded(tmp_path, f"train: {{run: '{name}'}}").train.run == name
    assert given.evaluate.compare == (name, "a")
    assert loaded(tmp_path, f"train:\n  run: {name}\n").train.run == name
    assert loaded(tmp_path, given.to_yaml()) == given, "saved and read back"


@pytest.mark.parametrize(
    "path",
    [
        "/a/b #1 50% ?x=1",
        "/a: b",
        "@host",
        "*stars",
        "&more",
        "- a",
        "!x",
        "~",
        "null",
        "a: [b",
        "%20",
        "`x`",
        "C:\\x",
    ],
)
def test_a_path_on_the_command_line_is_what_was_typed(path: str, tmp_path: Path) -> None:
    """YAML would cut a folder's name at ' #' without a word, and refuse others."""
    assert loaded(tmp_path, "", f"data.videos={path}").data.videos == path


def test_quotes_on_the_command_line_are_yamls(tmp_path: Path) -> None:
    """A text with a blank at its end, or an empty one, needs them."""
    assert loaded(tmp_path, "", "data.videos='a #b '").data.videos == "a #b "
    assert loaded(tmp_path, "", 'data.videos="a\\u0062"').data.videos == "ab"
    assert loaded(tmp_path, "", "data.videos=").data.videos == ""
    assert loaded(tmp_path, "", "data.videos='null'").data.videos == "null"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("010", "octal number; write 8 or 10"),
        ("-010", "octal number; write -8 or -10"),
        ("0_10", "octal number; write 8 or 10"),
        ("1:30", "number in base 60; write 90"),
        ("1:30.5", "number in base 60; write 90.5"),
        ("0x10", "hexadecimal number; write 16"),
        ("0b11", "binary number; write 3"),
    ],
)
def test_numbers_that_are_not_decimal_are_refused_with_what_to_write(
    text: str, said: str, tmp_path: Path
) -> None:
    """Ten epochs were asked for, or a minute and a half, and eight and ninety would be taken silently."""
    for message in (
        message_of(tmp_path, "", f"train.epochs={text}", "train.lr=-1"),
        message_of(tmp_path, f"train:\n  epochs: {text}\n  lr: -1\n"),
    ):
        assert "2 faults" in message, "beside the others"
        assert f"train.epochs: got {text}, which YAML takes for a" in message
        assert said in message


def test_in_an_extended_file_and_a_list_they_are_refused_too(tmp_path: Path) -> None:
    """A recipe is written in files more often than typed."""
    (tmp_path / "base.yaml").write_text("cluster: {wait_s: 1:30}\n")
    assert "cluster.wait_s: got 1:30" in message_of(tmp_path, "extends: base.yaml\n")
    assert loaded(tmp_path, "extends: base.yaml\ncluster: {wait_s: 90}\n").cluster.wait_s == 90
    assert "sources.schemes: got 010" in message_of(tmp_path, "sources: {schemes: [010]}\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), ("08", 8), ("09", 9), ("+8", 8), ("1_000", 1000), ("0", None), ("'8'", 8), ("0o10", None)],
)
def test_decimal_numbers_are_taken(text: str, value: int | None, tmp_path: Path) -> None:
    """A value with one reading needs no refusal."""
    if value is None:
        assert f"train.epochs: got {text}" in message_of(tmp_path, "", f"train.epochs={text}").replace(
            "'", ""
        )
    else:
        assert loaded(tmp_path, "", f"train.epochs={text}").train.epochs == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs=yes", "train.epochs: got yes; true and false are no value of this key"),
        ("train.epochs=2024-01-05", "train.epochs: got 2024-01-05; "),
        ("train.lr=-1_000.0", "train.lr: got -1_000.0; "),
        ("train.epochs=0x_", "train.epochs: got 0x_"),
        ("train.run=no/more/of", "train.run: got 'no/more/of'; "),
    ],
)
def test_messages_show_what_was_typed(override: str, said: str, tmp_path: Path) -> None:
    """A person looks for what they typed, not for what YAML made of it."""
    assert said in message_of(tmp_path, "", override)
    key, _, value = override.partition("=")
    section, name = key.split(".")
    assert said in message_of(tmp_path, f"{section}:\n  {name}: {value}\n")


@pytest.mark.parametrize(
    "text",
    [
        *("{[1]: 2}", "{{a: 1}: 2}", "train: {010: 1}", "1: {2: 3}", "!!bool maybe"),
        *(f"train: {'[' * 5_000}", f"train: {'{a: ' * 5_000}"),
    ],
)
def test_odd_yaml_is_one_message(text: str, tmp_path: Path) -> None:
    """No slip in a file may end in a traceback."""
    assert "own.yaml" in message_of(tmp_path, text)
    assert "own.yaml" in message_of(tmp_path, "", f"train={text}")


def test_switches_in_files_still_switch(tmp_path: Path) -> None:
    """The words of YAML for true and false keep their meaning where a key is a switch."""
    config = loaded(tmp_path, "train: {resume: no, compile: off}\ncluster: {use_gpu: yes}\n")
    assert config.train.resume is False
    assert config.train.compile == "off"
    assert config.cluster.use_gpu is True


def test_plain_mappings_are_taken_as_they_are() -> None:
    """A checkpoint's settings have been read by another loader."""
    tree: dict[str, Any] = {"train": {"epochs": 8, "run": "010"}}
    assert parse_config(tree).train.run == "010"
