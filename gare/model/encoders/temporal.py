"""The temporal transformer over frame features.

M videos, F frames, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gare.model.encoders.clip import ClipTowers


class TemporalTransformer(nn.Module):
    """Frame position embeddings, pre-norm attention blocks without causal mask, and a residual around all.

    out = x + Blocks(x + positions), padded frames masked as keys.

    Source: released code; its LayerNorm ε is 1e-12 where CLIP's is 1e-5.
    """

    def __init__(self, width: int, layers: int, heads: int, max_positions: int) -> None:
        super().__init__()
        from transformers import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPEncoder

        self.width, self.heads = width, heads
        self.positions = nn.Embedding(max_positions, width)
        nn.init.normal_(self.positions.weight, std=0.01)
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            layer_norm_eps=1e-12,
            attn_implementation="sdpa",
        )
        self.blocks: Any = CLIPEncoder(config)

    def start_from_text_tower(self, towers: ClipTowers) -> str:
        """Copies CLIP's text positions and first text blocks, if their shapes match.

        Source: released code. Blocks beyond the tower's keep their random start, and so does everything where
        widths or heads differ.

        Returns:
            The parts that kept their random start and why; empty if none did.
        """
        text = towers.clip.text_model
        positions = text.embeddings.position_embedding.weight
        layers, clips = self.blocks.layers, text.encoder.layers
        if positions.shape != self.positions.weight.shape:
            return f"all of it: the text tower is {positions.shape[1]} wide, embeddings {self.width}"
        with torch.no_grad():
            self.positions.weight.copy_(positions)
        heads = text.config.num_attention_heads
        if layers and heads != self.heads:
            return f"its blocks: the text tower has {heads} heads, model.temporal_heads is {self.heads}"
        for ours, clip in zip(layers, clips, strict=False):
            ours.load_state_dict(clip.state_dict())
        return (
            f"{len(layers) - len(clips)} blocks that the text tower lacks" if len(layers) > len(clips) else ""
        )

    def forward(self, frames_MFD: Tensor, mask_MF: Tensor, *, keep_padded: bool = False) -> Tensor:
        """Frame features (M, F, D) and their mask (M, F) → (M, F, D).

        Args:
            frames_MFD: frame features.
            mask_MF: bool, true for real frames.
            keep_padded: whether padded frames keep their outputs; otherwise they are set to zero.
        """
        num_frames = frames_MFD.shape[1]
        hidden = frames_MFD + self.positions.weight[:num_frames]
        keys = mask_MF[:, None, None, :].expand(-1, 1, num_frames, -1)
        hidden = self.blocks(inputs_embeds=hidden, attention_mask=keys).last_hidden_state
        out: Tensor = frames_MFD + hidden
        return out if keep_padded else out * mask_MF.unsqueeze(-1)
