"""Compiled blocks, activation checkpointing and weights cast once compute what the plain towers compute."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from gare.config import Config
from gare.data.batch import Batch
from gare.errors import ConfigError
from gare.model.encoders import compiled
from gare.model.encoders.clip import ClipTowers, tower_frames, tower_text
from gare.model.encoders.compiled import (
    CompiledBlocks,
    cast_weights_once,
    checkpoint_activations,
    compile_towers,
    resolve_compile,
)
from gare.model.gare import GARE
from gare.train.loss.objective import Objective
from tests.helpers.tiny import tiny_batch, tiny_config

#: The compiler that is quick: it traces forward and backward as inductor does, and generates no code.
TRACER = "aot_eager"
CPU = torch.device("cpu")
#: Raised inside torch's compiler: the first it hides itself, unless warnings are errors; the second comes
#: from importing it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """A compiler that has compiled nothing, and is set as it was afterwards."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(
        recompile_limit=8, suppress_errors=False, optimize_ddp=torch._dynamo.config.optimize_ddp
    ):
        yield
    torch._dynamo.reset()


def model_of(config: Config, seed: int) -> GARE:
    torch.manual_seed(seed)
    return GARE(config.model)


def towers_of(model: GARE) -> ClipTowers:
    assert isinstance(model.towers, ClipTowers)
    return model.towers


def batch_of(pairs: int, rng: np.random.Generator) -> Batch:
    return tiny_batch(tiny_config("train.batch_size=9"), rng)[:pairs]


def gradients(model: GARE, config: Config, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a step's objective."""
    objective = Objective(model, config.loss, config.train).train()
    terms = objective(batch, seed=1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(terms.objective, parameters)
    return float(terms.total.detach()), dict(zip(names, found, strict=True))


def assert_within_rounding(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    whole = torch.cat([value.flatten() for value in expected.values()]).norm()
    for name, value in expected.items():
        # Measured against its own size, or the whole's where it is nothing but rounding.
        size = max(value.norm(), 1e-3 * whole)
        assert (found[name] - value).norm() < 1e-4 * size, name


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("wanted", "device", "has_triton", "found"),
    [
        ("auto", "cpu", True, "off"),
        ("auto", "cuda", True, "towers"),
        ("auto", "cuda", False, "off"),
        ("towers", "cpu", False, "towers"),
        ("off", "cuda", True, "off"),
    ],
)
def test_auto_compiles_where_a_gpu_has_a_compiler(
    wanted: compiled.CompileSetting,
    device: str,
    has_triton: bool,
    found: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A laptop would wait for code that its small runs never pay back; a GPU without it idles."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if has_triton else None)
    assert resolve_compile(wanted, torch.device(device)) == found


def test_off_can_be_written_as_yaml_reads_it() -> None:
    """YAML takes a plain off for false: the key's own first value would else be refused."""
    config = tiny_config("train.compile=off", "features.compile=off")
    assert (config.train.compile, config.features.compile) == ("off", "off")
    with pytest.raises(ConfigError, match="true and false are no value of this key"):
        tiny_config("train.compile=on")


def test_real_code_gives_the_loss_and_gradients_of_none(seed: int, rng: np.random.Generator) -> None:
    """The compiler is to change rounding alone, in the forward and in the backward."""
    config = tiny_config()
    plain = model_of(config, seed)
    fast = copy.deepcopy(plain)
    blocks = CompiledBlocks(towers_of(fast))
    blocks.compile()
    assert list(fast.state_dict()) == list(plain.state_dict())
    for pairs in (9, 4):
        batch = batch_of(pairs, rng)
        (loss, expected), (found_loss, found) = (gradients(one, config, batch) for one in (plain, fast))
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert_within_rounding(found, expected)
    assert graphs() == 2
    assert not counters["graph_break"]
    blocks.undo()
    assert gradients(fast, config, batch)[0] == loss


@pytest.mark.parametrize("layers", [1, 3])
def test_one_block_is_compiled_for_all_layers(layers: int, seed: int, rng: np.random.Generator) -> None:
    """Twelve layers compiled one by one take minutes before the first step."""
    config = tiny_config(f"model.clip.vision_layers={layers}", f"model.clip.text_layers={layers}")
    model = model_of(config, seed)
    CompiledBlocks(towers_of(model)).compile(TRACER)
    gradients(model, config, batch_of(6, rng))
    assert graphs() == 2
    assert not counters["graph_break"]


def test_batches_of_all_sizes_share_the_code(seed: int, rng: np.random.Generator) -> None:
    """Frames and words differ from batch to batch: compiled anew, a run is never done."""
    config = tiny_config()
    model = model_of(config, seed)
    CompiledBlocks(towers_of(model)).compile(TRACER)
    for pairs in (9, 4, 7, 2, 3, 9):
        gradients(model, config, batch_of(pairs, rng))
    assert graphs() == 2
    model.eval()
    with torch.inference_mode():
        for pairs in (9, 2, 5):
            batch = batch_of(pairs, rng)
            model.encode_video(batch.frames, batch.frame_mask)
            model.encode_text(batch.token_ids, batch.token_mask)
        assert graphs() == 4
        for _ in range(3):  # a caption by itself, a clip of one frame
            batch = batch_of(1, rng)
            model.encode_video(batch.frames, batch.frame_mask)
            model.encode_text(batch.token_ids, batch.token_mask)
    assert graphs() == 6
    gradients(model, config, batch_of(8, rng))
    assert graphs() == 6
    assert not counters["recompile_limit"]


def test_captions_at_full_width_are_those_of_the_longest(seed: int, rng: np.random.Generator) -> None:
    """Padding that keeps shapes the same must not reach an embedding, a word or a gradient."""
    towers = towers_of(model_of(tiny_config(), seed)).double()
    batch = batch_of(6, rng)
    mask = batch.token_mask & (torch.arange(batch.token_mask.shape[1]) < 5)
    found = []
    for towers.full_width in (False, True):
        text = tower_text(towers, batch.token_ids, mask)
        assert text.words is not None
        (gradient,) = torch.autograd.grad(
            (text.embedding.sin().sum() + text.words.sin().sum()),
            [towers.clip.text_model.embeddings.token_embedding.weight],
        )
        found.append((text.embedding, text.words, gradient))
    for narrow, wide in zip(*found, strict=True):
        torch.testing.assert_close(wide, narrow, rtol=1e-12, atol=1e-12)
    assert not found[1][1][~mask].any()


def test_padded_frames_stay_out_of_compiled_towers(seed: int, rng: np.random.Generator) -> None:
    """A grey picture in place of a frame that a clip lacks would be a frame of the clip."""
    towers = towers_of(model_of(tiny_config(), seed))
    CompiledBlocks(towers).compile(TRACER)
    batch = batch_of(5, rng)
    noise = torch.where(batch.frame_mask[..., None, None, None], batch.frames, torch.nan)
    with torch.inference_mode():
        found = tower_frames(towers, noise, batch.frame_mask)
        expected = torch.stack([towers.encode_images(clip) for clip in batch.frames])
    torch.testing.assert_close(found, torch.where(batch.frame_mask.unsqueeze(-1), expected, 0))


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no C++ compiler\nand more lines")


def rehearsal(model: GARE, config: Config) -> Any:
    return lambda: Objective(model, config.loss, config.train).rehearse(2)


def use_backend(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles with it in place of inductor, on a CPU as on a GPU that has a compiler."""
    compile_blocks = CompiledBlocks.compile
    monkeypatch.setattr(CompiledBlocks, "compile", lambda blocks: compile_blocks(blocks, backend))
    monkeypatch.setattr(compiled, "resolve_compile", lambda wanted, device: "towers")


def test_a_compiler_that_fails_costs_auto_nothing_but_speed(
    seed: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine without a C compiler would end a run that it can compute."""
    config = tiny_config()
    plain = model_of(config, seed)
    model = copy.deepcopy(plain)
    use_backend(broken, monkeypatch)
    compile_towers(towers_of(model), "auto", CPU, rehearsal(model, config), key="train.compile")
    (record,) = (record for record in caplog.records if record.name == compiled.__name__)
    assert record.levelno == logging.WARNING
    assert "cannot be compiled on cpu" in record.message
    assert "no C++ compiler" in record.message
    assert "\n" not in record.message
    batch = batch_of(6, rng)
    (loss, expected), (found_loss, found) = (gradients(one, config, batch) for one in (plain, model))
    assert found_loss == loss
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_compiler_that_fails_ends_what_asks_for_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets towers is told which key to change."""
    config = tiny_config()
    model = model_of(config, seed)
    use_backend(broken, monkeypatch)
    with pytest.raises(ConfigError, match=r"train\.compile: the blocks .* no C\+\+ compiler"):
        compile_towers(towers_of(model), "towers", CPU, rehearsal(model, config), key="train.compile")


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("full"), ValueError("of the towers")])
def test_faults_of_others_are_not_the_compilers(fault: Exception, seed: int) -> None:
    """Memory that does not suffice is explained elsewhere; another fault must not pass for the compiler's."""

    def rehearse() -> None:
        raise fault

    with pytest.raises(type(fault), match=str(fault)):
        compile_towers(towers_of(model_of(tiny_config(), seed)), "towers", CPU, rehearse, key="train.compile")


def test_the_cold_start_is_said_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds in which nothing seems to happen need an explanation; no gradient stays behind."""
    config = tiny_config()
    model = model_of(config, seed)
    use_backend(TRACER, monkeypatch)
    said: list[str] = []
    rehearse = rehearsal(model, config)
    compile_towers(towers_of(model), "towers", CPU, rehearse, key="train.compile", say=said.append)
    (line,) = said
    assert line.startswith("train.compile towers: the blocks of the towers are compiled for cpu; cold start ")
    assert all(parameter.grad is None for parameter in model.parameters())
    before = graphs()
    gradients(model, config, batch_of(7, np.random.default_rng(seed)))
    assert graphs() == before == 2  # what was rehearsed is what a step does


def saved_bytes(model: GARE, config: Config, batch: Batch) -> int:
    """Bytes that the forward keeps for the backward, each tensor counted once; parameters left out."""
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    objective = Objective(model, config.loss, config.train).train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = objective.encode_captions(batch), objective.encode_clips(batch)
    assert features
    return sum(kept.values())


@pytest.mark.parametrize("overrides", [[], ["train.micro_batch=2"]], ids=["whole", "in parts"])
def test_checkpointed_activations_change_no_bit(
    overrides: list[str], seed: int, rng: np.random.Generator
) -> None:
    """A setting for small cards must not train something else."""
    config = tiny_config("model.clip.vision_layers=4", *overrides)
    plain = model_of(config, seed)
    small = copy.deepcopy(plain)
    checkpoint_activations(towers_of(small))
    batch = batch_of(6, rng)
    (loss, expected), (found_loss, found) = (gradients(one, config, batch) for one in (plain, small))
    assert found_loss == loss
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert saved_bytes(small, config, batch) < 0.5 * saved_bytes(plain, config, batch)


@pytest.mark.parametrize("overrides", [[], ["train.micro_batch=2"]], ids=["whole", "in parts"])
def test_checkpointed_activations_are_compiled_as_well(
    overrides: list[str], seed: int, rng: np.random.Generator
) -> None:
    """Small cards want both settings at once, and micro-batches with them."""
    config = tiny_config(*overrides)
    plain = model_of(config, seed)
    fast = copy.deepcopy(plain)
    checkpoint_activations(towers_of(fast))
    CompiledBlocks(towers_of(fast)).compile(TRACER)
    for pairs in (6, 8):
        batch = batch_of(pairs, rng)
        (loss, expected), (found_loss, found) = (gradients(one, config, batch) for one in (plain, fast))
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert_within_rounding(found, expected)
    assert graphs() == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_cast_once_change_no_bit(dtype: torch.dtype, seed: int, rng: np.random.Generator) -> None:
    """A feature store must not depend on the version that made it; its fingerprint would not say so."""
    towers = towers_of(model_of(tiny_config(), seed)).eval()
    before = {name: value.clone() for name, value in towers.state_dict().items()}
    ready = cast_weights_once(towers, dtype)
    batch = batch_of(6, rng)
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        for encode in (
            lambda one: tower_frames(one, batch.frames, batch.frame_mask),
            lambda one: tower_text(one, batch.token_ids, batch.token_mask).words,
        ):
            assert torch.equal(encode(ready), encode(towers))
    assert all(torch.equal(value, before[name]) for name, value in towers.state_dict().items())
    kinds = {
        name.rsplit(".", 2)[-2]: value.dtype for name, value in ready.state_dict().items() if "." in name
    }
    assert kinds["fc1"] == kinds["patch_embedding"] == kinds["visual_projection"] == dtype
    assert kinds["layer_norm1"] == kinds["token_embedding"] == torch.float32
