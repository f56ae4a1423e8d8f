"""What of the cluster is taken, and what is refused: without Ray, over nodes made up."""

from __future__ import annotations

import threading

import pytest

from cluster.runtime.resources import (
    LOADER_CPUS,
    Node,
    cpus_of_worker,
    num_that_fit,
    object_store_bytes,
    resolve,
    resources_of_worker,
    warn_while_short_of_nodes,
)
from gare.config import ClusterConfig, ResolvedCluster, parse_config
from gare.errors import ConfigError
from tests.helpers.clusters import resolved_cluster

LAPTOP = [Node(8, 0)]
WORKSTATION = [Node(32, 4)]
CLUSTER = [Node(4, 0), *[Node(96, 8)] * 4, *[Node(16, 0)] * 6]
CPU_NODES = [Node(0, 0), Node(16, 0), Node(8, 0), Node(16, 0)]


def automatic(**settings: object) -> ClusterConfig:
    asked = {"train_workers": "auto", "cpus_per_worker": "auto", "use_gpu": "auto"}
    return ClusterConfig.model_validate(asked | settings)


@pytest.mark.parametrize(
    ("nodes", "batch", "expected"),
    [
        (LAPTOP, 128, (1, 4.0, False)),
        ([Node(2, 0)], 128, (1, 1.0, False)),
        ([Node(1, 0)], 128, (1, 0.5, False)),
        (WORKSTATION, 128, (4, 4.0, True)),
        ([Node(8, 4)], 128, (4, 1.0, True)),
        ([Node(4, 4)], 128, (4, 0.5, True)),
        # More GPUs than CPUs can feed: as many as fit, each with half a CPU and what loads for it.
        ([Node(4, 8)], 128, (5, 0.5, True)),
        (CLUSTER, 128, (32, 4.0, True)),
        # 6 GPUs share 128 pairs as well as they can; of 4 pairs two of them get none.
        ([Node(24, 6)], 128, (6, 2.0, True)),
        ([Node(24, 6)], 4, (4, 2.0, True)),
        # One for each node that has CPUs to give; the smallest says how many.
        (CPU_NODES, 128, (3, 4.0, False)),
    ],
)
def test_automatic_values(nodes: list[Node], batch: int, expected: tuple[int, float, bool]) -> None:
    """One configuration for a laptop and a cluster: what it comes to must use both well, and fit."""
    settled = resolve(automatic(), batch, nodes)
    assert (settled.train_workers, settled.cpus_per_worker, settled.use_gpu) == expected
    assert num_that_fit(settled, nodes) == settled.train_workers
    needed = settled.train_workers * cpus_of_worker(settled)
    assert needed <= sum(node.cpus for node in nodes)
    assert resolve(settled, batch, nodes) == settled


def test_what_is_given_stays() -> None:
    """An automatic value that overrules a person's is a fault that nobody finds."""
    asked = ClusterConfig(train_workers=3, cpus_per_worker=2.5, loaders_per_worker=3, use_gpu=False)
    assert resolve(asked, 128, CLUSTER).model_dump() == asked.model_dump()
    settled = resolve(automatic(train_workers=3), 120, CLUSTER)
    assert (settled.train_workers, settled.use_gpu) == (3, True)
    assert resolve(automatic(use_gpu=False), 110, CLUSTER).train_workers == len(CLUSTER)
    assert resolve(automatic(use_gpu=True), 128, LAPTOP).use_gpu is True


def test_fewest_workers() -> None:
    """An elastic training may have to begin before the nodes that it is to grow to are there."""
    assert resolve(automatic(min_workers=3), 128, LAPTOP).train_workers == 3
    assert resolve(automatic(min_workers=3, use_gpu=True), 0, []).train_workers == 3
    assert resolve(automatic(use_gpu=True), 0, []).train_workers == 1


@pytest.mark.parametrize("loaders", [1, 3, 12])
@pytest.mark.parametrize("cpus", [0.1, 0.5, 0.7, 1.4, 2.0])
def test_workers_reserve_what_loads_for_them(cpus: float, loaders: int) -> None:
    """Ray divides what a node has by what a worker takes: it must come out whole, and leave nothing out."""
    config = resolved_cluster(train_workers=3, cpus_per_worker=cpus, loaders_per_worker=loaders)
    each = resources_of_worker(config)["CPU"]
    assert each == cpus_of_worker(config)
    wanted = cpus + loaders * LOADER_CPUS
    assert wanted <= each + 1e-9 < wanted + 0.25
    assert sum([each] * 3) // each == 3
    assert num_that_fit(config, [Node(3 * each, 0)]) == 3
    on_gpus = config.model_copy(update={"use_gpu": True})
    assert resources_of_worker(on_gpus) == {"CPU": each, "GPU": 1}


@pytest.mark.parametrize(
    ("settings", "nodes", "expected"),
    [
        # All but the worker's own CPUs, up to what any step needs.
        ({"train_workers": 1, "cpus_per_worker": 1, "use_gpu": True}, [Node(16, 1)], 15),
        ({"train_workers": 1, "cpus_per_worker": 4, "use_gpu": True}, [Node(64, 1)], 16),
        ({"train_workers": 4, "cpus_per_worker": 4, "use_gpu": True}, WORKSTATION, 4),
        # One is needed in any case.
        ({"train_workers": 2, "cpus_per_worker": 0.5}, [Node(2, 0)], 1),
        ({"train_workers": 4, "cpus_per_worker": 0.5, "use_gpu": True}, [Node(4, 4)], 1),
        # Packed onto one node, or spread over both; the smallest node decides.
        ({"train_workers": 2, "cpus_per_worker": 2}, [Node(16, 0)] * 2, 6),
        ({"train_workers": 2, "cpus_per_worker": 2, "placement": "spread"}, [Node(16, 0)] * 2, 14),
        ({"train_workers": 2, "cpus_per_worker": 2, "placement": "spread"}, [Node(16, 0), Node(6, 0)], 4),
        ({"train_workers": 1, "loaders_per_worker": 7}, [Node(2, 0)], 7),
    ],
)
def test_loaders_take_the_cpus_that_are_left(
    settings: dict[str, object], nodes: list[Node], expected: int
) -> None:
    """One loader starves a GPU beside fifteen idle CPUs; more than there are CPUs slow each other down."""
    assert resolve(ClusterConfig.model_validate(settings), 128, nodes).loaders_per_worker == expected


def test_small_batches_need_few_loaders() -> None:
    """Fifteen processes that share a batch of a megabyte take longer to start than the demo does."""
    config, node = ClusterConfig(train_workers=2, cpus_per_worker=1), [Node(32, 0)]
    assert resolve(config, 64, node, 2e6).loaders_per_worker == 1
    assert resolve(config, 64, node, 24e6).loaders_per_worker == 3
    assert resolve(config, 64, node, 1e12).loaders_per_worker == 15


def test_nodes_that_are_too_few_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray waits for them without a word, and a person believes that the training goes on."""
    config = resolved_cluster()
    assert num_that_fit(config, [Node(2, 0)]) == 2
    assert num_that_fit(config, [Node(1, 0)]) == 1  # the workers would fit, and what loads for them would not
    looks = threading.Semaphore(0)

    def one_node() -> list[Node]:
        looks.release()
        return [Node(1, 0)]

    def watch(config: ResolvedCluster) -> str:
        caplog.clear()
        with warn_while_short_of_nodes(config, every_s=0.01):
            for _ in range(2):  # when the second look begins, the first one has said what it found
                assert looks.acquire(timeout=30)
        return caplog.text

    monkeypatch.setattr("cluster.runtime.resources.nodes", one_node)
    assert "the 1 that are left hold 1 of the 2 workers" in watch(config)
    assert watch(config.model_copy(update={"min_workers": 1})) == ""


@pytest.mark.parametrize(
    ("settings", "nodes", "expected"),
    [
        ({"train_workers": 4, "cpus_per_worker": 4}, [Node(2, 0)] * 8, 0),
        ({"train_workers": 4, "cpus_per_worker": 2}, [Node(3, 0)] * 3, 3),
        ({"train_workers": 4, "cpus_per_worker": 0.5}, [Node(2, 0)], 2),
        ({"train_workers": 4, "cpus_per_worker": 0.5}, [Node(3, 0)], 4),
        ({"train_workers": 4, "cpus_per_worker": 1, "use_gpu": True}, [Node(16, 2), Node(16, 0)], 2),
        ({"train_workers": 4, "cpus_per_worker": 2, "placement": "strict_pack"}, [Node(5, 0)] * 4, 2),
        ({"train_workers": 4, "cpus_per_worker": 2, "placement": "strict_spread"}, [Node(16, 0)] * 3, 3),
        ({"train_workers": 4, "cpus_per_worker": 2, "placement": "spread"}, [Node(16, 0)] * 3, 4),
        ({"train_workers": 4}, [], 0),
    ],
)
def test_workers_that_nodes_can_hold(settings: dict[str, object], nodes: list[Node], expected: int) -> None:
    """Sixteen CPUs on eight nodes are no room for a worker of four: Ray would wait for ever."""
    assert num_that_fit(resolved_cluster(**settings), nodes) == expected


def test_the_object_store_is_a_part_of_the_memory() -> None:
    """A store as large as the memory leaves none for the work."""
    assert object_store_bytes(ClusterConfig(object_store_mb=700)) == 700 * 10**6
    assert 512 * 10**6 <= object_store_bytes(ClusterConfig()) <= 8192 * 10**6


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("cluster.train_workers=-1", "cluster.train_workers: got -1"),
        ("cluster.use_gpu=some", "input should be True, False or 'auto'"),
        ("cluster.placement=everywhere", "'pack', 'spread', 'strict_pack' or 'strict_spread'"),
        ("cluster.leave_cpus=-2", "got -2; a whole number from 0 on, or the word auto"),
        ("cluster.leave_cpus=true", "true and false are no value"),
    ],
)
def test_what_is_no_value_is_refused(override: str, part: str) -> None:
    """Also where a key takes a word beside its numbers."""
    with pytest.raises(ConfigError, match=part):
        parse_config({}, [override])


def test_words_and_numbers_mean_the_same() -> None:
    """Earlier versions wrote 0 or -1 for what is automatic, and their files are read."""
    keys = {
        "train_workers": 0,
        "cpus_per_worker": 0,
        "loaders_per_worker": 0,
        "leave_cpus": -1,
        "num_cpus": 0,
    }
    keys |= {"object_store_mb": 0, "max_cpus": 0, "max_gpus": 0}
    numbers = parse_config({"cluster": keys | {"use_gpu": True}, "extract": {"workers": 0}})
    words = parse_config(
        {"cluster": dict.fromkeys(keys, "auto") | {"use_gpu": 1}, "features": {"workers": 0}}
    )
    assert words == numbers
    assert {words.cluster.leave_cpus, words.extract.workers, words.features.workers} == {"auto"}
    assert parse_config(words.model_dump(mode="json")) == words
