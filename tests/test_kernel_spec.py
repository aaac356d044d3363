"""The kernel file: what a person can get wrong, in one clear line each."""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from suanli.base.errors import BadInputError
from suanli.kernels.cuda.declared import declaration
from suanli.kernels.declaration import Declaration
from suanli.kernels.spec import CudaKernel, Launch, calling, load, scalar
from tests.kernel_parts import ref, simple


def test_loads_one_of_several_by_name() -> None:
    with pytest.raises(BadInputError, match=r"transpose\.py has 3 kernels.*transpose\.py:naive"):
        load(ref("transpose_naive").partition(":")[0])
    kernel = load(ref("transpose_padded"))
    assert isinstance(kernel, CudaKernel)
    assert kernel.name == "transpose_padded"
    with pytest.raises(BadInputError, match="no kernel 'other'"):
        load(ref("vector_add") + ":other")


def test_file_without_kernel_absent_file_and_other_names(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(BadInputError, match=r"has 0 kernels.*no CudaKernel"):
        load(str(tmp_path / "empty.py"))
    with pytest.raises(BadInputError, match="no file"):
        load(str(tmp_path / "absent.py"))
    with pytest.raises(BadInputError, match="no kernel file"):
        load("kernel.cu")


def test_failing_file_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(BadInputError, match=r"broken\.py:2: ZeroDivisionError"):
        load(str(tmp_path / "broken.py"))


def test_first_line_is_where_the_text_stands() -> None:
    kernel = load(ref("vector_add"))
    assert isinstance(kernel, CudaKernel) and kernel.file is not None
    lines = kernel.file.read_text().splitlines()
    offset = kernel.text().splitlines().index("    int i = blockIdx.x * blockDim.x + threadIdx.x;")
    assert lines[kernel.first_line() - 1 + offset].strip().startswith("int i = blockIdx.x")


def test_source_in_a_file_of_its_own(tmp_path: Path) -> None:
    text = Path(ref("vector_add")).read_text()
    source = text.split('r"""')[1].split('"""')[0]
    (tmp_path / "add.cu").write_text(source)
    (tmp_path / "mine.py").write_text(
        text.replace(f'r"""{source}"""', "Path('add.cu')").replace(
            "import torch", "from pathlib import Path\nimport torch"
        )
    )
    kernel = load(str(tmp_path / "mine.py"))
    assert isinstance(kernel, CudaKernel)
    assert kernel.source_path() == tmp_path / "add.cu"
    assert kernel.text() == source
    assert kernel.first_line() == 1
    (tmp_path / "add.cu").unlink()
    with pytest.raises(BadInputError, match=r"cannot read add\.cu"):
        kernel.text()


def test_missing_reference() -> None:
    with pytest.raises(BadInputError, match=r"has no reference.*give the kernel reference="):
        simple("", reference=None).need_reference()


def test_unknown_argument_and_function(tmp_path: Path) -> None:
    text = Path(ref("vector_add")).read_text()
    path = tmp_path / "mine.py"
    path.write_text(text.replace('("a", "b", "c", "n")', '("a", "b", "c", "m")'))
    with pytest.raises(BadInputError, match="argument 'm' is no input, output or size"):
        load(str(path))
    path.write_text(text.replace('name="vector_add"', 'name="other"'))
    with pytest.raises(BadInputError, match="no function other"):
        load(str(path))


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (Launch(grid=(1,), block=(32, 33)), "1056 threads.*no GPU takes more than 1024"),
        (Launch(grid=(1,), block=(1, 1, 65)), r"block\.z is 65, the most is 64"),
        (Launch(grid=(1, 65536), block=(1,)), r"grid\.y is 65536"),
        (Launch(grid=(0,), block=(1,)), "not one to three positive numbers"),
        (Launch(grid=(1,), block=(1,), shared_bytes=-4), "-4 bytes of shared memory"),
    ],
)
def test_launch_over_a_limit(launch: Launch, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        launch.checked("kernel")


def test_launch_is_padded_and_counted() -> None:
    made = Launch(grid=(3, 2), block=(32, 4)).checked("kernel")
    assert (made.grid, made.block) == ((3, 2, 1), (32, 4, 1))
    assert (made.blocks, made.threads) == (6, 128)


def test_configurations_and_dtypes() -> None:
    kernel = simple(
        "", tunables={"A": (1, 2), "B": (3, 4)}, legal=lambda config, sizes: config["A"] < 2
    )
    assert list(kernel.configurations({"n": 4})) == [{"A": 1, "B": 3}, {"A": 1, "B": 4}]
    assert kernel.default_config({"n": 4}) == {"A": 1, "B": 3}
    never = replace(kernel, legal=lambda config, sizes: False)
    with pytest.raises(BadInputError, match="no configuration is legal"):
        never.default_config({"n": 4})
    assert kernel.macros({"n": 4}, {"A": 1, "B": 3}, "fp32") == {
        "ELEMENT": "float",
        "A": "1",
        "B": "3",
    }
    with pytest.raises(BadInputError, match=r"does not take bf16.*it takes fp32"):
        kernel.macros({"n": 4}, {}, "bf16")


def test_scalars() -> None:
    assert isinstance(scalar(3), ctypes.c_int)
    assert isinstance(scalar(3.0), ctypes.c_float)
    assert isinstance(scalar(True), ctypes.c_bool)
    assert isinstance(scalar(ctypes.c_longlong(2**40)), ctypes.c_longlong)
    with pytest.raises(BadInputError, match="does not fit into int"):
        scalar(2**31)
    with pytest.raises(BadInputError, match="cannot be a str"):
        scalar("x")


def test_becomes_a_declaration() -> None:
    kernel = load(ref("reduction"))
    assert isinstance(kernel, CudaKernel)
    made = declaration(kernel)
    assert isinstance(made, Declaration)
    assert made.writes == ("total",)
    assert made.source_hash == declaration(kernel).source_hash


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('given["a"]', 'given["z"]', "KeyError: 'z'"),
        ("block=(", "block=1 / 0, other=(", "ZeroDivisionError"),
        ("return {name:", "return {none:", "NameError"),
    ],
)
def test_functions_of_the_file_that_fail_are_named(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    text = Path(ref("vector_add")).read_text()
    assert old in text
    file = tmp_path / "mine.py"
    file.write_text(text.replace(old, new, 1))

    def use() -> None:
        kernel = load(str(file))
        assert isinstance(kernel, CudaKernel)
        given = calling(kernel, lambda: kernel.make_inputs({"n": 4}, torch.float32, "cpu", 0))
        calling(kernel, lambda: kernel.launch_at({"n": 4}, {"BLOCK": 32}))
        calling(kernel, lambda: kernel.need_reference()(given))

    with pytest.raises(BadInputError, match=rf"mine\.py:\d+: {said}"):
        use()


def test_a_launch_must_be_one() -> None:
    with pytest.raises(BadInputError, match="launch gave a tuple"):
        simple("", launch=lambda sizes, config: (1, 2)).launch_at({"n": 4}, {})
