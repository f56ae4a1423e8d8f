"""prepare: annotations and videos → manifest."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys
    from pathlib import Path

    # Before other folders of PYTHONPATH, which may have a module of the same name.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cluster.runtime.signals import take_signals

    take_signals()

import logging
import time
from pathlib import Path
from typing import Any

from cluster.command import Flag, main
from cluster.layout import Layout, layout
from cluster.sources.fetch import RemoteVideos
from gare.config import Config
from gare.data.benchmarks.own_videos import read_folder, read_videos
from gare.data.benchmarks.registry import READERS, Benchmark, format_table, read_benchmark
from gare.data.manifest import Manifest, ManifestRow, write_manifest
from gare.data.noise import count_noisy, with_noise
from gare.data.synthetic import generate_benchmark
from gare.data.videos import LocalVideos
from gare.errors import ConfigError
from gare.storage.files import join, write_json
from gare.storage.run_folder import RESULT
from pipelines.sizes import sizes_of_weights

logger = logging.getLogger(__name__)


def run(config: Config) -> dict[str, Any]:
    """Writes the manifest of the configured benchmark; also generates the videos of the embedded one.

    With ``data.noise``, a share of the train captions changes places between videos.
    With ``data.verify``, writes no manifest and only reports how annotations and videos compare with the
    published ones.

    Raises:
        ConfigError: if the benchmark needs a setting that is missing, or noise cannot be drawn.
        DataError: if videos and captions do not belong together.
    """
    started = time.monotonic()
    places = layout(config)
    if config.data.verify:
        return _verify(config, places)
    if config.data.is_imported:
        raise ConfigError(
            "is features",
            where="data.benchmark",
            accepted="pipelines/import_features.py, which makes manifest and feature store in one step",
        )
    manifest, extra = _BENCHMARKS[config.data.benchmark](config, places)
    if config.data.noise:
        manifest = with_noise(manifest, config.data.noise, config.data.seed)
        extra = extra | {"noisy_captions": count_noisy(manifest.rows)}
    write_manifest(manifest, places.manifest)
    result = {
        "manifest": places.manifest,
        "benchmark": manifest.benchmark,
        "protocol": manifest.protocol,
        "fingerprint": manifest.fingerprint,
        "counts": manifest.counts,
        **extra,
        "seconds": round(time.monotonic() - started, 2),
    }
    write_json(join(places.step("prepare"), RESULT), result)
    counts = ", ".join(f"{split} {count['videos']}" for split, count in manifest.counts.items())
    logger.info("prepared %s: %s videos in %s", places.manifest, counts, f"{result['seconds']:.1f} s")
    if config.data.noise:
        total = manifest.counts["train"]["captions"]
        logger.info("%d of %d train captions are another video's", extra["noisy_captions"], total)
    return result


def _synthetic(config: Config, places: Layout) -> tuple[Manifest, dict[str, Any]]:
    if not places.is_local:
        raise ConfigError(
            f"is {config.storage.root!r}",
            where="storage.root",
            accepted="a local folder for generated videos",
        )
    data = config.data
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 5:
            last = time.monotonic()
            logger.info("generated %d of %d videos", done, total)

    benchmark = generate_benchmark(
        Path(places.videos),
        num_train=data.num_train,
        num_val=data.num_val,
        num_test=data.num_test,
        seed=data.seed,
        on_progress=show,
    )
    rows = tuple(
        ManifestRow(clip.video_id, str(clip.path), None, None, clip.split, clip.captions)
        for clip in benchmark.clips
    )
    ambiguous = benchmark.ambiguous_test_captions
    logger.info("test captions that are also true of another test video: %.2f %%", 100 * ambiguous)
    protocol = f"seed {data.seed}, {data.num_train}/{data.num_val}/{data.num_test} videos"
    return Manifest(rows, "synthetic", protocol), {"ambiguous_test_captions": ambiguous}


def _folder(config: Config, places: Layout) -> tuple[Manifest, dict[str, Any]]:
    data = config.data
    if not (data.videos or data.captions):
        raise ConfigError(
            "data.videos and data.captions are empty",
            where="data.benchmark=folder",
            accepted="data.videos=FOLDER data.captions=FILE.csv, a FILE.csv with URIs alone, a FOLDER alone "
            "to extract without training, or data.benchmark=synthetic",
        )
    list_remote = RemoteVideos(config.sources, LocalVideos()).list
    if not data.captions:
        manifest = read_videos(
            data.videos,
            seed=data.seed,
            val_fraction=data.val_fraction,
            test_fraction=data.test_fraction,
            list_remote=list_remote,
        )
        logger.warning("data.captions is empty: the videos can be extracted, but not trained on or evaluated")
    else:
        manifest = read_folder(
            data.videos,
            data.captions,
            seed=data.seed,
            val_fraction=data.val_fraction,
            test_fraction=data.test_fraction,
            schemes=config.sources.schemes,
            list_remote=list_remote,
        )
    return manifest, {"left_out": len(manifest.left_out)}


def _published(config: Config, places: Layout) -> tuple[Manifest, dict[str, Any]]:
    if not config.data.videos:
        raise ConfigError(
            "is empty",
            where="data.videos",
            accepted=f"the folder of {config.data.benchmark}'s videos; --verify looks at annotations alone",
        )
    benchmark = _read_published(config)
    return benchmark.manifest, benchmark.summary()


def _read_published(config: Config) -> Benchmark:
    benchmark = read_benchmark(config.data, RemoteVideos(config.sources, LocalVideos()).list)
    for line in format_table(benchmark).splitlines():
        logger.info("%s", line)
    return benchmark


def _verify(config: Config, places: Layout) -> dict[str, Any]:
    benchmark = _read_published(config)
    manifest = benchmark.manifest
    result = {
        "verified": True,
        "benchmark": manifest.benchmark,
        "protocol": manifest.protocol,
        "fingerprint": manifest.fingerprint,
        "counts": manifest.counts,
        **benchmark.summary(),
    }
    write_json(join(places.step("verify"), RESULT), result)
    return result


_BENCHMARKS = {"synthetic": _synthetic, "folder": _folder, **dict.fromkeys(READERS, _published)}

if __name__ == "__main__":
    main(
        run,
        __doc__,
        flags={
            "--verify": Flag("data.verify", "compare with the published counts and write no manifest", "true")
        },
        sizes_of=sizes_of_weights,
    )
