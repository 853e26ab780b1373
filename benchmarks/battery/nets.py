"""Nets of the battery that no other experiment uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention without a mask, ``[batch, patches, width]`` to the same shape."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, patches, width = x.shape
        parts = (part.reshape(batch, patches, self.num_heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(functional.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(batch, patches, width))


class EncoderBlock(nn.Module):
    """Pre-norm attention and a feed-forward part of four times the width."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Images ``[batch, channels, size, size]`` to logits: patches, encoder blocks, mean over the patches."""

    def __init__(
        self, size: int = 32, patch: int = 8, channels: int = 3, width: int = 96, num_layers: int = 4, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embedding = nn.Linear(channels * patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, num_heads=4) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        return self.head(self.norm(self.blocks(self.embedding(patches) + self.position)).mean(dim=1))


class CharLSTM(nn.Module):
    """Tokens ``[batch, time]`` to logits ``[batch, time, vocabulary]``."""

    def __init__(self, vocabulary: int = 65, embedding: int = 64, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


class FieldNet(nn.Module):
    """Categorical fields ``[batch, fields]`` (ids of one table) to logits: embeddings side by side, then two layers."""

    def __init__(self, num_ids: int = 2048, num_fields: int = 6, embedding: int = 32, width: int = 128, num_classes: int = 65):
        super().__init__()
        self.table = nn.Embedding(num_ids, embedding)
        self.hidden = nn.Linear(num_fields * embedding, width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(functional.relu(self.middle(functional.relu(self.hidden(self.table(ids).flatten(1))))))


class Denoiser(nn.Module):
    """Noise of a diffusion model: ``[batch, pixels + 1]`` (noisy pixels, time in [0, 1]) to ``[batch, pixels]``."""

    def __init__(self, pixels: int = 196, width: int = 256, num_blocks: int = 2, num_frequencies: int = 8) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(num_frequencies))
        self.first = nn.Linear(pixels + 2 * num_frequencies, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_blocks))
        self.ups = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.downs = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.last = nn.Linear(width, pixels)

    def forward(self, x: Tensor) -> Tensor:
        angles = x[:, -1:] * self.frequencies
        hidden = self.first(torch.cat([x[:, :-1], angles.sin(), angles.cos()], dim=1))
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            hidden = hidden + down(functional.silu(up(norm(hidden))))
        return self.last(functional.silu(hidden))
