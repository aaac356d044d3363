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

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Builder = Callable[[int], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]


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


class RelativeLayer(nn.Module):
    """Transformer-XL layer: attention over memory with relative positions (Dai et al., 2019)."""

    def __init__(self, wide: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.size = heads, wide // heads
        self.qkv = nn.Linear(wide, 3 * wide, bias=False)
        self.position = nn.Linear(wide, wide, bias=False)
        self.out = nn.Linear(wide, wide, bias=False)
        self.norm, self.norm2 = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.ff = nn.Sequential(
            nn.Linear(wide, inner), nn.ReLU(), nn.Dropout(), nn.Linear(inner, wide), nn.Dropout()
        )

    def forward(self, x: torch.Tensor, memory: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        b, t, wide = x.shape
        q, k, v = self.qkv(torch.cat([memory, x], 1)).chunk(3, -1)
        length = k.shape[1]
        q = q[:, -t:].reshape(b, t, self.heads, self.size).transpose(1, 2)
        k = k.reshape(b, length, self.heads, self.size).transpose(1, 2)
        v = v.reshape(b, length, self.heads, self.size).transpose(1, 2)
        r = self.position(pos).reshape(length, self.heads, self.size).permute(1, 2, 0)
        content = (q + 1) @ k.transpose(2, 3)
        relative = ((q + 1) @ r).roll(1, -1).contiguous()
        scores = functional.dropout((content + relative).mul(0.1).softmax(-1))
        y = (scores @ v).transpose(1, 2).reshape(b, t, wide)
        x = self.norm(x + functional.dropout(self.out(y)))
        return self.norm2(x + self.ff(x))


class TransformerXl(nn.Module):
    """Transformer-XL with an adaptive softmax of 267,735 words (WikiText-103).

    The shares of tokens that fall into the rarer classes are assumed.
    """

    _TAILS = ((20000, 0.04), (160000, 0.05), (67735, 0.01))  # words, share of the tokens

    def __init__(self, layers: int, wide: int, heads: int, inner: int, memory: int) -> None:
        super().__init__()
        self.memory, self.wide = memory, wide
        self.embed = nn.Embedding(267735, wide)
        self.layers = nn.ModuleList(RelativeLayer(wide, heads, inner) for _ in range(layers))
        self.head = nn.Linear(wide, 20003)
        self.tails = nn.ModuleList(nn.Linear(wide, words) for words, _ in self._TAILS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        b, t, wide = x.shape
        pos = torch.zeros(t + self.memory, wide)
        for layer in self.layers:
            x = layer(x, x.new_zeros(b, self.memory, wide), pos)
        loss = self.head(x).log_softmax(-1).mean()
        for tail, (_, share) in zip(self.tails, self._TAILS, strict=True):
            few = x.reshape(-1, wide)[: int(b * t * share)]
            loss = loss + tail(few).log_softmax(-1).mean()
        return loss


class Gnmt(nn.Module):
    """GNMT v2: four layers of 1024, the first of the encoder in both directions."""

    def __init__(self, words: int = 32320, wide: int = 1024) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(words, wide), nn.Embedding(words, wide)
        self.both = nn.LSTM(wide, wide, bidirectional=True, batch_first=True)
        self.encoder = nn.LSTM(2 * wide, wide, 3, batch_first=True)
        self.first = nn.LSTM(wide, wide, batch_first=True)
        self.query, self.key = nn.Linear(wide, wide), nn.Linear(wide, wide)
        self.decoder = nn.LSTM(2 * wide, wide, 3, batch_first=True)
        self.words = nn.Linear(wide, words)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        states, _ = self.encoder(self.both(self.source(source))[0])
        y, _ = self.first(self.target(target))
        scores = torch.tanh(self.query(y)[:, :, None] + self.key(states)[:, None]).sum(-1)
        context = scores.softmax(-1) @ states
        y, _ = self.decoder(torch.cat([y, context], -1))
        return self.words(y).log_softmax(-1).mean()


class MaskedBert(nn.Module):
    """BERT that guesses the words at its masked places only, and whether sentences follow."""

    def __init__(self, inner: nn.Module, masked: int, wide: int = 1024, words: int = 30528) -> None:
        super().__init__()
        self.inner, self.masked = inner, masked
        self.change = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.LayerNorm(wide))
        self.words, self.follows = nn.Linear(wide, words), nn.Linear(wide, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.inner(input_ids=ids)
        few = self.change(out.last_hidden_state[:, : self.masked].flatten(0, 1))
        follows = self.follows(out.pooler_output).log_softmax(-1).mean()
        return self.words(few).log_softmax(-1).mean() + follows


class Tacotron2(nn.Module):
    """Tacotron 2 as NVIDIA trains it: text and frames in, every frame a step of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(148, 512)
        self.convs = nn.Sequential(*(self._layer(512, 512, nn.ReLU()) for _ in range(3)))
        self.encoder = nn.LSTM(512, 256, bidirectional=True, batch_first=True)
        self.prenet = nn.Sequential(
            nn.Linear(80, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 256), nn.ReLU(),
            nn.Dropout(),
        )  # fmt: skip
        self.attention, self.decoder = nn.LSTMCell(768, 1024), nn.LSTMCell(1536, 1024)
        self.query, self.memory = nn.Linear(1024, 128), nn.Linear(512, 128)
        self.places = nn.Conv1d(2, 32, 31, padding=15)
        self.place, self.energy = nn.Linear(32, 128), nn.Linear(128, 1)
        self.frame, self.stop = nn.Linear(1536, 80), nn.Linear(1536, 1)
        sizes = itertools.pairwise((80, 512, 512, 512, 512, 80))
        self.postnet = nn.Sequential(*(self._layer(a, b, nn.Tanh()) for a, b in sizes))

    @staticmethod
    def _layer(wide: int, out: int, bend: nn.Module) -> nn.Sequential:
        conv = nn.Conv1d(wide, out, 5, padding=2)
        return nn.Sequential(conv, nn.BatchNorm1d(out), bend, nn.Dropout())

    def forward(self, ids: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        x = self.convs(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        memory, _ = self.encoder(x)  # [B, T, 512]
        keys = self.memory(memory)
        b, t, _ = memory.shape
        h, c, hidden, cell = (memory.new_zeros(b, 1024) for _ in range(4))
        context, weights, total = memory.new_zeros(b, 512), *memory.new_zeros(2, b, t).unbind()
        made, stops = [], []
        for frame in self.prenet(frames).unbind(1):
            h, c = self.attention(torch.cat((frame, context), -1), (h, c))
            h = functional.dropout(h, 0.1)
            both = self.places(torch.stack((weights, total), 1)).transpose(1, 2)
            scores = torch.tanh(self.query(h).unsqueeze(1) + self.place(both) + keys)
            weights = self.energy(scores).squeeze(-1).softmax(1)
            context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
            total = total + weights
            hidden, cell = self.decoder(torch.cat((h, context), -1), (hidden, cell))
            hidden = functional.dropout(hidden, 0.1)
            last = torch.cat((hidden, context), 1)
            made.append(self.frame(last))
            stops.append(self.stop(last))
        out = torch.stack(made, 2)
        after = out + self.postnet(out)
        return out.square().mean() + after.square().mean() + torch.cat(stops, 1).sigmoid().mean()


class Ncf(nn.Module):
    """NeuMF with 64 factors and layers 256, 256, 128, 64 (He et al., 2017; MovieLens-20M)."""

    def __init__(self, users: int = 138493, items: int = 26744, factors: int = 64) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.Embedding(n, d)
            for n, d in ((users, factors), (items, factors), (users, 128), (items, 128))
        )
        layers: list[nn.Module] = []
        for wide, out in ((256, 256), (256, 128), (128, 64)):
            layers += [nn.Linear(wide, out), nn.ReLU(), nn.Dropout()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(factors + 64, 1)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        a, b = (
            self.tables[0](user) * self.tables[1](item),
            self.layers(torch.cat([self.tables[2](user), self.tables[3](item)], -1)),
        )
        return self.out(torch.cat([a, b], -1)).sigmoid().log().mean()


class Jasper(nn.Module):
    """Jasper 10x5: one-dimensional convolutions with dense residual sums (Li et al., 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self._layer(64, 256, 11, stride=2)
        sizes = [(256, 11), (256, 11), (384, 13), (384, 13), (512, 17), (512, 17), (640, 21),
                 (640, 21), (768, 25), (768, 25)]  # fmt: skip
        self.blocks, self.shorts, wides = nn.ModuleList(), nn.ModuleList(), [256]
        for out, taps in sizes:
            parts = [self._layer(wides[-1] if i == 0 else out, out, taps) for i in range(5)]
            self.blocks.append(nn.Sequential(*parts))
            self.shorts.append(
                nn.ModuleList(
                    nn.Sequential(nn.Conv1d(w, out, 1), nn.BatchNorm1d(out)) for w in wides
                )
            )
            wides.append(out)
        self.tail = nn.Sequential(
            self._layer(768, 896, 29, step=2), self._layer(896, 1024, 1), nn.Conv1d(1024, 29, 1)
        )

    @staticmethod
    def _layer(wide: int, out: int, taps: int, stride: int = 1, step: int = 1) -> nn.Sequential:
        pad = taps // 2 * step
        conv = nn.Conv1d(wide, out, taps, stride, pad, dilation=step, bias=False)
        return nn.Sequential(conv, nn.BatchNorm1d(out), nn.ReLU(), nn.Dropout())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        seen = [x]
        for block, shorts in zip(self.blocks, self.shorts, strict=True):
            y = block(x)
            for short, old in zip(shorts, seen, strict=True):  # type: ignore[arg-type]
                y = y + short(old)
            x = y
            seen.append(x)
        return self.tail(x).log_softmax(1).mean()


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


class Seq2Seq(nn.Module):
    """Transformer "big": six and six layers of 1024, 16 heads, 4096 inside."""

    def __init__(self, words: int = 33712, wide: int = 1024) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, wide)
        self.body = nn.Transformer(wide, 16, 6, 6, 4096, batch_first=True)
        self.words = nn.Linear(wide, words)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        y = self.body(self.embed(source), self.embed(target))
        return self.words(y).log_softmax(-1).mean()


class ShuffleUnit(nn.Module):
    """ShuffleNet v2 unit (Ma et al., 2018)."""

    def __init__(self, wide: int, out: int, stride: int) -> None:
        super().__init__()
        half, self.stride = out // 2, stride
        ins = wide if stride == 2 else half
        self.right = nn.Sequential(
            nn.Conv2d(ins, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False), nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
        )  # fmt: skip
        self.left = (
            nn.Sequential(
                nn.Conv2d(wide, wide, 3, 2, 1, groups=wide, bias=False), nn.BatchNorm2d(wide),
                nn.Conv2d(wide, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
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
    """ShuffleNet v2 1x for images of 32 x 32 (CIFAR-100): no stride in the stem."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, 1, 1), nn.BatchNorm2d(24), nn.ReLU()]
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


class DeepSpeech(nn.Module):
    """Deep Speech 2: two convolutions, five bidirectional GRUs of 512 in time (batch second)."""

    def __init__(self, hidden: int = 512, layers: int = 5) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(1, 32, (41, 11), (2, 2), (20, 5)), nn.BatchNorm2d(32), nn.Hardtanh(),
            nn.Conv2d(32, 32, (21, 11), (2, 1), (10, 5)), nn.BatchNorm2d(32), nn.Hardtanh(),
        )  # fmt: skip
        self.rnns = nn.ModuleList(
            nn.LSTM(32 * 41 if i == 0 else hidden * 2, hidden, bidirectional=True, batch_first=True)
            for i in range(layers)
        )
        self.out = nn.Linear(hidden * 2, 29)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.convs(x)
        b, c, f, t = y.shape
        y = y.permute(0, 3, 1, 2).reshape(b, t, c * f)
        for rnn in self.rnns:
            y, _ = rnn(y)
        return self.out(y).log_softmax(-1).mean()


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
