"""Models of the published measurements, as small modules and `transformers` configs.

Only shapes matter: they are captured on fake tensors. Sizes are those of the papers and of the
repositories that published the measurements.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """ResNet v1.5 and ResNeXt block, with squeeze and excitation where `squeeze` is set."""

    def __init__(
        self, wide: int, inner: int, out: int, stride: int, groups: int, squeeze: bool
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(wide, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False),
            nn.BatchNorm2d(inner), nn.ReLU(inplace=True),
            nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.squeeze = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(out, out // 16, 1), nn.ReLU(),
                nn.Conv2d(out // 16, out, 1), nn.Sigmoid(),
            )
            if squeeze
            else None
        )  # fmt: skip
        same = stride == 1 and wide == out
        self.short = (
            None
            if same
            else nn.Sequential(nn.Conv2d(wide, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if self.squeeze is not None:
            y = y * self.squeeze(y)
        return functional.relu(y + (x if self.short is None else self.short(x)))


class Residual(nn.Module):
    """ResNet-50 and its kin."""

    def __init__(
        self, depths: tuple[int, ...], *, groups: int = 1, width: int = 64, squeeze: bool = False
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        stages, wide = [], 64
        for stage, depth in enumerate(depths):
            inner, out = width * 2**stage, 256 * 2**stage
            for block in range(depth):
                stride = 2 if block == 0 and stage > 0 else 1
                stages.append(Bottleneck(wide, inner, out, stride, groups, squeeze))
                wide = out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(wide, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class Inverted(nn.Module):
    """EfficientNet's block: widen, one channel at a time, squeeze, narrow."""

    def __init__(self, wide: int, out: int, widen: int, taps: int, stride: int) -> None:
        super().__init__()
        inner = wide * widen
        first: list[nn.Module] = []
        if widen > 1:
            first = [nn.Conv2d(wide, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.SiLU()]
        self.first = nn.Sequential(
            *first,
            nn.Conv2d(inner, inner, taps, stride, taps // 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner), nn.SiLU(),
        )  # fmt: skip
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, max(1, wide // 4), 1), nn.SiLU(),
            nn.Conv2d(max(1, wide // 4), inner, 1), nn.Sigmoid(),
        )  # fmt: skip
        self.last = nn.Sequential(nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out))
        self.same = stride == 1 and wide == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = self.last(y * self.squeeze(y))
        return x + y if self.same else y


class EfficientNet(nn.Module):
    """EfficientNet (Tan and Le, 2019) by its two coefficients."""

    def __init__(self, width: float, depth: float) -> None:
        super().__init__()

        def wide(n: int) -> int:
            rounded = max(8, int(n * width + 4) // 8 * 8)
            return rounded + 8 if rounded < 0.9 * n * width else rounded

        stages = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
                  (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))  # fmt: skip
        now = wide(32)
        layers: list[nn.Module] = [
            nn.Conv2d(3, now, 3, 2, 1, bias=False),
            nn.BatchNorm2d(now),
            nn.SiLU(),
        ]
        for widen, out, count, stride, taps in stages:
            for i in range(-(-int(count * depth * 1000) // 1000)):
                layers.append(Inverted(now, wide(out), widen, taps, stride if i == 0 else 1))
                now = wide(out)
        top = wide(1280)
        layers += [nn.Conv2d(now, top, 1, bias=False), nn.BatchNorm2d(top), nn.SiLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(top, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Ssd(nn.Module):
    """SSD300 with ResNet-50 cut after its third stage, which keeps 38 x 38 (NVIDIA's v1.1)."""

    def __init__(self) -> None:
        super().__init__()
        trunk = Residual((3, 4, 6))
        blocks = list(trunk.stages)
        first = blocks[7]
        assert isinstance(first, Bottleneck)
        first.body[3] = nn.Conv2d(256, 256, 3, 1, 1, bias=False)
        first.short[0] = nn.Conv2d(512, 1024, 1, 1, bias=False)  # type: ignore[index]
        self.trunk = nn.Sequential(trunk.stem, *blocks)
        sizes = [
            (1024, 256, 512),
            (512, 256, 512),
            (512, 128, 256),
            (256, 128, 256),
            (256, 128, 256),
        ]
        self.more = nn.ModuleList()
        for i, (wide, inner, out) in enumerate(sizes):
            self.more.append(
                nn.Sequential(
                    nn.Conv2d(wide, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
                    nn.Conv2d(inner, out, 3, 2 if i < 3 else 1, 1 if i < 3 else 0, bias=False),
                    nn.BatchNorm2d(out), nn.ReLU(),
                )
            )  # fmt: skip
        outs, boxes = (1024, 512, 512, 256, 256, 256), (4, 6, 6, 6, 4, 4)
        self.heads = nn.ModuleList(
            nn.Conv2d(o, b * 85, 3, padding=1) for o, b in zip(outs, boxes, strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(x)
        maps = [x]
        for layer in self.more:
            x = layer(x)
            maps.append(x)
        out = [h(m).flatten(1) for h, m in zip(self.heads, maps, strict=True)]
        return torch.cat(out, 1)


class Unet(nn.Module):
    """nnU-Net as NVIDIA trains it: two or three dimensions, instance norm, leaky ReLU."""

    def __init__(self, dims: int, filters: tuple[int, ...], classes: int = 4, ins: int = 5) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        norm = nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d
        up = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d

        def twice(a: int, b: int, stride: int = 1) -> nn.Sequential:
            first = [conv(a, b, 3, stride, 1, bias=False), norm(b, affine=True), nn.LeakyReLU()]
            return nn.Sequential(
                *first, conv(b, b, 3, 1, 1, bias=False), norm(b, affine=True), nn.LeakyReLU()
            )

        pairs = list(itertools.pairwise(filters))
        self.first = twice(ins, filters[0])
        self.down = nn.ModuleList(twice(a, b, 2) for a, b in pairs)
        self.up = nn.ModuleList(up(b, a, 2, 2) for a, b in reversed(pairs))
        self.join = nn.ModuleList(twice(2 * a, a) for a, _ in reversed(pairs))
        self.out = conv(filters[0], classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        kept = [x]
        for layer in self.down:
            x = layer(x)
            kept.append(x)
        kept.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), kept.pop()], 1))
        return self.out(x).log_softmax(1).mean()


class ShuffleUnit(nn.Module):
    """ShuffleNet v2 unit (Ma et al., 2018); its convolutions have biases, as Zeus's model does."""

    def __init__(self, wide: int, out: int, stride: int) -> None:
        super().__init__()
        half, self.stride = out // 2, stride
        ins = wide if stride == 2 else half
        self.right = nn.Sequential(
            nn.Conv2d(ins, ins, 1), nn.BatchNorm2d(ins), nn.ReLU(),
            nn.Conv2d(ins, ins, 3, stride, 1, groups=ins), nn.BatchNorm2d(ins),
            nn.Conv2d(ins, half, 1), nn.BatchNorm2d(half), nn.ReLU(),
        )  # fmt: skip
        self.left = (
            nn.Sequential(
                nn.Conv2d(wide, wide, 3, 2, 1, groups=wide), nn.BatchNorm2d(wide),
                nn.Conv2d(wide, half, 1), nn.BatchNorm2d(half), nn.ReLU(),
            )
            if stride == 2
            else None
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = (x, x) if self.left is not None else x.chunk(2, 1)
        if self.left is not None:
            left = self.left(left)
        y = torch.cat([left, self.right(right)], 1)
        b, c, h, w = y.shape
        return y.reshape(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffleNet(nn.Module):
    """ShuffleNet v2 1x for images of 32 x 32 (CIFAR-100): no stride and no bend in the stem."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, 1, 1), nn.BatchNorm2d(24)]
        wide = 24
        for out, depth in ((116, 4), (232, 8), (464, 4)):
            layers += [
                ShuffleUnit(wide if i == 0 else out, out, 2 if i == 0 else 1) for i in range(depth)
            ]
            wide = out
        layers += [nn.Conv2d(464, 1024, 1), nn.BatchNorm2d(1024), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(1024, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def hub(kind: str, head: str, **settings: Any) -> Callable[[], nn.Module]:
    """A `transformers` model of this config class and model class, without weights."""
    attention = settings.pop("attention", None)

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, kind)(**settings)
        with torch.device("meta"):
            build_it = getattr(transformers, head)._from_config
            chosen = {"attn_implementation": attention} if attention else {}
            model: nn.Module = build_it(config, **chosen)
        return model

    return build
