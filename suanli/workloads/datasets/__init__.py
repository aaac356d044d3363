"""Loaders of labelled data from files a person already has. Nothing is downloaded."""

from suanli.workloads.datasets.cifar import read_cifar10
from suanli.workloads.datasets.digits import read_digits
from suanli.workloads.datasets.folder import (
    PictureFiles,
    PictureFolder,
    find_pictures,
    read_image_folder,
)
from suanli.workloads.datasets.idx import read_idx, read_mnist
from suanli.workloads.datasets.images import LabelledImages, Scaling, split

__all__ = [
    "LabelledImages",
    "PictureFiles",
    "PictureFolder",
    "Scaling",
    "find_pictures",
    "read_cifar10",
    "read_digits",
    "read_idx",
    "read_image_folder",
    "read_mnist",
    "split",
]
