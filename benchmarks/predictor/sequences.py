"""Models of sequences among the published measurements: text, speech, and pairs of numbers.

Only shapes matter: they are captured on fake tensors. Sizes are those of the papers and of the
repositories that published the measurements.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional


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
