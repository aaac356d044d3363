"""Small captured models of the kinds that matter, for the tests of the backends."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from suanli.engines.program import Program, capture
from suanli.workloads.record import Inputs

MAX_BATCH = 6


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, 1, 1)
        self.short = nn.Conv2d(channels_in, channels_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(self.second(y) + self.short(x))


def conv_net() -> nn.Module:
    """Convolutions, a residual and a classifier over [N, 3, 16, 16]."""
    torch.manual_seed(0)
    net = nn.Sequential(
        Block(3, 16, 1), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return net.eval()


def images(count: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def program_of(
    model: nn.Module, folder: Path, *args: Any, dynamic: bool = True, **kwargs: Any
) -> Program:
    program = capture(
        model,
        Inputs(args=args, kwargs=kwargs),
        folder=folder,
        name="small",
        max_batch=MAX_BATCH,
        dynamic=dynamic,
    )
    assert program.meta.exported, program.meta.why_not
    return program


def transformer(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A two-layer BERT (with a mask) or GPT-2, and three samples for it."""
    import transformers

    torch.manual_seed(0)
    ids = torch.randint(5, 90, (3, 12), generator=torch.Generator().manual_seed(2))
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
        )
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        return transformers.BertModel(config).eval(), {"input_ids": ids, "attention_mask": mask}
    config = transformers.GPT2Config(
        vocab_size=100,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": ids}


def resnet() -> nn.Module:
    """The ResNet of transformers, small, with the CIFAR sizes."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7
    )
    return transformers.ResNetForImageClassification(config).eval()


def build(kind: str, folder: Path) -> Program:
    """One of "conv", "bert", "gpt2", "resnet" as a program."""
    if kind == "conv":
        return program_of(conv_net(), folder, images())
    if kind == "resnet":
        return program_of(resnet(), folder, images(size=32))
    model, inputs = transformer(kind)
    return program_of(model, folder, **inputs)


def fresh_inputs(program: Program, batch: int) -> list[torch.Tensor]:
    """Inputs of another seed than the captured ones, so that nothing baked in can pass.

    Images differ in brightness and colour, so that an untrained network tells them apart.
    """
    generator = torch.Generator().manual_seed(batch)

    def other(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.flip(0).contiguous()
        shape = [*tensor.shape[:2], *[1] * (tensor.dim() - 2)]
        shared = torch.randn(shape, generator=generator)
        return torch.randn(tensor.shape, generator=generator) + 2 * shared

    return [other(tensor) for tensor in program.inputs(batch)]


def eager(program: Program, flat: list[torch.Tensor]) -> list[torch.Tensor]:
    """What torch's own operators answer."""
    with torch.inference_mode():
        return program.call(program.exported_module(), flat)


def worst_error(values: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Largest RMS error over the reference's standard deviation; outputs must match in kind."""
    worst = 0.0
    assert len(values) == len(reference)
    for value, wanted in zip(values, reference, strict=True):
        assert value.shape == wanted.shape
        assert value.dtype == wanted.dtype
        error = (value.double() - wanted.double()).square().mean().sqrt() / wanted.double().std()
        worst = max(worst, float(error))
    return worst
