"""DeepLearningExamples: published training throughput, and what each job trains."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.predictor import models, sequences
from benchmarks.predictor.data import gpu, rows
from benchmarks.predictor.jobs import Step, efficient_net, ids, vision, without_update
from benchmarks.predictor.works import captured
from suanli.base.work import Work
from suanli.cost.work_kernels import How


@dataclass(frozen=True, kw_only=True)
class Published:
    """One job of DeepLearningExamples.

    Attributes:
        folder: End of its path.
        section: What the heading above its table must hold.
        fields: What its row must hold besides, in any column.
        batch: Samples per card by (card, narrow type).
        work: Batch -> its work.
        units: Published units in one sample (tokens, images).
    """

    folder: str
    work: Callable[[int], Work]
    batch: dict[tuple[str, bool], int]
    section: str = ""
    fields: tuple[str, ...] = ()
    units: float = 1.0
    channels_last: bool = True


def _plain(
    name: str, make: Callable[[], Any], inputs: Callable[[int], tuple[Any, ...]]
) -> Callable[[int], Work]:
    def work(batch: int) -> Work:
        def build() -> dict[str, Any]:
            return {
                "model": make(),
                "args": inputs(batch),
                "batch": batch,
                "training": True,
                "optimizer": "adam",
            }

        return captured(f"job {name} {batch}", build)

    return work


_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "attention": "eager",
}


def _squad(batch: int) -> Work:
    """BERT-large answering questions about 384 tokens."""

    def build() -> dict[str, Any]:
        make = models.hub("BertConfig", "BertForQuestionAnswering", **_LARGE)
        return {
            "model": make(),
            "kwargs": {
                "input_ids": ids(batch, 384),
                "start_positions": ids(batch),
                "end_positions": ids(batch),
            },
            "batch": batch,
            "training": True,
            "optimizer": "adam",
        }

    return captured(f"bert squad 384 {batch}", build)


def _masked(batch: int) -> Work:
    """BERT-large in pre-training: words at the 20 masked places of 128; updates are rare."""

    def build() -> dict[str, Any]:
        with torch.device("meta"):
            model = sequences.MaskedBert(models.hub("BertConfig", "BertModel", **_LARGE)(), 20)
        return {"model": model, "args": (ids(batch, 128),), "batch": batch, "training": True}

    return without_update(captured(f"bert masked 128 {batch}", build))


def _image(name: str, make: Callable[[], Any], side: int = 224) -> Callable[[int], Work]:
    return lambda batch: vision(f"dle {name}", make, side, batch, training=True)


def _same(a100: tuple[int, int], v100: tuple[int, int]) -> dict[tuple[str, bool], int]:
    """Batches: (fp32 or tf32, narrow) on each card."""
    return {
        ("A100", False): a100[0],
        ("A100", True): a100[1],
        ("V100", False): v100[0],
        ("V100", True): v100[1],
    }


_xl_base = _plain(
    "xl base",
    lambda: sequences.TransformerXl(16, 512, 8, 2048, 192),
    lambda b: (ids(b, 192),),
)
_xl_large = _plain(
    "xl large",
    lambda: sequences.TransformerXl(18, 1024, 16, 4096, 384),
    lambda b: (ids(b, 384),),
)
# An eighth of a sentence stands for the whole: its steps are all alike.
_FRAMES = 100

JOBS: dict[str, Published] = {
    "ResNet-50": Published(
        folder="resnet50v1.5",
        work=_image("resnet50", lambda: models.Residual((3, 4, 6, 3))),
        batch=_same((256, 256), (128, 256)),
    ),
    "ResNeXt-101": Published(
        folder="/resnext101-32x4d",
        work=_image("resnext101", lambda: models.Residual((3, 4, 23, 3), groups=32, width=128)),
        batch=_same((128, 128), (64, 128)),
    ),
    "SE-ResNeXt-101": Published(
        folder="se-resnext101-32x4d",
        work=_image(
            "seresnext101",
            lambda: models.Residual((3, 4, 23, 3), groups=32, width=128, squeeze=True),
        ),
        batch=_same((128, 128), (64, 128)),
    ),
    "EfficientNet-B0": Published(
        folder="/efficientnet",
        fields=('"efficientnet-b0"',),
        work=_image("mb0", efficient_net(1.0, 1.0)),
        batch=_same((256, 256), (128, 256)),
    ),
    "EfficientNet-B4": Published(
        folder="/efficientnet",
        fields=('"efficientnet-b4"',),
        work=_image("mb4", efficient_net(1.4, 1.8), 380),
        batch=_same((64, 128), (32, 64)),
    ),
    "SSD300 32": Published(
        folder="/SSD",
        fields=('"32"',),
        work=_image("ssd", models.Ssd, 300),
        batch=_same((32, 32), (32, 32)),
    ),
    "SSD300 64": Published(
        folder="/SSD",
        fields=('"64"',),
        work=_image("ssd", models.Ssd, 300),
        batch=_same((64, 64), (64, 64)),
    ),
    "BERT-large 128": Published(
        folder="/BERT",
        fields=('"Sequence length": "128"',),
        work=_masked,
        batch=_same((128, 256), (32, 64)),
    ),
    "BERT-large SQuAD": Published(
        folder="/BERT",
        fields=("FINE",),
        work=_squad,
        batch=_same((32, 32), (8, 16)),
    ),
    "GNMT": Published(
        folder="/GNMT",
        work=_plain("gnmt", sequences.Gnmt, lambda b: (ids(b, 26), ids(b, 26))),
        units=52.0,
        batch=_same((128, 128), (128, 128)),
    ),
    "Transformer": Published(
        folder="Translation/Transformer",
        work=_plain("transformer", sequences.Seq2Seq, lambda b: (ids(b, 28), ids(b, 28))),
        units=28.0,
        batch=_same((366, 366), (91, 183)),
    ),
    "NCF": Published(
        folder="/NCF",
        work=_plain("ncf", sequences.Ncf, lambda b: (ids(b), ids(b))),
        batch=_same((1048576, 1048576), (1048576, 1048576)),
    ),
    "Jasper 32": Published(
        folder="/Jasper",
        fields=('"Batch size / GPU": "32"',),
        work=_plain(
            "jasper1500",
            sequences.Jasper,
            lambda b: (torch.empty(b, 64, 1500, device="meta"),),
        ),
        batch=_same((32, 32), (32, 32)),
        channels_last=False,
    ),
    "nnU-Net 2D 64": Published(
        folder="/nnUNet",
        fields=('"Dimension": "2"', '"Batch size / GPU": "64"'),
        work=_plain(
            "unet2b",
            lambda: models.Unet(2, (32, 64, 128, 256, 512, 512)),
            lambda b: (torch.empty(b, 5, 192, 160, device="meta"),),
        ),
        batch=_same((64, 64), (64, 64)),
        channels_last=False,
    ),
    "nnU-Net 3D 2": Published(
        folder="/nnUNet",
        fields=('"Dimension": "3"', '"Batch size / GPU": "2"'),
        work=_plain(
            "unet3",
            lambda: models.Unet(3, (32, 64, 128, 256, 320, 320)),
            lambda b: (torch.empty(b, 5, 128, 128, 128, device="meta"),),
        ),
        batch=_same((2, 2), (2, 2)),
        channels_last=False,
    ),
    "Transformer-XL base": Published(
        folder="/Transformer-XL",
        section="Base model",
        fields=('"Batch Size / GPU": "32"',),
        work=_xl_base,
        units=192.0,
        batch=_same((32, 32), (32, 32)),
    ),
    "Transformer-XL base 16": Published(
        folder="/Transformer-XL",
        section="Base model",
        fields=('"Batch Size / GPU": "16"',),
        work=_xl_base,
        units=192.0,
        batch=_same((16, 16), (16, 16)),
    ),
    "Transformer-XL large": Published(
        folder="/Transformer-XL",
        section="Large model",
        fields=('"Batch Size / GPU": "8"',),
        work=_xl_large,
        units=384.0,
        batch=_same((8, 8), (8, 8)),
    ),
    "Transformer-XL large 2": Published(
        folder="/Transformer-XL",
        section="Large model",
        fields=('"Batch Size / GPU": "2"',),
        work=_xl_large,
        units=384.0,
        batch=_same((2, 2), (2, 2)),
    ),
    "Tacotron 2": Published(
        folder="/Tacotron2",
        fields=("Number of mels",),
        work=_plain(
            "tacotron2",
            sequences.Tacotron2,
            lambda b: (ids(b, 20), torch.empty(b, _FRAMES, 80, device="meta")),
        ),
        # A batch is as long as its longest sentence: about 860 frames, 566 on average (LJSpeech).
        units=_FRAMES * 566 / 860,
        batch=_same((128, 128), (48, 104)),
    ),
}


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
        card = _card(section)
        if card is None or ("raining" not in section and "tuning" not in section):
            continue
        cells: dict[str, str] = json.loads(row["row_json"])
        count = next((c for k, c in cells.items() if k in ("GPUs", "Number of GPUs")), "")
        if count != "1":
            continue
        for name, job in JOBS.items():
            fine = "ine-tuning" in last
            wanted = [f for f in job.fields if f != "FINE"]
            if job.section not in section or not ("/" + row["model_dir"]).endswith(job.folder):
                continue
            if ("FINE" in job.fields) != fine and "BERT" in name:
                continue
            if not all(f in row["row_json"] for f in wanted):
                continue
            found += list(_of_row(name, job, card, cells))
    first: dict[tuple[str, str], Step] = {}
    for step in found:
        first.setdefault((step.job, step.gpu.name), step)
    return tuple(first.values())


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
        narrow = "mixed" in low or "bf16" in low
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
