"""Llama-2 70B as a workload for `suanli predict`: built from its shape, no weights are read.

suanli predict examples/llama_70b.py:llama_70b --gpu h100-sxm5-80gb --gpus 8 --dtype bf16
"""

from typing import Any

import torch
from torch import nn

from suanli.workloads.importers.transformers import make_config, make_model
from suanli.workloads.record import Inputs, Workload
from suanli.workloads.seeding import tokens

LENGTH = 2048
# Touvron et al., "Llama 2", 2023: 80 layers of 8,192, 64 heads of which 8 hold keys and values.
FIELDS: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


class LanguageModel(nn.Module):
    """Tokens [B, T] to logits [B, T, V]; the loss is that of predicting the next token."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids, labels=input_ids if self.training else None)


def make() -> nn.Module:
    """The model; under `torch.device("meta")` it has no data."""
    return LanguageModel(make_model(make_config("llama", FIELDS), "AutoModelForCausalLM"))


def inputs(batch: int) -> Inputs:
    """Token numbers [B, T]."""
    return Inputs(args=(tokens(batch, LENGTH, FIELDS["vocab_size"]),))


llama_70b = Workload(name="llama-70b", make_model=make, make_inputs=inputs, max_batch=64)
