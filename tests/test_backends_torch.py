"""The torch backends against eager fp32, on the CPU."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from suanli.base.errors import ArtefactError, BadInputError, MissingBackendError, SuanliError
from suanli.base.plan import BackendSpec, Plan, Quantization
from suanli.engines.backends import _torch as shared
from suanli.engines.backends import backends, status
from suanli.engines.backends._graph import constant_outputs, convolves, flat_module
from suanli.engines.backends._precision import operator_name
from suanli.engines.backends.torchao import linear_layers
from suanli.engines.program import Program, capture
from suanli.workloads.record import Inputs
from tests import backend_models as models

FP32, BF16 = 1e-5, 2e-2
PROGRAMS = ("conv", "bert", "gpt2", "resnet", "mlp")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Program]:
    root = tmp_path_factory.mktemp("programs")
    return {name: getattr(models, f"{name}_program")(root / name) for name in PROGRAMS}


@pytest.fixture(scope="session", autouse=True)
def _inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    import os

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


def test_table_names_and_specs() -> None:
    table = backends()
    assert set(table) >= {"eager", "inductor", "aotinductor", "torchao"}
    for name, backend in table.items():
        assert backend.spec.name == name
        assert backend.spec.install
        for plan in backend.spec.baselines:
            assert plan.backend == name
            kind = plan.device.partition(":")[0]
            assert plan.precision in backend.spec.precisions[kind]


def test_rows_load_no_heavy_package() -> None:
    code = (
        "import sys; from suanli.engines.backends import backends, status;"
        "rows = backends(); [status(row) for row in rows.values()];"
        "heavy = {'openvino', 'nncf', 'onnxruntime', 'torchao', 'tensorrt'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


class Planted:
    spec = BackendSpec(name="planted", install="pip install planted", packages=("planted_package",))


PLANTED = Planted()
NO_BACKEND = object()


def test_extra_row_and_its_status() -> None:
    row = backends((f"{__name__}:PLANTED",))["planted"]
    found = status(row)
    assert (found.present, found.install) == (False, "pip install planted")
    assert "planted_package" in found.reason
    assert status(backends()["eager"]).version == torch.__version__


@pytest.mark.parametrize("where", ["no.such:ROW", f"{__name__}:ABSENT", f"{__name__}:NO_BACKEND"])
def test_bad_extra_row_is_said(where: str) -> None:
    with pytest.raises(BadInputError):
        backends((where,))


def test_extra_row_may_not_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BackendSpec(name="eager", install="x", packages=())
    monkeypatch.setattr(PLANTED, "spec", spec, raising=False)
    with pytest.raises(BadInputError, match="replace"):
        backends((f"{__name__}:PLANTED",))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    ("precision", "layout", "options"),
    [
        ("fp32", "contiguous", {}),
        ("fp32", "channels_last", {}),
        ("fp32", "contiguous", {"source": True}),
        ("bf16", "contiguous", {"source": True}),
        ("bf16", "contiguous", {}),
        ("bf16", "channels_last", {}),
        ("bf16", "contiguous", {"autocast": True}),
    ],
)
def test_eager(
    programs: dict[str, Program],
    name: str,
    precision: str,
    layout: str,
    options: dict[str, bool],
    tmp_path: Path,
) -> None:
    plan = Plan(backend="eager", precision=precision, memory_layout=layout, options=options)
    runner = models.built(backends()["eager"], programs[name], plan, tmp_path)
    models.check_values(runner, programs[name], FP32 if precision == "fp32" else BF16)


def test_eager_source_in_bf16_is_the_users_cast(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    (tmp_path / "user.py").write_text(
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "import torch\n"
        "from tests.backend_models import ConvNet\n"
        "from suanli.workloads.record import Inputs\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return ConvNet().eval(), Inputs(args=(torch.randn(2, 3, 8, 8),))\n"
    )
    torch.manual_seed(0)
    model = models.ConvNet().eval()
    ref = f"{tmp_path / 'user.py'}:net"
    program = capture(
        model,
        Inputs(args=(torch.randn(2, 3, 8, 8),)),
        folder=tmp_path / "p",
        name="net",
        ref=ref,
        max_batch=4,
    )
    plan = Plan(backend="eager", precision="bf16", options={"source": True})
    runner = models.built(backends()["eager"], program, plan, tmp_path / "b")
    flat = program.inputs(2)
    with torch.no_grad():
        wanted = model.bfloat16()(flat[0].bfloat16())
    for got, theirs in zip(runner(flat), wanted.values(), strict=True):
        assert torch.equal(got, theirs.float())


def test_bf16_products_run_in_bf16(programs: dict[str, Program]) -> None:
    for name in PROGRAMS:
        module = flat_module(programs[name], Plan(backend="eager", precision="bf16"))
        seen = _product_dtypes(module, programs[name].inputs(2))
        assert seen
        assert set(seen.values()) == {torch.bfloat16}, name


def _product_dtypes(
    module: torch.fx.GraphModule, flat: list[torch.Tensor]
) -> dict[str, torch.dtype]:
    seen: dict[str, torch.dtype] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if operator_name(n) in ("conv2d", "linear", "addmm", "scaled_dot_product_attention"):
                seen[n.name] = result.dtype
            return result

    with torch.no_grad():
        Watch(module).run(*flat)
    return seen


def test_named_operators_stay_in_fp32(programs: dict[str, Program]) -> None:
    program = programs["bert"]
    plan = Plan(backend="eager", precision="bf16", float_operators=("encoder.layer.1.output",))
    module = flat_module(program, plan)
    seen = _product_dtypes(module, program.inputs(2))
    assert list(seen.values()).count(torch.float32) == 1
    plan = plan.with_(float_operators=("linear", "scaled_dot_product_attention"))
    module = flat_module(program, plan)
    assert set(_product_dtypes(module, program.inputs(2)).values()) == {torch.float32}
    flat = program.inputs(3)
    with torch.no_grad():
        assert models.relative_error(module(*flat), models.reference(program, flat)) < BF16


def test_batch_norm_is_folded_before_rounding(programs: dict[str, Program]) -> None:
    module = flat_module(programs["conv"], Plan(backend="eager", precision="bf16"))
    names = [operator_name(node) for node in module.graph.nodes]
    assert "batch_norm" not in names
    assert convolves(module)
    assert not convolves(flat_module(programs["mlp"], Plan(backend="eager")))


class Masked(nn.Module):
    """A row that is masked out whole by fp32's lowest number, which bf16 cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        q = self.project(x).unsqueeze(1)
        mask = (1.0 - seen.to(torch.float32)) * torch.finfo(torch.float32).min
        mask = mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def test_masked_rows_give_no_nan(tmp_path: Path) -> None:
    seen = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    inputs = Inputs(args=(torch.randn(2, 4, 8), seen))
    program = models.program(Masked(), inputs, tmp_path / "p")
    plan = Plan(backend="eager", precision="bf16")
    runner = models.built(backends()["eager"], program, plan, tmp_path / "b")
    models.check_values(runner, program, BF16, (2,))


class Normed(nn.Module):
    """Asks for fp32 on purpose, casts back to its input's dtype, and goes on with a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = x + self.scale * wide.to(x.dtype)
        positions = torch.arange(x.shape[1], dtype=torch.float32) * 1001
        return self.second(x + torch.sin(positions))


def test_casts_made_on_purpose_survive(tmp_path: Path) -> None:
    program = models.program(Normed(), Inputs(args=(torch.randn(2, 8),)), tmp_path / "p")
    plan = Plan(backend="eager", precision="bf16")
    runner = models.built(backends()["eager"], program, plan, tmp_path / "b")
    # positions up to 7007 would be off by 16 in bf16, and their sine by anything
    models.check_values(runner, program, BF16)


def test_outputs_are_nobody_elses_memory(tmp_path: Path) -> None:
    program = models.program(models.Aliases(), Inputs(args=(torch.randn(2, 4),)), tmp_path / "p")
    runner = models.built(backends()["eager"], program, Plan(backend="eager"), tmp_path / "b")
    flat = program.inputs(3)
    wanted = [t.clone() for t in models.reference(program, flat)]
    first = runner(flat)
    for tensor in first:
        tensor.fill_(7)
    assert models.relative_error(runner(flat), wanted) < FP32
    assert constant_outputs(flat_module(program, Plan(backend="eager"))) == {1, 4}


def test_threads_and_modes_are_put_back(programs: dict[str, Program], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen: list[tuple[int, bool]] = []
    runner = models.built(
        backends()["eager"], programs["mlp"], Plan(backend="eager", threads=before + 1), tmp_path
    )
    inner = runner._call  # type: ignore[attr-defined]

    def watched(*flat: torch.Tensor) -> object:
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        return inner(*flat)

    runner._call = watched  # type: ignore[attr-defined]
    runner(programs["mlp"].inputs(2))
    assert seen == [(before + 1, True)]
    assert torch.get_num_threads() == before
    assert not torch.is_inference_mode_enabled()
    runner._call = lambda *flat: 1 / 0  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        runner(programs["mlp"].inputs(2))
    assert torch.get_num_threads() == before


def test_sub_batches(programs: dict[str, Program], tmp_path: Path) -> None:
    sizes: list[int] = []
    plan = Plan(backend="eager", sub_batch=2)
    runner = models.built(backends()["eager"], programs["conv"], plan, tmp_path)
    inner = runner._call  # type: ignore[attr-defined]
    runner._call = lambda *flat: (sizes.append(len(flat[0])), inner(*flat))[1]  # type: ignore
    models.check_values(runner, programs["conv"], FP32, (5,))
    assert sum(sizes) == 5
    assert max(sizes) == 2


def test_fixed_program_refuses_sub_batches(tmp_path: Path) -> None:
    program = models.conv_program(tmp_path / "p", dynamic=False)
    with pytest.raises(SuanliError):
        models.built(
            backends()["eager"], program, Plan(backend="eager", sub_batch=1), tmp_path / "b"
        )


def test_closed_runner_says_so(programs: dict[str, Program], tmp_path: Path) -> None:
    runner = models.built(backends()["eager"], programs["mlp"], Plan(backend="eager"), tmp_path)
    runner.close()
    with pytest.raises(SuanliError, match="closed"):
        runner(programs["mlp"].inputs(2))


def test_layer_times_name_the_operators(programs: dict[str, Program], tmp_path: Path) -> None:
    runner = models.built(backends()["eager"], programs["conv"], Plan(backend="eager"), tmp_path)
    layers = runner.layer_times(programs["conv"].inputs(2))
    assert any("conv" in layer.name for layer in layers)
    assert all(layer.time_ms > 0 for layer in layers)


@pytest.mark.parametrize("name", ["eager", "inductor", "aotinductor", "torchao"])
def test_what_is_not_offered_is_refused(
    programs: dict[str, Program], name: str, tmp_path: Path
) -> None:
    plan = Plan(backend=name, precision="int8", quantization=Quantization(scheme="int8-static"))
    with pytest.raises(SuanliError, match="does not offer"):
        backends()[name].build(programs["mlp"], plan, tmp_path)


def test_no_compiler_is_one_line(
    programs: dict[str, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    for name in ("inductor", "aotinductor"):
        plan = Plan(backend=name)
        with pytest.raises(MissingBackendError, match="C\\+\\+ compiler"):
            backends()[name].build(programs["mlp"], plan, tmp_path)


def test_torchao_absent_is_one_line(
    programs: dict[str, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    plan = _quantised("int8-weight")
    with pytest.raises(MissingBackendError, match="pip install torchao"):
        backends()["torchao"].load(programs["mlp"], plan, tmp_path)


def _quantised(scheme: str, **changes: object) -> Plan:
    quantization = Quantization(scheme=scheme, keep=changes.pop("keep", ()))  # type: ignore
    return Plan(backend="torchao", precision="int8", quantization=quantization, **changes)  # type: ignore


def test_linear_layers_are_named(programs: dict[str, Program]) -> None:
    for name, some in (
        ("bert", "encoder.layer.0.attention.self.query"),
        ("gpt2", "model.transformer.h.1.mlp.c_fc"),
    ):
        program = programs[name]
        module = flat_module(program, Plan(backend="torchao"))
        layers = linear_layers(module)
        assert some in layers
        flat = program.inputs(3)
        with torch.no_grad():
            error = models.relative_error(module(*flat), models.reference(program, flat))
        assert error < FP32


@needs_compiler
def test_inductor_per_batch(programs: dict[str, Program], tmp_path: Path) -> None:
    plan = Plan(backend="inductor", precision="bf16", options={"static_batch": 3})
    runner = models.built(backends()["inductor"], programs["mlp"], plan, tmp_path)
    models.check_values(runner, programs["mlp"], BF16)
    per_batch = runner._call  # type: ignore[attr-defined]
    assert set(per_batch._static) == {3}
    assert per_batch._any is not None
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for batch in (1, 3, 4):
            names = {layer.name for layer in runner.layer_times(programs["mlp"].inputs(batch))}
            assert "mkldnn::_linear_pointwise" in names, "the weights were not frozen"
            assert "aten::addmm" not in names


@needs_compiler
def test_aotinductor_from_disk_alone(programs: dict[str, Program], tmp_path: Path) -> None:
    backend = backends()["aotinductor"]
    plan = Plan(backend="aotinductor", precision="bf16")
    backend.build(programs["mlp"], plan, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"free.pt2", "facts.json"}
    runner = backend.load(programs["mlp"], plan, tmp_path)
    models.check_values(runner, programs["mlp"], BF16)
    assert runner.layer_times(programs["mlp"].inputs(2))
    (tmp_path / "free.pt2").write_bytes(b"not a package")
    with pytest.raises(ArtefactError, match="cannot be opened"):
        backend.load(programs["mlp"], plan, tmp_path)


@needs_compiler
def test_torchao_quantises_all_but_the_kept(programs: dict[str, Program], tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    plan = _quantised("int8-dynamic", keep=("out",))
    note = backends()["torchao"].build(programs["mlp"], plan, tmp_path)
    assert (note.details["quantized_layers"], note.details["kept_layers"]) == ("1", "1")
    runner = backends()["torchao"].load(programs["mlp"], plan, tmp_path)
    flat = programs["mlp"].inputs(3)
    error = models.relative_error(runner(flat), models.reference(programs["mlp"], flat))
    assert 0 < error < 0.05


def test_torchao_with_nothing_to_do_says_so(programs: dict[str, Program], tmp_path: Path) -> None:
    plan = _quantised("int8-weight", keep=("*",))
    with pytest.raises(SuanliError, match="no linear layer"):
        backends()["torchao"].build(programs["mlp"], plan, tmp_path)


COMPILED = [
    *(
        (name, backend, "bf16", {"static_batch": 3})
        for name in ("conv", "bert", "gpt2", "resnet")
        for backend in ("inductor", "aotinductor")
    ),
    *((name, "inductor", "fp32", {}) for name in ("conv", "bert")),
    ("conv", "aotinductor", "fp32", {}),
    ("bert", "inductor", "bf16", {"source": True}),
    ("bert", "inductor", "bf16", {"autocast": True}),
]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend", "precision", "options"), COMPILED)
def test_compiled(
    programs: dict[str, Program],
    name: str,
    backend: str,
    precision: str,
    options: dict[str, bool | int],
    tmp_path: Path,
) -> None:
    plan = Plan(backend=backend, precision=precision, options=options)
    runner = models.built(backends()[backend], programs[name], plan, tmp_path)
    models.check_values(runner, programs[name], 1e-4 if precision == "fp32" else BF16)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme", "rest"),
    [
        ("bert", "int8-dynamic", "bf16"),
        ("bert", "int8-weight", "bf16"),
        ("gpt2", "int8-dynamic", "fp32"),
    ],
)
def test_torchao(
    programs: dict[str, Program], name: str, scheme: str, rest: str, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    plan = _quantised(scheme, options={"rest": rest})
    runner = models.built(backends()["torchao"], programs[name], plan, tmp_path)
    models.check_values(runner, programs[name], 0.06)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "aotinductor"])
def test_compiled_outputs_are_nobody_elses_memory(backend: str, tmp_path: Path) -> None:
    program = models.program(models.Aliases(), Inputs(args=(torch.randn(2, 4),)), tmp_path / "p")
    runner = models.built(backends()[backend], program, Plan(backend=backend), tmp_path / "b")
    flat = program.inputs(3)
    wanted = [t.clone() for t in models.reference(program, flat)]
    for tensor in runner(flat):
        tensor.fill_(7)
    assert models.relative_error(runner(flat), wanted) < FP32
    assert shared._storage(flat[0]) not in {shared._storage(t) for t in runner(flat)}
