"""The CLIP towers: Hugging Face's CLIPModel, built from our configuration.

N texts, M images or videos, F frames, W words, D embedding width.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gare.config import ClipConfig
from gare.errors import ConfigError, DataError
from gare.model.features import TextFeatures

#: ln(1/0.07), where CLIP starts its learned logit scale.
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
#: The logit scale is clamped so that κ = exp(logit_scale) stays at most 100.
MAX_LOGIT_SCALE = math.log(100)


class ClipTowers(nn.Module):
    """Image and text tower with their projections and the logit scale.

    Attributes:
        full_width: True if captions are encoded at all their W words, padding included, so that shapes do not
            change from batch to batch; else up to the longest of a batch.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.full_width = False
        from transformers import CLIPConfig, CLIPModel

        self.clip: Any = CLIPModel(
            CLIPConfig(
                text_config={
                    "vocab_size": config.vocab_size,
                    "hidden_size": config.text_width,
                    "intermediate_size": 4 * config.text_width,
                    "num_hidden_layers": config.text_layers,
                    "num_attention_heads": config.text_heads,
                    "max_position_embeddings": config.max_positions,
                    "projection_dim": config.embed_dim,
                    "pad_token_id": None,
                    "bos_token_id": config.vocab_size - 2,
                    "eos_token_id": config.vocab_size - 1,
                },
                vision_config={
                    "hidden_size": config.vision_width,
                    "intermediate_size": 4 * config.vision_width,
                    "num_hidden_layers": config.vision_layers,
                    "num_attention_heads": config.vision_heads,
                    "image_size": config.image_size,
                    "patch_size": config.patch_size,
                    "projection_dim": config.embed_dim,
                },
                projection_dim=config.embed_dim,
                logit_scale_init_value=INITIAL_LOGIT_SCALE,
            )
        )

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the scale κ, a scalar parameter."""
        scale: nn.Parameter = self.clip.logit_scale
        return scale

    def clamp_logit_scale(self) -> None:
        """Holds κ at 100 or below; called after each optimiser step."""
        _clamp(self.logit_scale)

    def encode_tokens(self, token_ids: Tensor) -> Tensor:
        """Encodes tokens to hidden states (N, W, text width), after the final LayerNorm.

        The tower is causal, so padding after the end marker changes nothing before it.
        """
        hidden: Tensor = self.clip.text_model(input_ids=token_ids).last_hidden_state
        return hidden

    def project_text(self, hidden: Tensor) -> Tensor:
        """Applies the text projection, (…, text width) → (…, D)."""
        projected: Tensor = self.clip.text_projection(hidden)
        return projected

    def encode_images(self, images: Tensor) -> Tensor:
        """Encodes images, (M, 3, H, W) normalised → (M, D): the class token after the visual projection."""
        pooled: Tensor = self.clip.vision_model(pixel_values=images).pooler_output
        projected: Tensor = self.clip.visual_projection(pooled)
        return projected


class NoTowers(nn.Module):
    """Placeholder for towers that are left out: only the logit scale, under its name in ``ClipTowers``.

    Args:
        logit_scale: of the towers that were left out; by default a new one.
        imported: whether there never were towers, since the features that the model learns from are imported.
    """

    def __init__(self, logit_scale: nn.Parameter | None = None, *, imported: bool = False) -> None:
        super().__init__()
        self.imported = imported
        self.clip = nn.Module()
        self.clip.logit_scale = logit_scale or nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the scale κ, a scalar parameter."""
        scale = self.clip.logit_scale
        assert isinstance(scale, nn.Parameter)
        return scale

    def clamp_logit_scale(self) -> None:
        """Holds κ at 100 or below; called after each optimiser step."""
        _clamp(self.logit_scale)


def _clamp(logit_scale: nn.Parameter) -> None:
    with torch.no_grad():
        logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def towers_sha256(towers: ClipTowers | NoTowers) -> str:
    """Hashes all that features depend on: names, shapes and float32 values of both towers' weights (SHA-256).

    The file that the weights came from does not count, nor does the logit scale.

    Raises:
        ConfigError: where the towers are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_present(towers).state_dict().items()):
        if name != "clip.logit_scale":
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def tower_text(towers: ClipTowers | NoTowers, token_ids: Tensor, token_mask: Tensor) -> TextFeatures:
    """Computes the text tower's output: embeddings of the end marker and every token, zero at padded words.

    Args:
        towers: to encode with.
        token_ids: (N, W) int64.
        token_mask: (N, W) bool or 0/1.

    Raises:
        DataError: for a caption without a token.
        ConfigError: where the towers are left out.
    """
    mask_NW = token_mask.bool()
    if not mask_NW.any(dim=1).all():
        raise DataError(
            f"caption {int((~mask_NW.any(dim=1)).nonzero()[0])} has no token", where="encode_text"
        )
    towers = _present(towers)
    end_N = mask_NW.sum(dim=1) - 1
    # Columns beyond the longest caption are padding for all; the causal tower does not look ahead.
    longest = mask_NW.shape[1]
    if not towers.full_width:
        longest = int(end_N.max()) + 1 if len(end_N) else 1
    words = towers.project_text(towers.encode_tokens(token_ids[:, :longest]))
    rows_N = torch.arange(len(end_N), device=end_N.device)
    embedding_ND = words[rows_N, end_N]
    # Selected, not multiplied: the values at padded words may be anything.
    words = torch.where(mask_NW[:, :longest, None], words, 0)
    words_NWD = functional.pad(words, (0, 0, 0, mask_NW.shape[1] - longest))
    return TextFeatures(embedding_ND, words_NWD, mask_NW)


def tower_frames(
    towers: ClipTowers | NoTowers, frames: Tensor, frame_mask: Tensor, *, grey: bool = False
) -> Tensor:
    """Computes the image tower's output (M, F, D) for clips, zero at padded frames, which never enter it.

    Args:
        towers: to encode with.
        frames: (M, F, 3, H, W) float, CLIP-normalised.
        frame_mask: (M, F) bool or 0/1.
        grey: whether padded frames count as grey pictures, zeros after normalisation, whatever their pixels
            are. They are all alike, so one is encoded for all.

    Raises:
        ConfigError: where the towers are left out.
    """
    mask_MF = frame_mask.bool()
    # Searched once: every search for the real frames waits for the GPU.
    places_K = mask_MF.flatten().nonzero().squeeze(1)
    num_real = len(places_K)
    images = frames.flatten(0, 1)[places_K]
    if grey and num_real < mask_MF.numel():
        images = torch.cat([images, images.new_zeros(1, *images.shape[1:])])
    encoded_KD = _present(towers).encode_images(images)
    frames_XD = encoded_KD.new_zeros(mask_MF.numel(), encoded_KD.shape[-1])
    if len(encoded_KD) > num_real:
        frames_XD = frames_XD + encoded_KD[num_real]
    frames_XD = frames_XD.index_copy(0, places_K, encoded_KD[:num_real])
    return frames_XD.view(*mask_MF.shape, -1)


def _present(towers: ClipTowers | NoTowers) -> ClipTowers:
    if isinstance(towers, NoTowers) and towers.imported:
        raise ConfigError(
            "the model has no towers: it was learned from imported features",
            where="encode",
            accepted="features by the same encoders, imported by pipelines/import_features.py, or a model "
            "that learned from videos",
        )
    if isinstance(towers, NoTowers):
        raise ConfigError(
            "the model has no towers: it learned from stored features",
            where="encode",
            accepted="features of a store, or the run's best checkpoint, which has its towers",
        )
    return towers
