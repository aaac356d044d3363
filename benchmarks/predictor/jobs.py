"""Measured steps of whole models, each with the graph that it ran."""

import json
import re
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
    """The models of NeuSight: eager attention, as `transformers` had it then."""

    def build() -> dict[str, Any]:
        if name == "bert_large":
            make = models.hub("BertConfig", "BertModel", hidden_size=1024, num_hidden_layers=24,
                              num_attention_heads=16, intermediate_size=4096, attention="eager")  # fmt: skip
        elif name == "opt_13":
            make = models.hub("OPTConfig", "OPTForCausalLM", hidden_size=2048, ffn_dim=8192,
                              num_hidden_layers=24, num_attention_heads=32, attention="eager")  # fmt: skip
        else:
            wide, layers, heads = _GPT[name]
            make = models.hub("GPT2Config", "GPT2LMHeadModel", n_embd=wide, n_layer=layers,
                              n_head=heads, n_positions=length, attention="eager")  # fmt: skip
        kwargs: dict[str, Any] = {"input_ids": ids(batch, length)}
        if name != "bert_large":
            kwargs["use_cache"] = False
            if training:
                kwargs["labels"] = ids(batch, length)
        return {"model": make(), "kwargs": kwargs, "batch": batch, "training": training,
                "loss": (lambda out: out.last_hidden_state.sum()) if name == "bert_large" and training else None}  # fmt: skip

    return captured(f"neusight {name} {batch} {length} {training}", build)


@cache
def neusight_steps() -> tuple[Step, ...]:
    """Whole models in fp32 on one card. Switch Transformers are left out: their sizes are not
    stated with the data. Training is forward and backward without an update.
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
            work = without_update(work)
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


# timm name -> (config class, model class, settings)
_VIT = {"image_size": 224}
_TIMM: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit_tiny_patch16_224": ("ViTConfig", "ViTForImageClassification", {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}),
    "vit_small_patch16_224": ("ViTConfig", "ViTForImageClassification", {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}),
    "vit_base_patch16_224": ("ViTConfig", "ViTForImageClassification", {}),
    "vit_base_patch32_224": ("ViTConfig", "ViTForImageClassification", {"patch_size": 32}),
    "vit_large_patch16_224": ("ViTConfig", "ViTForImageClassification", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}),
    "deit_small_patch16_224": ("DeiTConfig", "DeiTForImageClassification", {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}),
    "swin_tiny_patch4_window7_224": ("SwinConfig", "SwinForImageClassification", {}),
    "swin_small_patch4_window7_224": ("SwinConfig", "SwinForImageClassification", {"depths": [2, 2, 18, 2]}),
    "swin_base_patch4_window7_224": ("SwinConfig", "SwinForImageClassification", {"depths": [2, 2, 18, 2], "embed_dim": 128, "num_heads": [4, 8, 16, 32]}),
    "convnext_tiny": ("ConvNextConfig", "ConvNextForImageClassification", {}),
    "convnext_small": ("ConvNextConfig", "ConvNextForImageClassification", {"depths": [3, 3, 27, 3]}),
    "convnext_base": ("ConvNextConfig", "ConvNextForImageClassification", {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]}),
    "resnet18": ("ResNetConfig", "ResNetForImageClassification", {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}),
    "resnet34": ("ResNetConfig", "ResNetForImageClassification", {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [3, 4, 6, 3]}),
    "resnet50": ("ResNetConfig", "ResNetForImageClassification", {}),
    "resnet101": ("ResNetConfig", "ResNetForImageClassification", {"depths": [3, 4, 23, 3]}),
    "regnety_040": ("RegNetConfig", "RegNetForImageClassification", {}),
    "mobilenetv2_100": ("MobileNetV2Config", "MobileNetV2ForImageClassification", {}),
    "efficientnet_b0": ("EfficientNetConfig", "EfficientNetForImageClassification", {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}),
    "efficientnet_b1": ("EfficientNetConfig", "EfficientNetForImageClassification", {"width_coefficient": 1.0, "depth_coefficient": 1.1, "hidden_dim": 1280, "image_size": 240}),
    "poolformer_s12": ("PoolFormerConfig", "PoolFormerForImageClassification", {}),
    "pvt_v2_b1": ("PvtV2Config", "PvtV2ForImageClassification", {"hidden_sizes": [64, 128, 320, 512], "num_attention_heads": [1, 2, 5, 8]}),
    "focalnet_tiny_srf": ("FocalNetConfig", "FocalNetForImageClassification", {}),
}  # fmt: skip


def timm_work(name: str, side: int, batch: int) -> Work | None:
    """The graph of a timm model, where `transformers` can build it; None where it cannot.

    The work of 32 images is scaled to the batch: all of its operators but weights are in
    proportion to it, and shapes are captured at the batch itself.
    """
    if name in ("resnext50_32x4d", "seresnext50_32x4d", "wide_resnet50_2"):
        settings: dict[str, Any] = {
            "resnext50_32x4d": {"groups": 32, "width": 128},
            "seresnext50_32x4d": {"groups": 32, "width": 128, "squeeze": True},
            "wide_resnet50_2": {"width": 128},
        }[name]
        return vision(
            f"timm {name}", lambda: models.Residual((3, 4, 6, 3), **settings), side, batch
        )
    if name not in _TIMM:
        return None
    kind, head, settings = _TIMM[name]
    make = models.hub(kind, head, num_labels=1000, **settings)
    return vision(f"timm {name}", make, side, batch)


def vision(
    name: str, make: Callable[[], Any], side: int, batch: int, *, training: bool = False
) -> Work:
    """The work of an image model."""

    def build() -> dict[str, Any]:
        def loss(out: Any, target: Any) -> torch.Tensor:
            return functional.cross_entropy(getattr(out, "logits", out), target)

        return {
            "model": make(), "args": (torch.empty(batch, 3, side, side, device="meta"),),
            "batch": batch, "training": training, "loss": loss if training else None,
            "targets": ids(batch) if training else None, "optimizer": "sgd-momentum",
        }  # fmt: skip

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


@dataclass(frozen=True, kw_only=True)
class Published:
    """One job of DeepLearningExamples.

    Attributes:
        folder: End of its path.
        fields: What its row must hold besides, in any column.
        batch: Samples per card by (card, narrow type).
        work: Batch -> its work.
        units: Published units in one sample (tokens, images).
    """

    folder: str
    work: Callable[[int], Work]
    batch: dict[tuple[str, bool], int]
    fields: tuple[str, ...] = ()
    units: float = 1.0
    channels_last: bool = True


def _plain(
    name: str, make: Callable[[], Any], inputs: Callable[[int], tuple[Any, ...]]
) -> Callable[[int], Work]:
    def work(batch: int) -> Work:
        def build() -> dict[str, Any]:
            return {"model": make(), "args": inputs(batch), "batch": batch, "training": True, "optimizer": "adam"}  # fmt: skip

        return captured(f"job {name} {batch}", build)

    return work


def _bert(length: int, head: str) -> Callable[[int], Work]:
    def work(batch: int) -> Work:
        def build() -> dict[str, Any]:
            make = models.hub("BertConfig", head, hidden_size=1024, num_hidden_layers=24,
                              num_attention_heads=16, intermediate_size=4096, attention="eager")  # fmt: skip
            kwargs: dict[str, Any] = {"input_ids": ids(batch, length)}
            if head == "BertForPreTraining":
                kwargs |= {"labels": ids(batch, length), "next_sentence_label": ids(batch)}
            else:
                kwargs |= {"start_positions": ids(batch), "end_positions": ids(batch)}
            return {"model": make(), "kwargs": kwargs, "batch": batch, "training": True, "optimizer": "adam"}  # fmt: skip

        return captured(f"bert {head} {length} {batch}", build)

    return work


def _image(name: str, make: Callable[[], Any], side: int = 224) -> Callable[[int], Work]:
    return lambda batch: vision(f"dle {name}", make, side, batch, training=True)


def _efficient(width: float, depth: float, hidden: int, side: int) -> Callable[[], Any]:
    return models.hub("EfficientNetConfig", "EfficientNetForImageClassification", num_labels=1000,
                      width_coefficient=width, depth_coefficient=depth, hidden_dim=hidden, image_size=side)  # fmt: skip


def _same(a100: tuple[int, int], v100: tuple[int, int]) -> dict[tuple[str, bool], int]:
    """Batches: (fp32 or tf32, narrow) on each card."""
    return {("A100", False): a100[0], ("A100", True): a100[1],
            ("V100", False): v100[0], ("V100", True): v100[1]}  # fmt: skip


JOBS: dict[str, Published] = {
    "ResNet-50": Published(folder="resnet50v1.5", work=_image("resnet50", lambda: models.Residual((3, 4, 6, 3))), batch=_same((256, 256), (128, 256))),
    "ResNeXt-101": Published(folder="/resnext101-32x4d", work=_image("resnext101", lambda: models.Residual((3, 4, 23, 3), groups=32, width=128)), batch=_same((128, 128), (64, 128))),
    "SE-ResNeXt-101": Published(folder="se-resnext101-32x4d", work=_image("seresnext101", lambda: models.Residual((3, 4, 23, 3), groups=32, width=128, squeeze=True)), batch=_same((128, 128), (64, 128))),
    "EfficientNet-B0": Published(folder="/efficientnet", fields=("efficientnet-b0",), work=_image("efficientnet-b0", _efficient(1.0, 1.0, 1280, 224)), batch=_same((256, 256), (128, 256))),
    "EfficientNet-B4": Published(folder="/efficientnet", fields=("efficientnet-b4",), work=_image("efficientnet-b4", _efficient(1.4, 1.8, 1792, 380), 380), batch=_same((64, 128), (32, 64))),
    "SSD300 32": Published(folder="/SSD", fields=('"32"',), work=_image("ssd", models.Ssd, 300), batch=_same((32, 32), (32, 32))),
    "SSD300 64": Published(folder="/SSD", fields=('"64"',), work=_image("ssd", models.Ssd, 300), batch=_same((64, 64), (64, 64))),
    "BERT-large 128": Published(folder="/BERT", fields=('"Sequence length": "128"',), work=_bert(128, "BertForPreTraining"), batch=_same((128, 256), (32, 64))),
    "BERT-large 512": Published(folder="/BERT", fields=('"Sequence length": "512"',), work=_bert(512, "BertForPreTraining"), batch=_same((16, 32), (4, 8))),
    "BERT-large SQuAD": Published(folder="/BERT", fields=("FINE",), work=_bert(384, "BertForQuestionAnswering"), batch=_same((32, 32), (8, 16))),
    "GNMT": Published(folder="/GNMT", work=_plain("gnmt", models.Gnmt, lambda b: (ids(b, 26), ids(b, 26))), units=52.0, batch=_same((128, 128), (128, 128))),
    "Transformer": Published(folder="Translation/Transformer", work=_plain("transformer", models.Seq2Seq, lambda b: (ids(b, 28), ids(b, 28))), units=28.0, batch=_same((366, 366), (91, 183))),
    "NCF": Published(folder="/NCF", work=_plain("ncf", models.Ncf, lambda b: (ids(b), ids(b))), batch=_same((1048576, 1048576), (1048576, 1048576))),
    "Jasper 32": Published(folder="/Jasper", fields=('"Batch size / GPU": "32"',), work=_plain("jasper", models.Jasper, lambda b: (torch.empty(b, 64, 1670, device="meta"),)), batch=_same((32, 32), (32, 32))),
    "nnU-Net 2D 64": Published(folder="/nnUNet", fields=('"Dimension": "2"', '"Batch size / GPU": "64"'), work=_plain("unet2", lambda: models.Unet(2, (64, 128, 256, 512, 512, 512)), lambda b: (torch.empty(b, 5, 192, 160, device="meta"),)), batch=_same((64, 64), (64, 64))),
    "nnU-Net 3D 2": Published(folder="/nnUNet", fields=('"Dimension": "3"', '"Batch size / GPU": "2"'), work=_plain("unet3", lambda: models.Unet(3, (32, 64, 128, 256, 320, 320)), lambda b: (torch.empty(b, 5, 128, 128, 128, device="meta"),)), batch=_same((2, 2), (2, 2))),
    "Transformer-XL base": Published(folder="/Transformer-XL", fields=("BASE",), work=_plain("xl", lambda: models.TransformerXl(16, 512, 8, 2048, 192), lambda b: (ids(b, 192),)), units=192.0, batch=_same((32, 32), (32, 32))),
}  # fmt: skip


def _number(text: str) -> float | None:
    """The first number of a cell: "1,200 img/s" is 1200, "10.42M" is 1.042e7."""
    found = re.match(r"^[~<]?\s*([\d,]+(?:\.\d+)?)\s*([MKk]?)", text.strip())
    if not found:
        return None
    scale = {"": 1.0, "M": 1e6, "K": 1e3, "k": 1e3}[found[2]]
    return float(found[1].replace(",", "")) * scale


@cache
def published_steps() -> tuple[Step, ...]:
    """DeepLearningExamples: PyTorch training on one card, V100 16 and 32 GB and A100."""
    found = []
    for row in rows("deeplearningexamples.csv"):
        section = row["section"]
        last = section.split(">")[-1]
        card = _card(last)
        if card is None or ("raining" not in section and "tuning" not in section):
            continue
        cells: dict[str, str] = json.loads(row["row_json"])
        count = next((c for k, c in cells.items() if k in ("GPUs", "Number of GPUs")), "")
        if count != "1":
            continue
        for name, job in JOBS.items():
            fine = "ine-tuning" in last
            wanted = [f for f in job.fields if f not in ("FINE", "BASE")]
            if not ("/" + row["model_dir"]).endswith(job.folder):
                continue
            if ("FINE" in job.fields) != fine and "BERT" in name:
                continue
            if not all(f in row["row_json"] for f in wanted):
                continue
            found += list(_of_row(name, job, card, cells))
    return tuple(found)


def _card(section: str) -> str | None:
    if "A100" in section:
        return "A100 SXM4 40GB" if "40GB" in section else "A100 SXM4 80GB"
    if "DGX-1" in section and ("16GB" in section or "16G" in section):
        return "Tesla V100 SXM2 16GB"
    if "DGX-1" in section:
        return "Tesla V100 SXM2 32GB"
    return None


def _of_row(name: str, job: Published, card: str, cells: dict[str, str]) -> list[Step]:
    found = []
    family = "A100" if card.startswith("A100") else "V100"
    for key, text in cells.items():
        low = key.lower()
        if "speedup" in low or "scaling" in low or "time" in low or "size" in low or "step" in low:
            continue
        narrow = "mixed" in low or "amp" in low or "bf16" in low
        wide = not narrow and ("fp32" in low or "tf32" in low)
        value = _number(text)
        if not (narrow or wide) or value is None:
            continue
        batch = job.batch[family, narrow]
        dtype = "fp16" if narrow else ("tf32" if family == "A100" else "fp32")
        found.append(
            Step(
                data="DeepLearningExamples",
                job=f"{name} {'narrow' if narrow else 'wide'}",
                gpu=gpu(card),
                how=How(dtype=dtype, autocast=narrow, channels_last=job.channels_last and narrow),
                work=job.work(batch),
                seconds=batch * job.units / value,
            )
        )
    return found
