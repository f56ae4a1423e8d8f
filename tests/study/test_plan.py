"""The plan of a study: every combination, a name for each, and faults said before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gare.config import Config, load_config, parse_config
from gare.errors import ConfigError
from gare.study.plan import SHIPPED, StudyFile, StudyPlan, read_study
from gare.study.plan import plan_study as plan_with_starts
from tests.helpers.pipelines import tiny

NOISE = {
    "title": "Noise",
    "factors": {
        "model": {"baseline": {"model.increment": False}, "gare": {}},
        "pairs": {"clean": {}, "few": {"data.num_train": 12}},
    },
    "reference": {"factor": "model", "level": "baseline"},
    "common": {"train.epochs": 2},
    "seeds": [3, 4],
}


def file(**changes: object) -> StudyFile:
    return StudyFile.model_validate(NOISE | changes)


def plan_study(config: Config, name: str, found: StudyFile, seeds: int | None = None) -> StudyPlan:
    return plan_with_starts(config, name, found, seeds, checkpoint_of=checkpoint_of)


def checkpoint_of(config: Config) -> str:
    return f"/runs/{config.name}/{config.train.run}/best"


def test_a_grid_has_every_combination_once_a_seed() -> None:
    plan = plan_study(tiny(), "noise", file())
    assert [cell.name for cell in plan.cells] == ["baseline-clean", "baseline-few", "gare-clean", "gare-few"]
    assert [(run.cell.name, run.seed) for run in plan.runs[:5]] == [
        *((cell.name, 3) for cell in plan.cells),
        ("baseline-clean", 4),
    ]
    first, last = plan.runs[0].config, plan.runs[-1].config
    assert (first.train.run, first.train.seed, first.train.epochs) == ("noise-baseline-clean-seed3", 3, 2)
    assert (first.model.increment, last.model.increment) == (False, True)
    assert len({run.name for run in plan.runs}) == len({run.digest for run in plan.runs}) == 8


def test_a_level_that_changes_the_data_has_a_data_set_of_its_own() -> None:
    """Two manifests in one folder would replace each other."""
    plan = plan_study(tiny(), "noise", file())
    names = {run.cell.name: run.config.name for run in plan.runs}
    assert names == {
        "baseline-clean": "tiny",
        "gare-clean": "tiny",
        "baseline-few": "tiny-few",
        "gare-few": "tiny-few",
    }
    assert {name: one.data.num_train for name, one in plan.data_sets().items()} == {
        "tiny": 24,
        "tiny-few": 12,
    }


def test_each_setting_is_compared_with_the_reference_beside_it() -> None:
    pairs = plan_study(tiny(), "noise", file()).comparisons()
    assert [(one.name, other.name) for one, other in pairs] == [
        ("baseline-clean", "gare-clean"),
        ("baseline-few", "gare-few"),
    ]


def test_runs_start_from_one_run_for_each_seed_and_data_set() -> None:
    """Models that are compared must begin with the same encoders, learned from the same pairs."""
    factors = NOISE["factors"] | {
        "encoders": {"scratch": {"train.start_from": ""}, "slow": {"train.lr": 0.1}}
    }
    plan = plan_study(tiny(), "noise", file(factors=factors, start={"model.increment": False}))
    assert [(one.config.name, one.name) for one in plan.starts] == [
        ("tiny", "noise-start-seed3"),
        ("tiny-few", "noise-start-few-seed3"),
        ("tiny", "noise-start-seed4"),
        ("tiny-few", "noise-start-few-seed4"),
    ]
    assert {one.config.model.increment for one in plan.starts} == {False}
    assert {one.config.train.epochs for one in plan.starts} == {2}
    for run in plan.runs:
        if run.cell.levels["encoders"] == "scratch":
            assert (run.start, run.config.train.start_from) == (None, "")
        else:
            assert run.start in plan.starts
            assert (run.start.seed, run.start.config.data) == (run.seed, run.config.data)
            assert run.config.train.start_from == checkpoint_of(run.start.config)
    assert len({run.digest for run in (*plan.starts, *plan.runs)}) == 20


def test_some_settings_are_selected_with_what_they_start_from() -> None:
    factors = {
        "model": NOISE["factors"]["model"],
        "encoders": {"scratch": {"train.start_from": ""}, "slow": {"train.lr": 0.1}},
    }
    plan = plan_study(tiny(), "noise", file(factors=factors, start={"model.increment": False}))
    assert plan.select("") == (*plan.starts, *plan.runs)
    chosen = [one.name for one in plan.select("gare-slow, baseline-scratch")]
    assert chosen == [
        *(f"noise-start-seed{seed}" for seed in (3, 4)),
        *(f"noise-{cell}-seed{seed}" for seed in (3, 4) for cell in ("baseline-scratch", "gare-slow")),
    ]
    assert all(one.start is None for one in plan.select("gare-scratch,baseline-scratch"))
    with pytest.raises(
        ConfigError, match=r"no setting gare, x in study noise.*baseline-scratch, baseline-slow"
    ):
        plan.select("gare,x,gare-slow")


def test_a_start_on_other_data_has_a_data_set_of_its_own() -> None:
    """As towers have that were trained on other videos than those that are retrieved."""
    start = {"model.increment": False, "data.seed": 7}
    plan = plan_study(tiny(), "noise", file(factors={"model": NOISE["factors"]["model"]}, start=start))
    assert {(one.config.name, one.config.data.seed) for one in plan.starts} == {("tiny-start", 7)}
    assert {(one.config.name, one.config.data.seed) for one in plan.runs} == {("tiny", 0)}
    assert {one.config.train.start_from for one in plan.runs} == {
        f"/runs/tiny-start/noise-start-seed{seed}/best" for seed in (3, 4)
    }


@pytest.mark.parametrize(("count", "seeds"), [(1, (3,)), (4, (3, 4, 5, 6))])
def test_number_of_seeds(count: int, seeds: tuple[int, ...]) -> None:
    """More seeds go on behind those of the file, so that what is done stays."""
    assert plan_study(tiny(), "noise", file(), count).seeds == seeds


def test_a_digest_is_of_what_changes_the_result_alone() -> None:
    def digest(*overrides: str) -> str:
        return plan_study(tiny(*overrides), "noise", file()).runs[0].digest

    assert digest() == digest("cluster.train_workers=1", "study.parallel=3", "train.keep_checkpoints=5")
    assert len({digest(), digest("train.lr=0.5"), digest("data.seed=1"), digest("evaluate.dsl=true")}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": {"factor": "model", "level": "nothing"}}, "model: nothing is no level"),
        ({"expected": {"nothing": "better"}}, "expected names nothing"),
        ({"seeds": [1, 1]}, "given twice"),
        ({"seeds": []}, "seeds"),
        ({"common": {"train.seed": 3}}, "common sets train.seed, which the study sets itself"),
        ({"common": {"lr": 3}}, "keys are section.key"),
        ({"factors": {"model": {"a b": {}}}}, "factors"),
        ({"measure": "t2v/MdR"}, "measure"),
        ({"tilte": ""}, "tilte"),
        ({"start": {"train.run": "mine"}}, "start sets train.run, which the study sets itself"),
        ({"start": {}, "factors": {"model": {"start": {}, "baseline": {}}}}, "a level has the name start"),
    ],
    ids=str,
)
def test_faults_of_a_file_are_said(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(NOISE | change))
    with pytest.raises(ConfigError) as raised:
        read_study(str(path))
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_faults_of_all_levels_are_in_one_message() -> None:
    factors = {"model": {"baseline": {"model.incremnt": False}, "gare": {"train.lr": -1}}}
    with pytest.raises(ConfigError) as raised:
        plan_study(tiny(), "noise", file(factors=factors))
    assert "model.incremnt" in str(raised.value)
    assert "train.lr" in str(raised.value)


def test_settings_mean_what_they_mean_on_the_command_line(tmp_path: Path) -> None:
    """YAML reads 1e-5 as a text, off as false and 010 as 8; the key decides."""
    text = yaml.safe_dump(NOISE).replace("gare: {}", "gare: {train.lr: 1e-5, train.compile: off}")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    config = plan_study(tiny(), *read_study(str(path))).runs[-1].config
    assert (config.train.lr, config.train.compile, config.train.epochs) == (1e-5, "off", 2)
    path.write_text(text.replace("1e-5", "010"))
    with pytest.raises(ConfigError, match="octal"):
        plan_study(tiny(), *read_study(str(path)))


@pytest.mark.parametrize("name", ["nois", "../noise", "no/such.yaml", ""])
def test_an_unknown_study_is_refused_with_those_that_ship(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no study"):
        read_study(name)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_fits_the_paper_and_the_demo(path: Path, repository: Path) -> None:
    """Its keys must be those of this version."""
    name, found = read_study(path.stem)
    assert name == path.stem
    config = parse_config({"train": {"clip_weights": "weights.pt"}, "name": "own"})
    plan = plan_study(config, name, found)
    assert plan.comparisons()
    assert found.question


@pytest.mark.parametrize("path", sorted(SHIPPED.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_finished_baseline_does_not_learn(path: Path) -> None:
    """With towers that learn on, what Δ adds would be compared with another model."""
    plan = plan_study(load_config(str(path)), *read_study("finished"))
    rates = {
        run.cell.name: (run.config.train.lr, run.config.train.clip_lr, run.config.train.freeze)
        for run in plan.runs
    }
    assert rates["finished"][:2] == (0, 0)
    assert min(rates["head"][0], rates["zero-head"][0]) > 0
    assert rates["head"][2] == rates["zero-head"][2] == "baseline"


def test_the_studies_of_the_documentation_ship(repository: Path) -> None:
    """A name in the README that is no file costs a newcomer the first try."""
    tables = {f"paper-table-{number}" for number in range(3, 10)}
    names = {
        "noise",
        "dropout",
        "frozen",
        "start",
        "finished",
        "pretrained",
        "candidates",
        "batch",
        "rates",
        "short",
    }
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == tables | names
    readme = (repository / "README.md").read_text()
    section = readme[readme.index("\n### Studies") :]
    assert not [name for name in names if f"`{name}`" not in section[: section.index("\n## ")]]
