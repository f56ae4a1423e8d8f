"""The table that people choose between runs by: it compares what is comparable, and says what is not."""

from __future__ import annotations

import dataclasses
import io
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from gare.data.splits import split_hash, split_hash_of
from gare.errors import DataError
from gare.report.table_picture import table_picture
from gare.retrieval.results.evaluation import Evaluation, evaluation_pairs
from gare.retrieval.results.paper_scores import LOOKS, published_scores
from gare.retrieval.results.table import COLUMNS, comparison_table, suite_table
from tests.retrieval.results.test_compare import gallery, run_of


def evaluated(name: str, rng: np.random.Generator, strength: float, **changes: object) -> Evaluation:
    rows = gallery()
    queries = run_of(rows, rng, strength)
    ranks = queries.of_direction("t2v")["rank"].to_numpy()
    measured_on = {
        "benchmark": "msvd",
        "protocol": "1,200/100/670 videos, all captions",
        "split": "test",
        "split_sha256": split_hash_of(rows),
        "num_texts": 3 * len(rows),
        "num_videos": len(rows),
    } | changes
    metrics = {"t2v/R1": 100 * float((ranks <= 1).mean()), "t2v/MnR": float(ranks.mean())}
    return Evaluation(name, "", measured_on, "gare", 0, "s", metrics, {"t2v/R1": [1.0, 2.0]}, queries)


def test_a_difference_is_shown_beside_the_paper(rng: np.random.Generator) -> None:
    """A person sees which run is better, by how much, and how far both are from the paper."""
    first, second = evaluated("d/weak", rng, 1.0), evaluated("d/strong", rng, 4.0)
    table = comparison_table([(first, second)], resamples=200, seed=0, title="two")
    gain = second.metrics["t2v/R1"] - first.metrics["t2v/R1"]
    assert table.numbers["msvd/t2v/R1/difference"] == pytest.approx(gain)
    text = table.markdown()
    assert f"{gain:+.1f} [" in text
    assert "d/strong is better" in text
    assert re.search(r"paper, gare \| 46\.4 \| 76\.1 \| 84\.5 \|  \| 10\.6", text)
    assert "NOT COMPARABLE" not in text


def test_what_is_better_is_marked(rng: np.random.Generator) -> None:
    """The eye finds the better run by the mark; of ranks the lower one is better, of recalls the higher."""
    weak, strong = evaluated("d/weak", rng, 1.0), evaluated("d/strong", rng, 4.0)
    recall, rank = (COLUMNS.index(name, 1) for name in ("t→v R@1", "MnR"))
    for pair, marked in (((weak, strong), "better"), ((strong, weak), "worse")):
        (section,) = comparison_table([pair], resamples=200, seed=0, title="two").sections
        (row,) = [row for row in section.rows if row.kind == "difference"]
        assert {recall, rank} <= getattr(row, marked)
        assert not row.better & row.worse
        assert f"**{row.cells[recall]}**" in row.markdown()
    (section,) = comparison_table([(weak, weak)], resamples=50, seed=0, title="same").sections
    assert not any(row.better | row.worse for row in section.rows)
    other = dataclasses.replace(strong, model="baseline", settings="t")
    (section,) = suite_table([weak, other], title="suite").sections
    means = {row.cells[0].partition(":")[0]: row.better for row in section.rows if row.kind == "mean"}
    assert means == {"gare": frozenset(), "baseline": {recall, rank}}
    (section,) = suite_table([weak], title="one").sections
    assert not any(row.better for row in section.rows), "there is nothing that it is better than"


def test_folders_of_ones_own_are_told_apart(rng: np.random.Generator) -> None:
    """All of them are read by the same reader, and are as different as benchmarks can be."""
    runs = [evaluated(f"{name}/a", rng, 1.0, benchmark="folder", protocol=name) for name in ("cats", "dogs")]
    table = suite_table(runs, title="own")
    assert {name.split("/")[0] for name in table.numbers} == {"cats", "dogs"}
    assert "## dogs test: dogs;" in table.markdown()


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("protocol", "other", "protocol: 1,200/100/670 videos, all captions and other"),
        ("split_sha256", "0" * 64, "split hash"),
        ("num_texts", 7, "N_text: 360 and 7"),
        ("num_videos", 7, "N_video: 120 and 7"),
    ],
)
def test_runs_of_other_data_are_not_compared_silently(
    rng: np.random.Generator, key: str, value: object, word: str
) -> None:
    """Published scores differ by points for such reasons; a difference would be read as one of models."""
    first, second = evaluated("d/a", rng, 1.0), evaluated("d/b", rng, 4.0, **{key: value})
    table = comparison_table([(first, second)], resamples=20, seed=0, title="two")
    assert table.numbers == {}
    assert len(table.sections) == 2
    for section in table.sections:
        assert any(note.startswith("NOT COMPARABLE") and word in note for note in section.notes)
        assert [row.kind for row in section.rows] == ["run", "paper", "paper"]
    assert "second − first" not in table.markdown()


def test_the_papers_rows_say_that_they_are_the_best_of_many_looks(rng: np.random.Generator) -> None:
    """A reader who takes the best of 52 looks at test for one look sees a gap of points that is not there."""
    run, other = evaluated("d/a", rng, 1.0), evaluated("d/b", rng, 1.0)
    moved = evaluated("d/c", rng, 1.0, protocol="another")
    tables = [suite_table([run], title="s"), suite_table([moved], title="s")]
    tables += [
        comparison_table([pair], resamples=20, seed=0, title="c") for pair in ((run, other), (run, moved))
    ]
    for section in (section for table in tables for section in table.sections):
        assert any(row.kind == "paper" for row in section.rows)
        assert LOOKS in section.notes
    for words in ("about 52", "150 steps", "each epoch", "0.4", "one look", "not the same quantity"):
        assert words in LOOKS
    own = suite_table([evaluated("d/a", rng, 1.0, benchmark="own")], title="s")
    assert LOOKS not in own.sections[0].notes


def test_the_paper_is_not_comparable_with_another_protocol(rng: np.random.Generator) -> None:
    """A run with videos left out would pass for a reproduction."""
    run = evaluated("d/a", rng, 1.0, protocol="1,200/100/669 videos")
    (section,) = suite_table([run], title="s").sections
    assert any("of another protocol and NOT COMPARABLE" in note for note in section.notes)
    own = evaluated("d/a", rng, 1.0, benchmark="own")
    (section,) = suite_table([own], title="s").sections
    assert "the paper has no scores for this" in section.notes


def test_seeds_are_averaged_and_settings_are_not(rng: np.random.Generator) -> None:
    """A mean over different models, or over splits, would be the mean of nothing."""
    seeds = [dataclasses.replace(evaluated("d/a", rng, 1.0), seed=seed) for seed in range(3)]
    other = dataclasses.replace(evaluated("d/b", rng, 1.0), model="baseline", settings="t")
    moved = evaluated("d/c", rng, 1.0, split_sha256="0" * 64)
    table = suite_table([*seeds, other, moved], title="suite")
    values = [run.metrics["t2v/R1"] for run in seeds]
    names = {name.split("/")[0] for name in table.numbers}
    (mine,) = [name for name in names if name.endswith(seeds[0].measured_on["split_sha256"][:8])]
    assert len(names) == 2
    assert table.numbers[f"{mine}/gare/t2v/R1/mean"] == pytest.approx(statistics.fmean(values))
    assert table.numbers[f"{mine}/gare/t2v/R1/deviation"] == pytest.approx(statistics.stdev(values))
    assert f"{mine}/baseline/t2v/R1/deviation" not in table.numbers
    assert f"± {statistics.stdev(values):.1f}" in table.markdown()


def test_what_was_not_trained_has_no_seed(rng: np.random.Generator) -> None:
    """A reader would take a zero-shot score for the mean of trainings, one of them at least."""
    untrained = dataclasses.replace(
        evaluated("d/zero-shot", rng, 1.0), model="zero-shot", seed=None, settings="z"
    )
    (section,) = suite_table([untrained], title="s").sections
    assert [row.cells[0] for row in section.rows if row.kind == "mean"] == ["zero-shot: not trained, no seed"]
    assert not any("seed" in note for note in section.notes)
    other = dataclasses.replace(untrained, model="unknown")
    (section,) = suite_table([other, evaluated("d/a", rng, 1.0)], title="s").sections
    means = [row.cells[0] for row in section.rows if row.kind == "mean"]
    assert means == ["unknown: mean of 1 evaluation", "gare: mean of 1 seed"]
    assert "a single seed has no deviation" in section.notes


def test_what_must_be_known_of_a_run_is_below_its_table(rng: np.random.Generator) -> None:
    """Scores of fine-tuned towers in the row of zero-shot would be taken for CLIP's."""
    note = "the towers of /w as they are, NOT the zero-shot score of published weights"
    noted, other = evaluated("d/zero-shot", rng, 1.0), evaluated("d/a", rng, 1.0)
    noted = dataclasses.replace(noted, note=note)
    moved = evaluated("d/b", rng, 1.0, num_texts=7)
    tables = [suite_table([other, noted], title="s")]
    tables += [comparison_table([(noted, one)], resamples=20, seed=0, title="c") for one in (other, moved)]
    for table in tables:
        assert table.markdown().count(f"- d/zero-shot: {note}\n") == 1


def test_the_split_hash_knows_videos_and_captions_alone() -> None:
    """Runs on two machines, with their videos elsewhere, are comparable; with one other word they are not."""
    pairs = [("a", "one"), ("a", "two"), ("b", "three")]
    assert split_hash(pairs) == split_hash(reversed(pairs))
    assert split_hash(pairs) != split_hash([*pairs[:2], ("b", "there")])
    assert split_hash(pairs) != split_hash([("b", "one"), *pairs[1:]])


def test_runs_are_found_in_every_data_set_that_has_both(tmp_path: Path) -> None:
    """One table across benchmarks, without a list of them; a name that means nothing is refused."""
    for data_set, run in (("m", "a"), ("m", "b"), ("n", "a"), ("n", "b"), ("o", "a")):
        folder = tmp_path / data_set / "runs" / run / "evaluation-test"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")
    pairs = evaluation_pairs(str(tmp_path), "a", "b", "test")
    assert [first.split("/")[-4] for first, _ in pairs] == ["m", "n"]
    assert len(evaluation_pairs(str(tmp_path), "o/a", "m/b", "test")) == 1
    with pytest.raises(DataError, match="none"):
        evaluation_pairs(str(tmp_path), "a", "c", "test")


@pytest.mark.parametrize("name", ["msrvtt", "msvd", "didemo", "activitynet"])
def test_the_papers_numbers_are_those_beside_the_settings(name: str, repository: Path) -> None:
    """Two copies of one number that differ are worse than none."""
    comment = (repository / "conf" / f"{name}.yaml").read_text()
    assert yaml.safe_load(comment)["data"]["benchmark"] == name
    for paper in published_scores(name):
        label = "GARE" if paper.model == "gare" else "baseline"
        line = " / ".join(str(paper.metrics[f"t2v/{key}"]) for key in ("R1", "R5", "R10", "MnR"))
        assert re.search(rf"^#\s+{label}\s+{re.escape(line)}", comment, re.MULTILINE)


def test_the_picture_grows_with_the_table(rng: np.random.Generator) -> None:
    """A table that is cut off hides the runs at its end."""
    first, second = evaluated("d/weak", rng, 1.0), evaluated("d/strong", rng, 4.0)
    heights = []
    for count in (1, 2):
        table = comparison_table([(first, second)] * count, resamples=20, seed=0, title="weak and strong")
        image = Image.open(io.BytesIO(table_picture(table)))
        assert len(image.getcolors(1_000_000) or []) > 20
        heights.append(image.height)
    assert heights[1] > 1.5 * heights[0]
