"""Weights of others: every way CLIP and GARE are published, and every way such a file can be wrong."""

from __future__ import annotations

import logging
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gare import CheckpointError, ConfigError, import_clip, import_released
from gare.config import ClipConfig, ModelConfig
from gare.model.gare import GARE
from tests.model.test_golden_model import released_state_dict

Tensors = dict[str, Tensor]


class Attention(nn.Module):
    """The names of torch's MultiheadAttention, without its code, which needs no scripting here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(0.1 * torch.randn(3 * width))
        self.out_proj = nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width) for _ in range(layers)))


class OpenAIClip(nn.Module):
    """A module with the names and shapes of OpenAI's CLIP; the sizes of the published ones, or small."""

    def __init__(self, *, image: int, patch: int, vision: int, layers: int, text: int, embed: int) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, vision, patch, patch, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(vision))
        self.visual.positional_embedding = nn.Parameter(torch.randn((image // patch) ** 2 + 1, vision))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(vision), nn.LayerNorm(vision)
        self.visual.transformer = Transformer(vision, layers)
        self.visual.proj = nn.Parameter(torch.randn(vision, embed) * vision**-0.5)
        self.transformer = Transformer(text, 4)
        self.token_embedding = nn.Embedding(100, text)
        self.positional_embedding = nn.Parameter(torch.randn(77, text))
        self.ln_final = nn.LayerNorm(text)
        self.text_projection = nn.Parameter(torch.randn(text, embed) * text**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logit_scale


SMALL: dict[str, int] = {"image": 32, "patch": 16, "vision": 128, "layers": 2, "text": 64, "embed": 64}


@pytest.fixture
def clip(seed: int) -> OpenAIClip:
    torch.manual_seed(seed)
    return OpenAIClip(**SMALL)


def published(clip: OpenAIClip) -> Tensors:
    """As OpenAI's archives hold it: the weights, and three numbers."""
    facts = {"input_resolution": 32, "context_length": 77, "vocab_size": 100}
    return {**clip.state_dict(), **{name: torch.tensor(value) for name, value in facts.items()}}


def towers(model: GARE) -> Tensors:
    return {name: value for name, value in model.state_dict().items() if name.startswith("towers.")}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def scripted(clip: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; OpenAI's files are what they are
        torch.jit.save(torch.jit.trace(clip, torch.ones(1)), path)
    return path


def test_every_form_of_clip_gives_the_same_model(clip: OpenAIClip, tmp_path: Path) -> None:
    """A user has one of these files, and should not need to know which."""
    from safetensors.torch import save_file

    expected = towers(import_clip(published(clip)))
    torch.save(published(clip), tmp_path / "plain.pt")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, tmp_path / "wrapped.pt"
    )
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    scripted(clip, tmp_path / "jit.pt")
    for name in ("plain.pt", "wrapped.pt", "clip.safetensors", "jit.pt"):
        assert same(towers(import_clip(tmp_path / name)), expected), name
    # A folder of Hugging Face, written by the library that everyone's folders are written by.
    model = import_clip(published(clip))
    model.towers.clip.save_pretrained(tmp_path / "hf")
    assert same(towers(import_clip(str(tmp_path / "hf"))), expected)


def test_half_precision_archives_become_float32(clip: OpenAIClip, tmp_path: Path) -> None:
    """OpenAI published float16; training those would underflow."""
    expected = {name: value.half().float() for name, value in clip.state_dict().items()}
    model = import_clip(scripted(clip.half(), tmp_path / "jit.pt"))
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert torch.equal(
        model.state_dict()["towers.clip.text_projection.weight"], expected["text_projection"].T
    )


@pytest.mark.parametrize(
    ("image", "patch", "vision", "layers", "text", "embed"),
    [(224, 32, 768, 12, 512, 512), (224, 16, 768, 12, 512, 512), (224, 14, 1024, 24, 768, 768)],
    ids=["ViT-B/32", "ViT-B/16", "ViT-L/14"],
)
def test_published_sizes_are_known_by_their_shapes(
    image: int, patch: int, vision: int, layers: int, text: int, embed: int
) -> None:
    """On the meta device: the shapes of the real files without their gigabytes."""
    from gare.model.importing.openai_clip import clip_sizes

    with torch.device("meta"):
        state_dict = OpenAIClip(
            image=image, patch=patch, vision=vision, layers=layers, text=text, embed=embed
        ).state_dict()
    sizes = ClipConfig(**clip_sizes(state_dict))
    assert (sizes.image_size, sizes.patch_size, sizes.vision_layers) == (image, patch, layers)
    assert (sizes.vision_heads, sizes.text_heads, sizes.embed_dim) == (vision // 64, text // 64, embed)


def test_temporal_transformer_starts_from_clips_text_blocks(clip: OpenAIClip) -> None:
    """As released; a random temporal transformer costs points of R@1."""
    model = import_clip(published(clip), temporal_layers=2)
    text = model.towers.clip.text_model
    assert torch.equal(model.temporal.positions.weight, text.embeddings.position_embedding.weight)
    for ours, clips in zip(model.temporal.blocks.layers, text.encoder.layers, strict=False):
        assert same(ours.state_dict(), clips.state_dict())
    assert model.config.temporal_layers == 2


def test_released_state_dict_is_accounted_for(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that matters may be dropped, and what is dropped is named."""
    state_dict = released_state_dict(0)
    with caplog.at_level(logging.INFO):
        model = import_released({f"module.{name}": tensor for name, tensor in state_dict.items()})
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    idle = ("linear2", "psi.layers.0.mlp.", "log_std_proj", "weight_fc")
    unused = [name for name in state_dict if any(part in name for part in idle)]
    used = {
        name: tensor
        for name, tensor in state_dict.items()
        if name not in unused and not name.startswith("psi.")
    }
    assert numbers == sum(tensor.numel() for tensor in used.values())
    assert all(name in caplog.text for name in unused)
    assert model.config == import_released(state_dict).config
    assert (model.config.pool_temperature, model.config.max_words, model.config.max_frames) == (3.0, 32, 12)


def test_released_settings_can_be_given() -> None:
    """DiDeMo's frames and words, ActivityNet's corrected side."""
    state_dict = released_state_dict(0)
    model = import_released(state_dict, max_words=64, max_frames=64, corrected_side="video")
    assert model.config.corrected_side == "video"
    assert import_released(state_dict, increment=False).increment is None
    for settings in ({"temporal_layers": 1}, {"clip": ClipConfig()}, {"frames": 3}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))} cannot be set"):
            import_released(state_dict, **settings)
    with pytest.raises(ConfigError, match="max_frames"):
        import_released(state_dict, max_frames=1000)


def test_weights_without_temporal_transformer(clip: OpenAIClip) -> None:
    """MSVD's released run lets frame features pass through, whether or not its file holds one."""
    state_dict = released_state_dict(0)
    whole = import_released(state_dict, temporal="none")
    for name in [name for name in state_dict if name.startswith(("transformerClip", "frame_position"))]:
        del state_dict[name]
    bare = import_released(state_dict, temporal="none")
    assert whole.temporal is bare.temporal is None
    assert whole.state_dict().keys() == bare.state_dict().keys()
    with pytest.raises(CheckpointError, match="temporal none for a model that has none"):
        import_released(state_dict)
    with pytest.raises(ConfigError, match="temporal_layers would change nothing"):
        import_clip(published(clip), temporal="none", temporal_layers=2)
    assert import_clip(published(clip), temporal="none").temporal is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("clip.visual.ln_post.bias"), "missing.*post_layernorm.bias"),
        (lambda d: d.pop("clip.token_embedding.weight"), "clip.token_embedding.weight missing"),
        (lambda d: d.pop("transformerClip.resblocks.1.mlp.c_fc.bias"), "missing.*temporal.blocks.layers.1"),
        (lambda d: d.pop("frame_position_embeddings.weight"), "missing.*temporal.positions"),
        (lambda d: d.update({"new.weight": torch.ones(1)}), "tensors of another model: new.weight"),
        (lambda d: d.update({"psi.mean_proj.bias": torch.ones(512)}), "psi.* and agent.psi.* differ"),
        (
            lambda d: d.update({"clip.ln_final.bias": torch.ones(3)}),
            r"final_layer_norm.bias is \(3,\), not \(512,\)",
        ),
        (lambda d: [d.pop(n) for n in list(d) if "mean_proj" in n], "missing: increment.mean"),
        (lambda d: d.clear(), "missing: transformerClip"),
        (
            lambda d: [d.pop(n) for n in list(d) if n.startswith("transformerClip")],
            "missing: transformerClip.*the temporal transformer",
        ),
        (
            lambda d: d.update({"clip.ln_final.bias": torch.full((512,), torch.nan)}),
            "not finite: .*final_layer_norm",
        ),
        (lambda d: d.update({"clip.ln_final.bias": 3}), "no tensor under clip.ln_final.bias"),
        (
            lambda d: d.update({"clip.visual.layer1.0.conv1.weight": torch.ones(1)}),
            "no CLIP with a vision transf",
        ),
    ],
)
def test_a_wrong_state_dict_says_what_is_wrong(change: Any, said: str) -> None:
    """A tensor that silently keeps its random start is a model that is silently bad."""
    state_dict = released_state_dict(0)
    change(state_dict)
    with pytest.raises(CheckpointError, match=said):
        import_released(state_dict)


class Attack:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("attacked"),)


def test_no_file_runs_code(clip: OpenAIClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights come from strangers."""
    monkeypatch.chdir(tmp_path)
    torch.save({**clip.state_dict(), "x": Attack()}, "plain.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Attack()))
    scripted(clip, tmp_path / "good.pt")
    with zipfile.ZipFile("good.pt") as good, zipfile.ZipFile("jit.pt", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, pickle.dumps(Attack()) if name.endswith("/data.pkl") else good.read(name))
    for name in ("plain.pt", "old.pt", "jit.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}.*more than tensors"):
            import_clip(name)
    assert not (tmp_path / "attacked").exists()


def test_damaged_files_are_named(clip: OpenAIClip, tmp_path: Path) -> None:
    """A download that broke off is the most common fault of all."""
    torch.save(published(clip), tmp_path / "plain.pt")
    scripted(clip, tmp_path / "jit.pt")
    for name in ("plain.pt", "jit.pt"):
        data = (tmp_path / name).read_bytes()
        for share in (0.0, 0.3, 0.9):
            (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * share)])
            with pytest.raises(CheckpointError, match=r"cut\.pt: is truncated"):
                import_clip(tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match="there is no such file"):
        import_clip(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="no Hugging Face CLIP folder"):
        import_clip(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="is truncated"):
        import_clip(tmp_path / "cut.safetensors")


def test_a_folder_of_another_clip_is_refused(tmp_path: Path, clip: OpenAIClip) -> None:
    """LAION's models use another activation; with ours their features would be quietly wrong."""
    import_clip(published(clip)).towers.clip.save_pretrained(tmp_path)
    description = tmp_path / "config.json"
    text = description.read_text("utf-8")
    description.write_text(text.replace("quick_gelu", "gelu"), "utf-8")
    with pytest.raises(CheckpointError, match="gelu"):
        import_clip(tmp_path)
    description.write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        import_clip(tmp_path)


def test_a_new_model_equals_its_import(clip: OpenAIClip) -> None:
    """Settings reach the model, and it scores."""
    model = import_clip(published(clip), max_frames=4, context="words", temporal_layers=1)
    assert model.config == ModelConfig(
        clip=model.config.clip, max_frames=4, context="words", temporal_layers=1
    )
    assert model.temporal.heads == model.config.clip.embed_dim // 64
    video = model.encode_video(torch.randn(2, 4, 3, 32, 32), torch.ones(2, 4))
    text = model.encode_text(torch.randint(0, 100, (3, 8)), torch.ones(3, 8))
    assert model.score(text, video).shape == (3, 2)
