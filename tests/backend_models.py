"""Small models that the backends' tests compute, and what is asked of every backend."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from suanli.base.plan import Plan
from suanli.engines.backend import Backend, Runner
from suanli.engines.program import Program, capture
from suanli.workloads.record import Inputs

MAX_BATCH = 5


class ConvNet(nn.Module):
    """Convolutions with batch normalisation, in place and not, a view, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.second_norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 16, 10)
        for norm in (self.norm, self.second_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu_(self.norm(self.first(x)))
        maps = torch.relu(self.second_norm(self.second(x)))
        pooled = nn.functional.avg_pool2d(maps, 1)
        return {"logits": self.head(pooled.view(pooled.shape[0], -1)), "maps": maps}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(32, 64)
        self.out = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(x)))


class Aliases(nn.Module):
    """Outputs in the memory of an input, a weight and each other, and one that is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.layer(x)
        return x, self.weight, y, y[:, :2], self.weight * 2


def program(model: nn.Module, inputs: Inputs, folder: Path, *, dynamic: bool = True) -> Program:
    torch.manual_seed(0)
    return capture(
        model.eval(), inputs, folder=folder, name="model", max_batch=MAX_BATCH, dynamic=dynamic
    )


def conv_program(folder: Path, *, dynamic: bool = True) -> Program:
    torch.manual_seed(0)
    inputs = Inputs(args=(torch.randn(2, 3, 8, 8),))
    return program(ConvNet(), inputs, folder, dynamic=dynamic)


def mlp_program(folder: Path) -> Program:
    torch.manual_seed(0)
    return program(Mlp(), Inputs(args=(torch.randn(2, 32),)), folder)


def bert_program(folder: Path) -> Program:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        vocab_size=100,
    )
    ids = torch.randint(0, 100, (2, 16))
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    inputs = Inputs(kwargs={"input_ids": ids, "attention_mask": mask})
    return program(BertModel(config), inputs, folder)


class Gpt2(nn.Module):
    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        config = GPT2Config(
            n_layer=2,
            n_embd=64,
            n_head=4,
            vocab_size=100,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.model = GPT2LMHeadModel(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits


def gpt2_program(folder: Path) -> Program:
    torch.manual_seed(0)
    return program(Gpt2(), Inputs(args=(torch.randint(0, 100, (2, 16)),)), folder)


def resnet_program(folder: Path) -> Program:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    inputs = Inputs(args=(torch.randn(2, 3, 32, 32),))
    return program(ResNetForImageClassification(config), inputs, folder)


def reference(program: Program, flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return program.call(program.exported_module(), flat)


def built(backend: Backend, program: Program, plan: Plan, folder: Path) -> Runner:
    folder.mkdir(parents=True, exist_ok=True)
    note = backend.build(program, plan, folder)
    return backend.load(program, note.plan, folder)


def relative_error(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    assert len(got) == len(wanted)
    worst = 0.0
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        assert mine.isfinite().all()
        worst = max(worst, float((mine - theirs).norm() / theirs.norm()))
    return worst


def check_values(
    runner: Runner, program: Program, limit: float, batches: Sequence[int] = (1, 3, MAX_BATCH)
) -> None:
    for batch in batches:
        flat = program.inputs(batch)
        assert relative_error(runner(flat), reference(program, flat)) < limit, batch
