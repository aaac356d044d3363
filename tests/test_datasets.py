"""Loaders of labelled data: what they read, and what they refuse."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from suanli.base.errors import BadInputError
from suanli.workloads.datasets import (
    LabelledImages,
    Scaling,
    read_cifar10,
    read_digits,
    read_idx,
    read_image_folder,
    read_mnist,
    split,
)
from suanli.workloads.record import Data, Samples
from suanli.workloads.resolve import resolve

RANDOM = np.random.default_rng(0)


def _idx(array: np.ndarray, code: int = 0x08) -> bytes:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def _mnist(folder: Path, *, packed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    images = RANDOM.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        for name, array in (
            (f"{part}-images-idx3-ubyte", images),
            (f"{part}-labels-idx1-ubyte", labels),
        ):
            data = _idx(array)
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)
    return images, labels


def _rows(samples: Samples) -> set[bytes]:
    return {row.numpy().tobytes() for row in samples.inputs[0]}


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path: Path, packed: bool) -> None:
    images, labels = _mnist(tmp_path, packed=packed)
    train, test = read_mnist(tmp_path)
    assert np.array_equal(train.pixels[:, 0], images)
    assert np.array_equal(test.labels, labels)
    assert train.classes == tuple("0123456789")


def test_idx_of_wider_types_is_big_endian(tmp_path: Path) -> None:
    numbers = np.array([[1, -2, 70_000]], dtype=np.int32)
    (tmp_path / "n").write_bytes(_idx(numbers, 0x0C))
    assert np.array_equal(read_idx(tmp_path / "n"), numbers)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-5], "should hold"),
        (lambda data: data + b"x", "should hold"),
        (lambda data: b"PNG" + data[3:], "not an IDX file"),
        (lambda data: data[:6], "ends inside its header"),
        (lambda data: data[:4] + b"\xff" * 12 + data[16:], "more than is believed"),
        (lambda data: gzip.compress(data)[:-40], "damaged"),
        (lambda data: gzip.compress(data)[:1500] + b"\xff" * 200, "damaged"),
        (lambda data: b"", "not an IDX file"),
    ],
)
def test_damaged_idx_is_refused_in_one_line(tmp_path: Path, damage, said: str) -> None:  # type: ignore[no-untyped-def]
    images = RANDOM.integers(0, 256, (4, 28, 28), dtype=np.uint8)
    path = tmp_path / "images"
    path.write_bytes(damage(_idx(images)))
    with pytest.raises(BadInputError, match=said) as caught:
        read_idx(path)
    assert "\n" not in str(caught.value)


def test_label_out_of_range_and_other_count(tmp_path: Path) -> None:
    _mnist(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(_idx(np.full(30, 11, dtype=np.uint8))))
    with pytest.raises(BadInputError, match="label 11 is out of range"):
        read_mnist(tmp_path)
    path.write_bytes(gzip.compress(_idx(np.zeros(29, dtype=np.uint8))))
    with pytest.raises(BadInputError, match="30 images but 29 labels"):
        read_mnist(tmp_path)
    path.unlink()
    with pytest.raises(BadInputError, match="no train-labels"):
        read_mnist(tmp_path)


def _cifar_batch(count: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    labels = np.arange(count, dtype=np.uint8) % 10
    pixels = RANDOM.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    records = np.concatenate([labels[:, None], pixels.reshape(count, -1)], axis=1)
    return records.tobytes(), labels, pixels


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar_binaries(tmp_path: Path, inner: str) -> None:
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    first, labels, pixels = _cifar_batch(12)
    second, _, _ = _cifar_batch(5)
    (folder / "data_batch_1.bin").write_bytes(first)
    (folder / "data_batch_2.bin").write_bytes(second)
    (folder / "test_batch.bin").write_bytes(second)
    train, test = read_cifar10(tmp_path)
    assert (len(train), len(test)) == (17, 5)
    assert np.array_equal(train.pixels[:12], pixels)
    assert np.array_equal(train.labels[:12], labels)
    (folder / "data_batch_2.bin").write_bytes(second[:-1])
    with pytest.raises(BadInputError, match="truncated"):
        read_cifar10(tmp_path)
    (folder / "data_batch_2.bin").write_bytes(b"\x0a" + second[1:])
    with pytest.raises(BadInputError, match="label 10 is out of range"):
        read_cifar10(tmp_path)


def _png(pixels: np.ndarray) -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_cifar_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pixels = RANDOM.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)

    def write(name: str, column: str, encoded: list[bytes]) -> None:
        table = arrow.table(
            {column: [{"bytes": data, "path": None} for data in encoded], "label": list(range(6))}
        )
        parquet.write_table(table, tmp_path / name)

    encoded = [_png(one) for one in pixels]
    write("train-00000-of-00001.parquet", "img", encoded)
    write("test-00000-of-00001.parquet", "image", encoded)
    train, test = read_cifar10(tmp_path)
    assert np.array_equal(train.pixels, pixels)
    assert np.array_equal(test.labels, np.arange(6))
    write("test-00000-of-00001.parquet", "img", [b"no picture", *encoded[1:]])
    with pytest.raises(BadInputError, match="cannot be decoded"):
        read_cifar10(tmp_path)
    write("test-00000-of-00001.parquet", "img", [_png(pixels[0][:, :16]), *encoded[1:]])
    with pytest.raises(BadInputError, match="32, 32"):
        read_cifar10(tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(BadInputError, match="no readable parquet"):
        read_cifar10(tmp_path)


def test_no_cifar_there(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no CIFAR-10"):
        read_cifar10(tmp_path)


def test_image_folder_with_and_without_parts(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for kind, level in (("cat", 40), ("dog", 200)):
            folder = tmp_path / part / kind
            folder.mkdir(parents=True)
            for index in range(4):
                (folder / f"{index}.png").write_bytes(_png(np.full((3, 20, 30), level, np.uint8)))
            (folder / "notes.txt").write_text("not a picture")
    train, test = read_image_folder(tmp_path, side=16)
    assert train.classes == ("cat", "dog")
    assert train.pixels.shape == (8, 3, 16, 16)
    assert np.array_equal(train.pixels.mean((1, 2, 3)) > 100, train.labels == 1)
    whole, held_out = read_image_folder(tmp_path / "train", side=16)
    assert (len(whole), len(held_out)) == (6, 2)
    (tmp_path / "val" / "fox").mkdir()
    with pytest.raises(BadInputError, match="class fox is not in"):
        read_image_folder(tmp_path, side=16)
    with pytest.raises(BadInputError, match="no folder"):
        read_image_folder(tmp_path / "absent", side=16)
    with pytest.raises(BadInputError, match="no subfolders"):
        read_image_folder(tmp_path / "train" / "cat", side=16)
    assert len(test) == 8


def _disjoint(data: Data) -> bool:
    train, search, acceptance = (_rows(p) for p in (data.train, data.search, data.acceptance))
    return not (train & search or train & acceptance or search & acceptance)


def test_digits_parts_share_no_sample_and_are_enough_for_a_bound() -> None:
    train, search, acceptance = read_digits()
    assert (len(train), len(search), len(acceptance)) == (897, 180, 720)
    assert train.pixels.shape == (897, 1, 8, 8)
    data = resolve("digits-resnet").data
    assert data is not None
    parts = data()
    assert parts.acceptance.inputs[0].shape == (720, 1, 32, 32)
    assert _disjoint(parts)
    assert abs(float(parts.train.inputs[0].mean())) < 0.05
    every = torch.cat(
        [p.labels for p in (parts.train, parts.search, parts.acceptance) if p.labels is not None]
    )
    assert torch.bincount(every).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    again = data()
    assert torch.equal(parts.acceptance.inputs[0], again.acceptance.inputs[0])


def test_split_keeps_the_test_set_apart_and_scales() -> None:
    pixels = RANDOM.integers(0, 256, (50, 3, 4, 4), dtype=np.uint8)
    labels = np.arange(50, dtype=np.int64) % 10
    classes = tuple("abcdefghij")
    train = LabelledImages(pixels=pixels[:30], labels=labels[:30], classes=classes)
    test = LabelledImages(pixels=pixels[30:], labels=labels[30:], classes=classes)
    data = split(train, test, scaling=Scaling(mean=(0.5,), std=(0.5,)))
    assert (len(data.train), len(data.search), len(data.acceptance)) == (30, 4, 16)
    assert _disjoint(data)
    expected = pixels[:30].astype(np.float32) / 255 * 2 - 1
    assert np.allclose(data.train.inputs[0].numpy(), expected, atol=1e-6)
    per_channel = Scaling(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)).apply(train).inputs[0]
    assert np.allclose(per_channel[:, 2].numpy(), (pixels[:30, 2] / 255 - 0.3) / 4, atol=1e-6)
    with pytest.raises(BadInputError, match="too few"):
        split(train, test.take(np.arange(1)), scaling=Scaling())


def test_real_mnist_and_cifar(data_root: Path) -> None:
    train, test = read_mnist(data_root / "mnist")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert np.bincount(test.labels)[:3].tolist() == [980, 1135, 1032]
    workload = resolve("cifar10-lenet", data=data_root)
    assert workload.data is not None
    tables = sorted((data_root / "cifar10").glob("test-*.parquet"))
    from suanli.workloads.datasets.cifar import _from_tables

    images = _from_tables(tables)
    assert images.pixels.shape == (10_000, 3, 32, 32)
    assert np.bincount(images.labels).tolist() == [1000] * 10


def test_data_for_an_imported_classifier(tmp_path: Path) -> None:
    _mnist(tmp_path)
    source = tmp_path / "net.py"
    source.write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), torch.ones(1, 1, 28, 28)\n"
        "def words():\n    return nn.Linear(3, 2), torch.ones(1, 3)\n"
    )
    workload = resolve(f"{source}:net", data=tmp_path)
    assert workload.data is not None
    assert workload.metric == "accuracy"
    assert "data=" in workload.ref
    assert workload.data().train.inputs[0].shape == (30, 1, 28, 28)
    with pytest.raises(BadInputError, match="does not take one picture"):
        resolve(f"{source}:words", data=tmp_path)
