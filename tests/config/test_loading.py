"""gare/config.py: the one thing that every user edits."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from gare.config import Config, Section, describe_keys, load_config, parse_config
from gare.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text("name: mine\ntrain:\n  epochs: 3\n  clip_lr: 1e-6\n", encoding="utf-8")
    return path


def message_of(tree: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, overrides, where="own.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def sections(section: type[BaseModel] = Config) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation)


def test_file_then_overrides(file: Path) -> None:
    """A command line that does not win over the file trains something else than was asked for."""
    config = load_config(file, ["train.epochs=7", "model.clip.text_layers=2", "data.captions=a=b.csv"])
    assert config.name == "mine"
    assert config.train.epochs == 7
    assert config.train.clip_lr == 1e-6
    assert config.model.clip.text_layers == 2
    assert config.data.captions == "a=b.csv"
    assert config.train.lr == Config().train.lr
    assert load_config(str(file)).train.epochs == 3
    assert load_config(file, ["train.epochs=7", "train.epochs=8"]).train.epochs == 8


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    """Nobody should have to copy all keys to begin."""
    path = tmp_path / "empty.yaml"
    path.write_text(text)
    assert load_config(path) == Config()


def test_an_empty_value_clears_a_text(file: Path) -> None:
    """`tracking.uri=` in a shell script has to mean an empty text, not null."""
    assert load_config(file, ["cluster.address="]).cluster.address == ""


def test_overrides_leave_the_mapping_alone() -> None:
    """A checkpoint's settings that change on being read would be saved changed."""
    tree = {"train": {"epochs": 3}}
    assert parse_config(tree, ["train.epochs=4"]).train.epochs == 4
    assert tree == {"train": {"epochs": 3}}


def test_round_trip(file: Path, rng: np.random.Generator, tmp_path: Path) -> None:
    """The saved configuration has to repeat the run, to the last digit."""
    overrides = [
        f"train.lr={rng.uniform(1e-9, 1e-3)!r}",
        f"loss.direction_alpha={rng.uniform(1e-3, 9)!r}",
        f"train.seed={rng.integers(2**31)}",
        "data.videos='été: #1 日本語 🎬'",
        "data.captions='null'",
        "train.run=2020-01-01_1",
        "model.gap_sign=-1",
    ]
    config = load_config(file, overrides)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(saved) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_storage_root_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps find each other's outputs by it; the file and the command line still win."""
    monkeypatch.setenv("GARE_ROOT", "/mnt/shared")
    assert parse_config({}).storage.root == "/mnt/shared"
    assert parse_config({"storage": {"root": "/mine"}}).storage.root == "/mine"
    assert ("storage.root", "/mnt/shared") in [(key, default) for key, default, _ in describe_keys()]
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("GARE_ROOT")
        else:
            monkeypatch.setenv("GARE_ROOT", unset)
        assert parse_config({}).storage.root == "~/.gare"


def test_configurations_are_frozen() -> None:
    """A value changed half-way would not be the one that was logged."""
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"
    with pytest.raises(ValidationError, match="frozen"):
        config.train.epochs = 1
    for section in sections():
        assert section.model_config["frozen"], section
        assert section.model_config["extra"] == "forbid", section


@pytest.mark.parametrize(
    ("tree", "overrides", "parts"),
    [
        ({"trian": {}}, [], ["trian: unknown key", "nearest: train;", "known here: name, storage"]),
        ({"train": {"epoch": 1}}, [], ["train.epoch: unknown key", "nearest: train.epochs;"]),
        ({}, ["model.clip.text_layer=1"], ["model.clip.text_layer:", "nearest: model.clip.text_layers;"]),
        ({"train": {"zzz": 1}}, [], ["train.zzz: unknown key (known here: run, input, seed, epochs"]),
        ({1: 2}, [], ["1:", "keys should be strings"]),
    ],
)
def test_unknown_keys(tree: Any, overrides: list[str], parts: list[str]) -> None:
    """A mistyped key that is ignored costs a night's run with the wrong settings."""
    message = message_of(tree, *overrides)
    assert "nearest: train.zzz" not in message
    for part in ["own.yaml", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epochs=many", ["train.epochs: got 'many'", "valid integer"]),
        ("train.epochs=2.5", ["train.epochs: got 2.5", "valid integer"]),
        ("train.epochs=0", ["train.epochs: got 0", "greater than or equal to 1"]),
        ("train.lr=-1", ["train.lr: got -1", "greater than or equal to 0"]),
        ("train.lr=.nan", ["train.lr: got nan"]),
        ("train.lr=.inf", ["train.lr: got inf"]),
        ("extract.max_failed_fraction=1.5", ["got 1.5", "less than or equal to 1"]),
        ("extract.encoding=png", ["extract.encoding: got 'png'", "'jpeg' or 'raw'"]),
        ("extract.crop=left", ["extract.crop: got 'left'", "'center' or 'none'"]),
        ("data.noise=1", ["data.noise: got 1", "less than 1"]),
        ("data.noise=.nan", ["data.noise: got nan"]),
        ("evaluate.split=validate", ["evaluate.split: got 'validate'", "'train', 'val' or 'test'"]),
        ("evaluate.dsl_scale=50", ["evaluate: dsl_scale would change nothing: dsl is off"]),
        ("evaluate.qbnorm_bank=9", ["evaluate: qbnorm_bank would change nothing: qbnorm is off"]),
        ("evaluate.resamples=-1", ["evaluate.resamples: got -1"]),
        ("model.gap_sign=0", ["model.gap_sign: got 0", "1 or -1"]),
        ("train.resume=perhaps", ["train.resume: got 'perhaps'", "valid boolean"]),
        ("train.run=a/b", ["train.run: got 'a/b'", "should match pattern"]),
        ("train.run=../up", ["train.run: got '../up'", "should match pattern"]),
        ("name=[2020]", ["name: got [2020]", "valid string"]),
        ("train=5", ["train: got 5"]),
        ("train.epochs.x=1", ["train.epochs: got {'x': 1}"]),
        ("train.epochs=", ["train.epochs: got ''"]),
    ],
)
def test_bad_values_say_key_value_and_what_is_accepted(override: str, parts: list[str]) -> None:
    """Without all three a person has to read the source."""
    message = message_of({}, override)
    assert "1 fault:" in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.val_fraction=0.5", "data.test_fraction=0.5"], ["data: val_fraction + test_fraction"]),
        (["model.clip.text_width=500"], ["model.clip: text_width 500", "text_heads 8"]),
        (["model.clip.vision_heads=7"], ["model.clip: vision_width 768", "vision_heads 7"]),
        (["model.clip.patch_size=30"], ["model.clip: image_size 224", "patch_size 30"]),
        (["model.max_words=78"], ["model: max_words 78", "clip.max_positions 77"]),
        (["model.max_frames=78", "extract.num_frames=78"], ["model: max_frames 78"]),
        (["model.increment_heads=3"], ["model: clip.embed_dim 512", "increment_heads 3"]),
        (["model.temporal_heads=3"], ["model: clip.embed_dim 512", "temporal_heads 3"]),
        (["extract.num_frames=8"], ["extract.num_frames 8", "model.max_frames 12"]),
        (["extract.image_size=64"], ["extract.image_size 64", "model.clip.image_size 224"]),
        (["extract.crop=none", "extract.encoding=raw"], ["extract: crop none needs encoding jpeg, not raw"]),
        (
            ["train.batch_size=2", "cluster.train_workers=3"],
            ["train.batch_size 2", "cluster.train_workers 3"],
        ),
        (["cluster.min_workers=3"], ["cluster.min_workers 3", "cluster.train_workers 2"]),
        (["cluster.min_workers=1", "cluster.placement=strict_spread"], ["strict_spread", "min_workers"]),
    ],
)
def test_keys_that_contradict_each_other(overrides: list[str], parts: list[str]) -> None:
    """Found here in a second, and otherwise after hours of extraction."""
    message = message_of({}, *overrides)
    for part in parts:
        assert part in message


def test_all_faults_at_once() -> None:
    """Found one by one, these are seven runs."""
    tree = {"nam": "x", "train": {"epochs": 0, "rnu": "x"}, "model": {"clip": {"text_width": "wide"}}}
    message = message_of(tree, "train.lr=x", "no-equals", "data.seed=[", "=1")
    for part in (
        "8 faults:",
        "nam: unknown key (nearest: name;",
        "train.epochs: got 0",
        "train.rnu: unknown key (nearest: train.run;",
        "model.clip.text_width: got 'wide'",
        "train.lr: got 'x'",
        "override 'no-equals' is not of the form section.key=value",
        "override 'data.seed=[': the value is not YAML",
        "override '=1' is not of the form",
    ):
        assert part in message
    both = message_of({}, "train.batch_size=2", "cluster.train_workers=3", "extract.num_frames=8")
    assert "train.batch_size" in both
    assert "extract.num_frames" in both


@pytest.mark.parametrize("override", ["name='2020", "name=[", "train..epochs=1", ".name=x", "name"])
def test_overrides_that_are_none(override: str) -> None:
    """A slip on the command line must not end in a traceback."""
    assert f"override {override!r}" in message_of({}, override)


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "name: '2020\n", "\ta: 1", "name: !!python/object:os.x"])
def test_files_that_are_not_yaml(tmp_path: Path, text: str) -> None:
    """The message names the file, since several are in conf/."""
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is not YAML") as caught:
        load_config(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "5"])
def test_files_that_are_no_mapping(tmp_path: Path, text: str) -> None:
    """A captions file given by mistake is told apart from a configuration."""
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="a mapping of sections"):
        load_config(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """The most common slip of all: a wrong path."""
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            load_config(path)
        assert caught.value.where == str(path)
        assert "conf/demo.yaml" in caught.value.accepted


def test_a_file_without_a_name() -> None:
    """An unset variable in a shell script, which is no folder."""
    with pytest.raises(ConfigError, match=r"no file is named \(a YAML file .* one of: activitynet"):
        load_config("")


#: A part turned off, and a setting of another file that only shapes this part.
IDLE = [
    ("extract.sampling=uniform", "extract.sample_fps=2"),
    *(("model.increment=false", f"model.{key}") for key in ("corrected_side=video", "context=words")),
    *(("model.increment=false", f"model.{key}") for key in ("gap_sign=-1", "query=text")),
    *(("model.increment=false", f"model.{key}") for key in ("increment_layers=2", "padding=released")),
    ("model.query=text", "model.gap_sign=-1"),
    ("model.temporal=none", "model.temporal_layers=2"),
    ("model.temporal=none", "model.temporal_heads=2"),
    ("model.pooling=mean", "model.pool_temperature=5"),
    ("loss.direction_form=orthogonality", "loss.direction_alpha=3"),
    ("train.optimizer=adamw", "train.schedule_epochs=5"),
    *((f"train.precision={one}", "train.encoder_gradient_divisor=2") for one in ("auto", "float32", "bf16")),
    *(("augment.operations=0", f"augment.{key}") for key in ("magnitude=9", "noise=0.1", "probability=0.2")),
    *(("evaluate.test_curve=true", f"evaluate.{key}") for key in ("checkpoint=a", "dsl=true", "qbnorm=true")),
    ("evaluate.zero_shot=true", "evaluate.checkpoint=a"),
    ("evaluate.dsl=false", "evaluate.dsl_scale=50"),
    *(("evaluate.qbnorm=false", f"evaluate.{key}") for key in ("qbnorm_scale=5", "qbnorm_bank=9")),
    ("evaluate.suite=", "evaluate.runs=[a]"),
]


def as_yaml(*items: str) -> str:
    """Settings of a command line as the text of a file."""
    tree: dict[str, Any] = {}
    for item in items:
        dotted, _, value = item.partition("=")
        section, key = dotted.split(".")
        tree.setdefault(section, {})[key] = yaml.safe_load(value) if value else ""
    return yaml.safe_dump(tree)


@pytest.mark.parametrize(("switch", "shaping"), IDLE)
def test_a_part_turned_off_leaves_out_what_shaped_it(switch: str, shaping: str, tmp_path: Path) -> None:
    """A baseline is one setting over the file of the model that it is compared with."""
    beside = ["model.increment=false"] if switch == "model.pooling=mean" else []
    write(
        tmp_path,
        base=as_yaml(shaping),
        own="extends: base.yaml\n" + as_yaml(switch, *beside),
        both=as_yaml(shaping, switch, *beside),
        off=as_yaml(switch, *beside),
        shaped="extends: off.yaml\n" + as_yaml(shaping),
        last="extends: own.yaml",
    )
    turned_off = parse_config({}, [switch, *beside])
    assert load_config(tmp_path / "base.yaml", [switch, *beside]) == turned_off
    assert load_config(tmp_path / "own.yaml") == load_config(tmp_path / "last.yaml") == turned_off
    assert load_config(tmp_path / "both.yaml", [switch]) == turned_off
    # In one place, or where the key was added to a part that is off, one of the two is a slip.
    for path, overrides in (
        ("both", []),
        ("shaped", []),
        ("off", [shaping]),
        ("base", [switch, *beside, shaping]),
        ("shaped", [switch, shaping]),
    ):
        with pytest.raises(ConfigError, match="would change nothing"):
            load_config(tmp_path / f"{path}.yaml", overrides)


def test_every_key_is_described() -> None:
    """A key that --help does not explain can only be found in the source."""
    described = list(describe_keys())
    values = dict(leaves(Config().model_dump(mode="json")))
    assert [key for key, _, _ in described] == list(values)
    for key, default, description in described:
        assert description.strip(), key
        assert yaml.safe_load(default) == values[key], key
        assert "\n" not in default, key
    for section in sections():
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert not field.is_required(), f"{section.__name__}.{name}"


def test_a_described_default_can_be_given_back() -> None:
    """What --help prints can be copied onto the command line."""
    overrides = [f"{key}={default}" for key, default, _ in describe_keys()]
    assert parse_config({}, overrides) == Config()


#: Where a URI may stand, and URIs with what must stay out of a configuration.
URI_KEYS = ("tracking.uri", "storage.root", "data.videos", "features.weights", "cluster.address")
SECRET_URIS = (
    *("http://me:hush@host:5000", "https://hush@host", "s3://key:hush@bucket/a", "ray://x:hush@host:1"),
    *("postgresql+psycopg2://me:hu/sh#hush@host/db", "mysql://host/db?user=me&password=hush"),
    *("https://host/a?X-Amz-Signature=hush&x=1", "https://host/a?sig=hush"),
    *(f"https://host/a?x=1&{key}=hush" for key in ("access_token", "private_token", "key", "client_secret")),
    *(
        f"https://host/a?{key}=hush&x=1"
        for key in ("Key-Pair-Id", "X-Goog-Credential", "hmac", "Authorization")
    ),
    *("https://host/a#access_token=hush", "https://host/a?%74oken=hush", "https://host/a?design_key=hush"),
    *(
        f"s3://bucket/a?region=eu-west-1&{rest}"
        for rest in (
            "endpoint_override=http://me:hush@host:9000",
            "endpoint_override=http%3A%2F%2Fme%3Ahush%40host",
            "endpoint_override=http%253A%252F%252Fme%253Ahush%2540host%252Fa",
            "endpoint_override=http%3A%2F%2Fhost%3Ftoken%3Dhush",
            "endpoint_override=http%3A%2F%2Fhost%3Fa%3Db%26api_key%3Dhush",
            "secret_key=hush",
            "session_token=hush",
        )
    ),
    *("https://host/http://me:hush@other/a", "https://host/a?to=https%3A%2F%2Fhush%40other"),
    *("https://host/a?hdnts=exp=1~acl=/*~hmac=hush", "https://host/a?x=1%7Ehmac%3Dhush"),
    *(f"https://host/a?{key}=hush" for key in ("pass", "pw", "sas", "jsessionid")),
    "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BUID%3Dme%3BPWD%3Dhush",
)


@pytest.mark.parametrize("uri", SECRET_URIS)
@pytest.mark.parametrize("key", URI_KEYS)
def test_secrets_in_uris_are_refused_and_not_shown(key: str, uri: str) -> None:
    """The configuration is saved beside every output and logged to MLflow, where others read it."""
    section, name = key.split(".")
    message = message_of({section: {name: uri}})
    assert key in message
    assert "environment" in message
    assert "hush" not in message


@pytest.mark.parametrize("uri", SECRET_URIS)
def test_secrets_are_not_shown_by_other_faults(uri: str, tmp_path: Path) -> None:
    """A slip of the key, the type or the quotes is the likeliest moment for one to land in a log."""
    assert "hush" not in message_of({}, f"tracking.uri=[{uri}]")
    assert "hush" not in message_of({}, uri)
    assert "hush" not in message_of({}, f"tracking.uri={{{uri}")
    assert "hush" not in message_of({"tracking": {"ury": uri}})
    path = tmp_path / "bad.yaml"
    path.write_text(f"tracking:\n  uri: {uri}\n  uri: [{uri}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        *("http://host:5000/a@b", "postgresql+psycopg2://mlflow@host/db", "sqlite:////data/a@b:c.db"),
        *("s3://bucket/a@b?region=eu-west-1", "/data/me:you@here", "postgresql://me@host/db?opt=a:b@c"),
        *(
            f"https://host/a?{key}=x"
            for key in ("design", "author", "keywords", "keyframes", "sigma", "signal")
        ),
        *("https://host/token/key=x?page=2", "/data/a?token=x", "https://host/a?key=", "/secrets/key.pem"),
        "s3://bucket/a?endpoint_override=http%3A%2F%2F127.0.0.1%3A9000&scheme=http&region=us-east-1",
        "postgresql+psycopg2://me@host/db?sslmode=verify-full&sslkey=/etc/a.key&require_auth=scram",
    ],
)
def test_uris_without_secrets_are_accepted(uri: str) -> None:
    """A refusal of names and paths that people have would teach them to work around it."""
    assert parse_config({"tracking": {"uri": uri}}).tracking.uri == uri


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def test_a_file_extends_another(tmp_path: Path) -> None:
    """Else every variant of a recipe is a copy of it, and a correction reaches some of them."""
    (tmp_path / "deep").mkdir()
    write(
        tmp_path,
        first="name: first\ntrain: {epochs: 3, lr: 1e-3, seed: 1}\nmodel: {clip: {text_layers: 2}}\n",
        second="extends: first.yaml\nname: second\ntrain: {epochs: 4}\nmodel:\n  clip: {vision_layers: 2}",
        alone="extends: second.yaml",
    )
    write(
        tmp_path / "deep",
        third="extends: ../second.yaml\ntrain: {epochs: 9, seed: 2}\nmodel:\nevaluate: {compare: [a, b]}",
        named="extends: msrvtt\nname: mine\n",
    )
    config = load_config(tmp_path / "deep" / "third.yaml", ["train.seed=3"])
    assert (config.name, config.train.epochs, config.train.lr, config.train.seed) == ("second", 9, 1e-3, 3)
    assert (config.model.clip.text_layers, config.model.clip.vision_layers) == (2, 2)
    assert config.evaluate.compare == ("a", "b")
    assert load_config(tmp_path / "alone.yaml") == load_config(tmp_path / "second.yaml")
    assert "extends" not in config.to_yaml()
    named = load_config(tmp_path / "deep" / "named.yaml")
    assert named == load_config("msrvtt", ["name=mine"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: nowhere", "extends: there is no file .*nowhere and no shipped one.*activitynet, demo"),
        ("extends: ../nowhere.yaml", r"extends: there is no file .*\.\./nowhere\.yaml"),
        ("extends: s3://bucket/a.yaml", "extends: there is no file"),
        ("extends: .", "extends: there is no file"),
        ("extends: own.yaml", r"extends: goes in a circle: own\.yaml → own\.yaml"),
        (
            "extends: other.yaml",
            r"extends: goes in a circle: own\.yaml → other\.yaml → own\.yaml \(a last file that extends none",
        ),
        *(
            (f"extends: {value}", "extends: got .*a path, seen from this file")
            for value in ("3", "[a]", "''")
        ),
        ("extends:", "extends: got None"),
        ("extends: list.yaml", r"list\.yaml: top level is a list"),
        ("extends: broken.yaml", r"broken\.yaml: is not YAML"),
        ("train: {extends: other.yaml}", "train.extends: unknown key"),
    ],
)
def test_a_wrong_extends_is_one_message(text: str, said: str, tmp_path: Path) -> None:
    """Half a recipe, taken in silence, trains another model than was asked for."""
    write(tmp_path, own=text, other="extends: own.yaml", list="- a", broken="a: [")
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(tmp_path / "own.yaml")
    assert caught.value.exit_code == 2


def test_faults_name_the_file_that_they_are_in(tmp_path: Path) -> None:
    """The file that was given may hold two lines, and the fault be three files away."""
    write(
        tmp_path,
        first="trian: {}\ntrain: {epochs: 0, lr: x, seed: -1}\nname: ok",
        second="extends: first.yaml\ntrain: {seed: -2}",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "second.yaml", ["train.lr=y"])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{tmp_path / 'second.yaml'}: 4 faults")
    inherited = {line.split()[1] for line in lines[1:] if line.endswith(f"(in {tmp_path / 'first.yaml'})")}
    assert inherited == {"trian:", "train.epochs:"}


def test_settings_from_data_extend_nothing(tmp_path: Path) -> None:
    """A checkpoint from elsewhere must not have files read that nobody named."""
    write(tmp_path, own="name: mine")
    assert "extends: unknown key" in message_of({"extends": str(tmp_path / "own.yaml")})
    assert "extends: unknown key" in message_of({}, f"extends={tmp_path / 'own.yaml'}")
