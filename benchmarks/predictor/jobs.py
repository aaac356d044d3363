"""Measured steps of whole models, each with the graph that it ran."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from benchmarks.predictor import models
from benchmarks.predictor.data import gpu, rows
from benchmarks.predictor.works import captured
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.work import Work
from suanli.cost.work_kernels import How


@dataclass(frozen=True, kw_only=True)
class Step:
    """One measured step of one job on one card.

    Attributes:
        data: Name of the data set.
        job: What ran, the same on every card it ran on.
        gpu: The card.
        how: Type, plan and layout.
        work: Of the batch that was measured.
        seconds: Of one step of one card.
        devices: Cards that shared the step's data.
    """

    data: str
    job: str
    gpu: GpuSheet
    how: How
    work: Work
    seconds: float
    devices: int = 1


def ids(*shape: int) -> torch.Tensor:
    """Token numbers of this shape."""
    return torch.zeros(*shape, dtype=torch.long)


_GPT = {
    "gpt2_large": (1280, 36, 20),
    "gpt3_27": (2560, 32, 32),
    "gpt3_xl": (3072, 24, 24),
}


def _language(name: str, batch: int, length: int, *, training: bool) -> Work:
    """The models of NeuSight: eager attention, as `transformers` had it then.

    BERT has the head of its pretraining in training, which is a tenth of its products, and that of
    a classifier otherwise; the loss is the cross entropy of each token (its script `trace.py`).
    """

    def loss(out: Any) -> torch.Tensor:
        logits = out.prediction_logits if name == "bert_large" else out.logits
        return functional.cross_entropy(logits.flatten(0, -2), ids(batch * length))

    def build() -> dict[str, Any]:
        if name == "bert_large":
            make = models.hub(
                "BertConfig",
                "BertForPreTraining" if training else "BertForSequenceClassification",
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
                attention="eager",
            )
        elif name == "opt_13":
            make = models.hub(
                "OPTConfig",
                "OPTForCausalLM",
                hidden_size=2048,
                ffn_dim=8192,
                num_hidden_layers=24,
                num_attention_heads=32,
                attention="eager",
            )
        else:
            wide, layers, heads = _GPT[name]
            make = models.hub(
                "GPT2Config",
                "GPT2LMHeadModel",
                n_embd=wide,
                n_layer=layers,
                n_head=heads,
                n_positions=length,
                attention="eager",
            )
        kwargs: dict[str, Any] = {"input_ids": ids(batch, length)}
        if name != "bert_large":
            kwargs["use_cache"] = False
        return {
            "model": make(),
            "kwargs": kwargs,
            "batch": batch,
            "training": training,
            "loss": loss if training else None,
        }

    return captured(f"neusight {name} {batch} {length} {training} headed", build)


@cache
def neusight_steps() -> tuple[Step, ...]:
    """Whole models in fp32 on one card.

    Switch Transformers are left out: their sizes are not stated with the data. Training is forward
    and backward without an update, into gradients that are never cleared.
    """
    found = []
    for row in rows("neusight_e2e.csv"):
        name, option = row["model"], row["option"]
        if name == "switchxl4" or option not in ("", "fusion"):
            continue
        batch, length = int(row["batch"]), int(row["seqlen"])
        training = row["mode"] == "train"
        work = _language(name, batch, length, training=training)
        if training:
            work = with_adding(work)
        plan = "compiled" if option == "fusion" else "eager"
        found.append(
            Step(
                data="NeuSight end to end",
                job=f"{name} {row['mode']} {length}x{batch} {plan}",
                gpu=gpu(row["device"]),
                how=How(dtype="fp32", plan_kind=plan),  # type: ignore[arg-type]
                work=work,
                seconds=float(row["e2e_latency"]) * 1e-3,
            )
        )
    return tuple(found)


def without_update(work: Work) -> Work:
    """The forward and backward pass alone."""
    from dataclasses import replace

    return replace(work, operators=tuple(op for op in work.operators if op.phase != "optimizer"))


def with_clearing(work: Work) -> Work:
    """The forward and backward pass with gradients that are cleared and then added to."""
    return _on_gradients(work, "clear_gradient", read=2, written=2)


def with_adding(work: Work) -> Work:
    """The forward and backward pass with gradients that are added to those of the step before."""
    return _on_gradients(work, "add_gradient", read=2, written=1)


def _on_gradients(work: Work, name: str, *, read: int, written: int) -> Work:
    """What is done to gradients in place of the update, in passes over them."""
    from dataclasses import replace

    operators = []
    for op in work.operators:
        if op.phase == "optimizer":
            size = op.parameter_bytes
            traffic = {"bytes_read": read * size, "bytes_written": written * size}
            operators.append(replace(op, name=name, **traffic))
        else:
            operators.append(op)
    return replace(work, operators=tuple(operators))


_RESIDUAL: dict[str, dict[str, Any]] = {
    "resnet50": {"depths": (3, 4, 6, 3)},
    "resnet152": {"depths": (3, 8, 36, 3)},
    "resnext50_32x4d": {"depths": (3, 4, 6, 3), "groups": 32, "width": 128},
    "wide_resnet50_2": {"depths": (3, 4, 6, 3), "width": 128},
}


# Folder -> what its convolutions in "float" run in.
_WIDE = {"dgx-a100": "tf32", "TitanRTX": "fp32", "2080ti(2)": "fp32", "TITANXP": "fp32"}


@cache
def torchvision_steps() -> tuple[Step, ...]:
    """Residual networks at batch 12, where the host is slow: an A100, three cards for people.

    Images lie channels first; fp32 convolutions run in TF32 where there are such units, as they do
    unless told otherwise.
    """
    found = []
    for row in rows("torchvision_step_ms.csv"):
        settings = _RESIDUAL.get(row["model"])
        if settings is None or row["folder"] not in _WIDE:
            continue
        if row["num_gpus"] != "1" or row["dtype"] == "double":
            continue
        if row["folder"] == "TITANXP" and row["dtype"] == "half":
            continue  # its halves are slower than its floats, and nobody trains in them
        training = row["mode"] == "train"
        work = vision(
            f"torchvision {row['model']}",
            functools.partial(models.Residual, **settings),
            224,
            12,
            training=training,
        )
        wide = _WIDE[row["folder"]]
        found.append(
            Step(
                data="torchvision",
                job=f"{row['model']} {row['dtype']} {row['mode']}",
                gpu=gpu(row["gpu"]),
                how=How(dtype="fp16" if row["dtype"] == "half" else wide),
                work=with_clearing(work),
                seconds=float(row["median_ms"]) * 1e-3,
            )
        )
    return tuple(found)


# timm name -> (config class, model class, settings)
_VIT = {"image_size": 224}
_TIMM: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (
        "ViTConfig",
        "ViTForImageClassification",
        {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    ),
    "vit_small_patch16_224": (
        "ViTConfig",
        "ViTForImageClassification",
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    ),
    "vit_base_patch16_224": ("ViTConfig", "ViTForImageClassification", {}),
    "vit_base_patch32_224": ("ViTConfig", "ViTForImageClassification", {"patch_size": 32}),
    "vit_large_patch16_224": (
        "ViTConfig",
        "ViTForImageClassification",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "deit_small_patch16_224": (
        "DeiTConfig",
        "DeiTForImageClassification",
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    ),
    "swin_tiny_patch4_window7_224": ("SwinConfig", "SwinForImageClassification", {}),
    "swin_small_patch4_window7_224": (
        "SwinConfig",
        "SwinForImageClassification",
        {"depths": [2, 2, 18, 2]},
    ),
    "swin_base_patch4_window7_224": (
        "SwinConfig",
        "SwinForImageClassification",
        {"depths": [2, 2, 18, 2], "embed_dim": 128, "num_heads": [4, 8, 16, 32]},
    ),
    "convnext_tiny": ("ConvNextConfig", "ConvNextForImageClassification", {}),
    "convnext_small": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"depths": [3, 3, 27, 3]},
    ),
    "convnext_base": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]},
    ),
    "resnet18": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    ),
    "resnet34": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [3, 4, 6, 3]},
    ),
    "resnet50": ("ResNetConfig", "ResNetForImageClassification", {}),
    "resnet101": ("ResNetConfig", "ResNetForImageClassification", {"depths": [3, 4, 23, 3]}),
    "regnety_040": ("RegNetConfig", "RegNetForImageClassification", {}),
    "mobilenetv2_100": (
        "MobileNetV2Config",
        "MobileNetV2ForImageClassification",
        {"tf_padding": False},
    ),
    "efficientnet_b0": (
        "EfficientNetConfig",
        "EfficientNetForImageClassification",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224},
    ),
    "poolformer_s12": ("PoolFormerConfig", "PoolFormerForImageClassification", {}),
    "pvt_v2_b1": (
        "PvtV2Config",
        "PvtV2ForImageClassification",
        {"hidden_sizes": [64, 128, 320, 512], "num_attention_heads": [1, 2, 5, 8]},
    ),
    "focalnet_tiny_srf": ("FocalNetConfig", "FocalNetForImageClassification", {}),
}


# Trained with PyTorch 1.12, which had no fused attention.
_UNFUSED = ("ViTConfig", "DeiTConfig")


def efficient_net(width: float, depth: float) -> Callable[[], Any]:
    return lambda: models.EfficientNet(width, depth)


_EFFICIENT = {"efficientnet_b0": (1.0, 1.0), "efficientnet_b1": (1.0, 1.1)}


def timm_work(name: str, side: int, batch: int, *, training: bool = False) -> Work | None:
    """The graph of a timm model, where it can be built here; None where it cannot."""
    if name in ("resnext50_32x4d", "seresnext50_32x4d", "wide_resnet50_2"):
        settings: dict[str, Any] = {
            "resnext50_32x4d": {"groups": 32, "width": 128},
            "seresnext50_32x4d": {"groups": 32, "width": 128, "squeeze": True},
            "wide_resnet50_2": {"width": 128},
        }[name]
        return vision(
            f"timm {name}",
            lambda: models.Residual((3, 4, 6, 3), **settings),
            side,
            batch,
            training=training,
        )
    if name in _EFFICIENT:
        return vision(
            f"timm own {name}", efficient_net(*_EFFICIENT[name]), side, batch, training=training
        )
    if name not in _TIMM:
        return None
    kind, head, settings = _TIMM[name]
    if training and kind in _UNFUSED:
        settings = {**settings, "attention": "eager"}
        name = f"{name} eager"
    make = models.hub(kind, head, num_labels=1000, **settings)
    return vision(f"timm {name} {len(settings)}", make, side, batch, training=training)


def vision(
    name: str,
    make: Callable[[], Any],
    side: int,
    batch: int,
    *,
    training: bool = False,
    optimizer: str = "sgd-momentum",
) -> Work:
    """The work of an image model."""

    def build() -> dict[str, Any]:
        def loss(out: Any, target: Any) -> torch.Tensor:
            return functional.cross_entropy(getattr(out, "logits", out), target)

        return {
            "model": make(),
            "args": (torch.empty(batch, 3, side, side, device="meta"),),
            "batch": batch,
            "training": training,
            "loss": loss if training else None,
            "targets": ids(batch) if training else None,
            "optimizer": optimizer,
        }

    return captured(f"{name} {side} {batch} {training}", build)


def timm_tables(layout: str = "nchw") -> dict[str, dict[tuple[str, int], dict[str, str]]]:
    """Card -> (model, image side) -> row, for inference with automatic mixed precision."""
    return {
        card: {
            (row["model"], int(row["infer_img_size"])): row
            for row in rows(f"timm_benchmark-infer-amp-{layout}-pt240-cu124-{card}.csv")
        }
        for card in ("rtx3090", "rtx4090")
    }


@cache
def timm_steps() -> tuple[Step, ...]:
    """Inference of the models that can be built, on both cards."""
    found = []
    for layout in ("nchw", "nhwc"):
        for card, table in timm_tables(layout).items():
            for (name, side), row in table.items():
                if side not in (224, 240) or not row["infer_step_time"]:
                    continue
                batch = int(row["infer_batch_size"])
                work = timm_work(name, side, batch)
                if work is None:
                    continue
                how = How(dtype="fp16", autocast=True, channels_last=layout == "nhwc")
                found.append(
                    Step(
                        data="timm graphs",
                        job=f"{name} {side} {layout} {batch}",
                        gpu=gpu(card),
                        how=how,
                        work=work,
                        seconds=float(row["infer_step_time"]) * 1e-3,
                    )
                )
    return tuple(found)


# Of both layouts in one table; the row of regnety_040, channels last, is seven times too slow.
_TRAINED = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "efficientnet_b0",
    "mobilenetv2_100",
    "convnext_tiny",
    "vit_base_patch16_224",
)


@cache
def timm_training_steps() -> tuple[Step, ...]:
    """Training of some models with automatic mixed precision on a GeForce RTX 3090."""
    found = []
    for layout in ("nchw", "nhwc"):
        for row in rows(f"timm_benchmark-train-amp-{layout}-pt112-cu113-rtx3090.csv"):
            if row["model"] not in _TRAINED or row["train_img_size"] != "224":
                continue
            batch = int(row["train_batch_size"])
            work = timm_work(row["model"], 224, batch, training=True)
            if work is None:
                continue
            found.append(
                Step(
                    data="timm training",
                    job=f"{row['model']} {layout} {batch}",
                    gpu=gpu("rtx3090"),
                    how=How(dtype="fp16", autocast=True, channels_last=layout == "nhwc"),
                    work=work,
                    seconds=float(row["train_step_time"]) * 1e-3,
                )
            )
    return tuple(found)
