"""A small decoder-only transformer over characters, in the manner of GPT-2."""

import torch
from torch import nn

from suanli.workloads.models.vit import Block


class Gpt(nn.Module):
    """Tokens [B, T] -> logits of the next one [B, T, vocabulary]."""

    def __init__(
        self, vocabulary: int, *, layers: int = 6, width: int = 384, heads: int = 6, context: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(
            *(Block(width, heads, 4 * width, causal=True) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: normal with deviation 0.02 and zero biases, as GPT-2 does."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits at every position, each from the tokens up to it."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        logits: torch.Tensor = self.head(self.norm(self.blocks(x)))
        return logits
