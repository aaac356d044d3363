"""Vision transformer (Dosovitskiy et al., arXiv 2010.11929) in the small size of DeiT."""

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D]; causal, a token sees none after it."""

    def __init__(self, dimension: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dimension, 3 * dimension)
        self.out = nn.Linear(dimension, dimension)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Let every token look at every token, or at those up to itself."""
        dimension = x.shape[-1]
        # [B, N, 3D] -> three of [B, heads, N, D / heads]
        split = self.qkv(x).unflatten(-1, (3, self.heads, dimension // self.heads))
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        y: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """Attention and a two-layer network, each behind a layer norm and around a shortcut."""

    def __init__(self, dimension: int, heads: int, hidden: int, *, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dimension, eps=1e-6)
        self.attention = Attention(dimension, heads, causal=causal)
        self.norm2 = nn.LayerNorm(dimension, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dimension, hidden), nn.GELU(), nn.Linear(hidden, dimension)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attention(self.norm1(x))
        y: torch.Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    """[B, 3, 224, 224] -> logits [B, classes]: 22.05 million parameters, 9.2 GFLOP."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        dimension, depth, heads, patch = 384, 12, 6, 16
        self.patches = nn.Conv2d(3, dimension, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, dimension) * 0.02)
        self.position = nn.Parameter(torch.randn(1, (224 // patch) ** 2 + 1, dimension) * 0.02)
        self.blocks = nn.Sequential(*(Block(dimension, heads, 4 * dimension) for _ in range(depth)))
        self.norm = nn.LayerNorm(dimension, eps=1e-6)
        self.head = nn.Linear(dimension, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of pictures, from the class token."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)  # [B, 196, D]
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1)
        features = self.norm(self.blocks(tokens + self.position))
        logits: torch.Tensor = self.head(features[:, 0])
        return logits
