"""Memory by kind: followed allocations, the replayed allocator, layouts, any batch."""

import pytest
import torch
from torch import nn

from suanli.base.errors import BadInputError, CaptureError
from suanli.base.memory import Block, Footprint
from suanli.base.prediction import ParallelLayout
from suanli.cost.allocator import CachingAllocator, held_beyond_use
from suanli.cost.batches import footprint_at, work_at
from suanli.cost.memory import Held, memory_use, usable_bytes
from suanli.cost.model_shape import ModelShape, model_shape
from suanli.devices import find_sheet
from suanli.measure.capture import capture
from suanli.measure.footprint import footprint
from suanli.predicting.subject import subject
from suanli.workloads.resolve import resolve

MIB = 2**20
NOTHING_REPEATS = ModelShape(
    prefix=None,
    layers=1,
    heads=0,
    kv_heads=0,
    shared=frozenset(),
    boundary_bytes=0,
    kv_bytes_per_token=0,
)


class Attention(nn.Module):
    """Grouped queries: eight heads, two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(64, 64), nn.Linear(64, 64)
        self.k, self.v = nn.Linear(64, 16), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 8, 8).transpose(1, 2)
        k, v = (f(x).view(b, t, 2, 8).transpose(1, 2) for f in (self.k, self.v))
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).reshape(b, t, 64))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Tower(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(64, 1000)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def ids(batch: int) -> tuple[torch.Tensor]:
    return (torch.zeros(batch, 32, dtype=torch.int64),)


def tower(batch: int = 2, **settings) -> Footprint:
    return footprint(Tower(), ids(batch), batch=batch, **settings)


def shape() -> ModelShape:
    return model_shape(capture(Tower(), ids(2), batch=2))


def use(print_: Footprint, held: Held | None = None, **settings):
    return memory_use(print_, shape(), held or Held(), **settings)


# -- allocations ----------------------------------------------------------------------------------


def test_a_chain_needs_two_neighbours_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    found = memory_use(
        footprint(model, (torch.zeros(1024, 256),), batch=1024), NOTHING_REPEATS, Held()
    )
    assert found.weights_bytes == 4 * 256 * 256 * 4
    # the caller holds the input; besides, one layer's input and output are there at once
    assert found.activations_bytes == 3 * MIB
    assert found.total_bytes == found.weights_bytes + found.activations_bytes


def test_training_keeps_what_the_backward_pass_needs() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    print_ = footprint(model, (torch.zeros(1024, 256),), batch=1024, training=True)
    saved = sum(block.size_bytes for block in print_.blocks if block.saved)
    # three inputs of layers and the output, which the caller holds; the input was there before
    assert 4 * MIB <= saved <= 5 * MIB + 16
    gradients = [b for b in print_.blocks if b.kind == "gradients"]
    assert sum(b.size_bytes for b in gradients) == 4 * 256 * 256 * 4
    assert all(b.dies is None for b in gradients)


def test_views_and_updates_in_place_cost_nothing() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(-1).unsqueeze(0).expand(4, -1).transpose(0, 1)

    found = memory_use(footprint(Model(), (torch.zeros(MIB),), batch=1), NOTHING_REPEATS, Held())
    assert found.activations_bytes == 4 * MIB


@pytest.mark.parametrize("training", [False, True])
def test_what_the_profiler_sees_is_within_a_tenth(training: bool) -> None:
    from torch.profiler import ProfilerActivity, profile

    model = Tower().train(training)
    predicted = use(tower(8, training=training, cpu=True)).total_bytes
    x = ids(8)[0]

    def step() -> None:
        with torch.set_grad_enabled(training):
            out = model(x)
            if training:
                out.sum().backward()

    step()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    now = most = 0
    events = run.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, now)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert predicted == pytest.approx(most + weights + x.nbytes, rel=0.1)


def test_narrow_inference_halves_everything_and_narrow_training_keeps_weights() -> None:
    whole, half = use(tower()), use(tower(precision="bf16"))
    assert half.weights_bytes == whole.weights_bytes / 2
    assert half.activations_bytes < 0.6 * whole.activations_bytes
    trained = use(tower(16, training=True)), use(tower(16, training=True, precision="bf16"))
    assert trained[1].weights_bytes == trained[0].weights_bytes
    assert trained[1].activations_bytes < trained[0].activations_bytes


def test_fused_attention_keeps_no_matrix_of_pairs() -> None:
    long = (torch.zeros(1, 2048, dtype=torch.int64),)
    pairs = 8 * 2048 * 2048 * 4
    found = use(footprint(Tower(), long, batch=1, training=True))
    assert found.activations_bytes < pairs


def test_data_dependence_is_one_line() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0]

    with pytest.raises(CaptureError, match="values"):
        footprint(Model(), (torch.zeros(4),), batch=4)


# -- any batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_two_small_captures_give_a_large_one(training: bool) -> None:
    low, high = tower(2, training=training), tower(3, training=training)
    assert footprint_at(low, high, 7) == tower(7, training=training)
    captures = [capture(Tower(), ids(b), batch=b, training=training) for b in (2, 3, 7)]
    assert work_at(captures[0], captures[1], 7) == captures[2]


def test_a_model_that_grows_unevenly_is_refused() -> None:
    class Uneven(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for row in x:
                x = x + row
            return x

    low, high = (capture(Uneven(), (torch.zeros(b, 4),), batch=b) for b in (2, 3))
    with pytest.raises(BadInputError, match="evenly"):
        work_at(low, high, 8)


# -- the allocator --------------------------------------------------------------------------------


def test_segments_are_those_of_torch() -> None:
    pool = CachingAllocator()
    pool.allocate(0, 100)
    assert pool.reserved == 2 * MIB
    pool.allocate(1, 3 * MIB)
    assert pool.reserved == 22 * MIB
    pool.allocate(2, 18 * MIB + 1)
    assert pool.reserved == 42 * MIB
    assert pool.in_use == 21 * MIB + 101


def test_a_freed_block_is_used_again_and_neighbours_join() -> None:
    pool = CachingAllocator()
    for name in range(4):
        pool.allocate(name, 4 * MIB)
    held = pool.reserved
    for name in (0, 1, 2):
        pool.release(name)
    pool.allocate(9, 12 * MIB)
    assert pool.reserved == held


def test_what_is_held_beyond_use() -> None:
    assert held_beyond_use([(0, 12 * MIB), (0, -1), (1, 12 * MIB)]) == 0
    # the hole that is left is too small for what comes next
    assert held_beyond_use([(0, 12 * MIB), (0, -1), (1, 14 * MIB)]) == 12 * MIB


# -- kinds, layouts -------------------------------------------------------------------------------


def test_heads_and_layers_are_found() -> None:
    found = shape()
    assert (found.prefix, found.layers, found.heads, found.kv_heads) == ("layers", 4, 8, 2)
    assert found.shared == {"attention", "mlp"}
    assert found.kv_bytes_per_token == 4 * 2 * (2 * 8) * 2
    assert found.split_by_tensor("layers.3.mlp.0") and not found.split_by_tensor("layers.3")
    assert not found.split_by_tensor("head") and found.within("layers.2") == ""


def test_states_and_the_copies_of_an_update() -> None:
    print_ = tower(2, training=True)
    plain, adam = use(print_), use(print_, Held(states=2, update_copies=1.0))
    assert adam.optimizer_bytes == 2 * adam.gradients_bytes
    assert adam.total_bytes == pytest.approx(
        plain.weights_bytes * 5, rel=0.02
    )  # weights, gradients, two states, one copy; activations have gone by then


def test_a_gpu_adds_context_workspace_and_fragmentation() -> None:
    here, there = use(tower()), use(tower(), gpu=find_sheet("h100-sxm5-80gb"))
    assert there.context_bytes > 0 and there.workspace_bytes == 32 * MIB
    assert there.fragmentation_bytes > 0
    assert there.activations_bytes == here.activations_bytes
    assert here.context_bytes == here.workspace_bytes == here.fragmentation_bytes == 0


def test_error_correction_takes_a_sixteenth_of_gddr() -> None:
    assert usable_bytes(find_sheet("t4")) == 15 * 2**30
    assert usable_bytes(find_sheet("rtx-4090")) == 24 * 2**30
    assert usable_bytes(find_sheet("rtx-a6000")) == 48 * 2**30  # correction is off as delivered
    assert usable_bytes(find_sheet("a10")) == 22.5 * 2**30
    assert usable_bytes(find_sheet("a100-sxm4-80gb")) == 80 * 2**30


def test_layouts_split_what_they_should() -> None:
    held = Held(states=2, boundary_bytes=2 * 32 * 64 * 4)
    print_ = tower(2, training=True)
    alone = use(print_, held)
    tensor = use(print_, held, layout=ParallelLayout(tp=2))
    assert tensor.weights_bytes == pytest.approx(alone.weights_bytes / 2, rel=0.01)
    assert tensor.activations_bytes < alone.activations_bytes
    sharded = use(print_, held, layout=ParallelLayout(dp=4, sharded=True))
    assert sharded.optimizer_bytes == pytest.approx(alone.optimizer_bytes / 4, rel=0.01)
    assert sharded.workspace_bytes > 0
    replicas = use(print_, held, layout=ParallelLayout(dp=4))
    assert replicas.weights_bytes == alone.weights_bytes
    again = use(print_, held, layout=ParallelLayout(micro_batches=2, recompute=True))
    assert again.activations_bytes < alone.activations_bytes


def test_a_pipeline_keeps_micro_batches_in_flight() -> None:
    print_ = tower(2, training=True)
    few = use(print_, layout=ParallelLayout(pp=2, micro_batches=1))
    many = use(print_, layout=ParallelLayout(pp=2, micro_batches=8))
    assert many.activations_bytes > few.activations_bytes
    assert few.weights_bytes < use(print_).weights_bytes


def test_the_fullest_moment_is_the_sum_by_kind() -> None:
    blocks = (
        Block(kind="weights", size_bytes=10, born=0, dies=None),
        Block(kind="activations", size_bytes=100, born=1, dies=2),
        Block(kind="activations", size_bytes=50, born=2, dies=3),
        Block(kind="activations", size_bytes=120, born=3, dies=None),
    )
    found = memory_use(
        Footprint(batch=1, training=False, blocks=blocks, calls=3), NOTHING_REPEATS, Held()
    )
    assert (found.activations_bytes, found.total_bytes) == (170, 180)


def test_convolutions_on_the_cpu_copy_into_blocks_of_channels() -> None:
    model, picture = nn.Conv2d(32, 20, 3, padding=1, bias=False), torch.zeros(2, 32, 8, 8)

    def scratch(*inputs: torch.Tensor, cpu: bool = True) -> list[int]:
        blocks = footprint(model, inputs, batch=2, cpu=cpu).blocks
        return [block.size_bytes for block in blocks if block.kind == "workspace"]

    weight, blocked = 32 * 32 * 9 * 4, 2 * 32 * 64 * 4
    assert scratch(picture) == [weight, picture.nbytes, blocked]
    assert scratch(picture, cpu=False) == []
    assert scratch(picture.to(memory_format=torch.channels_last)) == []
    use_ = memory_use(footprint(model, (picture,), batch=2, cpu=True), NOTHING_REPEATS, Held())
    assert use_.workspace_bytes == weight + picture.nbytes + blocked


def test_a_loss_that_wants_a_label_per_position_is_followed() -> None:
    captured = subject(
        resolve("gpt-mini"), training=True, precision="fp32", optimizer="sgd", cpu=True
    )
    assert captured.notes == ()
    assert any("log_softmax" in op.name for op in captured.work(2).operators)
