"""The GPU catalogue: its figures, where they are from, and finding a card by name."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from suanli.base.errors import ArtefactError, BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.devices import catalogue, derived_flops, find_sheet, slug
from suanli.devices.catalogue import user_folder

SHEETS = {slug(sheet): sheet for sheet in catalogue()}
# Held below what their units could do, so that no clock explains their rates.
HELD_BACK = {"h20-96gb"}


def test_the_families_that_people_have_are_all_there() -> None:
    assert len(SHEETS) >= 45
    wanted = """p4 p40 p100-pcie-16gb p100-sxm2-16gb gtx-1080-ti v100-pcie-16gb v100-sxm2-32gb t4
    rtx-2080-ti titan-rtx rtx-8000 rtx-3060-12gb rtx-3090 rtx-3090-ti rtx-4070 rtx-4090 rtx-5070
    rtx-5090 rtx-a4000 rtx-a6000 rtx-6000-ada rtx-pro-6000-blackwell-workstation-96gb a10 a10g a30
    a40 a100-pcie-40gb a100-sxm4-80gb l4 l40 l40s h100-pcie-80gb h100-sxm5-80gb h100-nvl-94gb
    h200-sxm-141gb gh200-96gb b200-sxm-180gb gb200-186gb"""
    assert set(wanted.split()) <= SHEETS.keys()


@pytest.mark.parametrize("sheet", SHEETS.values(), ids=SHEETS)
class TestEverySheet:
    def test_each_figure_has_its_source(self, sheet: GpuSheet) -> None:
        assert {f for f in sheet.known_figures() if sheet.source_of(f) is None} == set()

    def test_each_source_names_figures_that_are_there(self, sheet: GpuSheet) -> None:
        named = {figure for source in sheet.sources for figure in source.figures}
        assert named <= set(sheet.known_figures())

    def test_fp32_is_cores_times_clock(self, sheet: GpuSheet) -> None:
        figures = (
            sheet.multiprocessors,
            sheet.fp32_cores_per_multiprocessor,
            sheet.boost_clock_mhz,
        )
        if None in figures or slug(sheet) in HELD_BACK:
            pytest.skip("a figure is blank, or the card is held back")
        cores, lanes, clock = (float(f) for f in figures if f is not None)
        assert cores * lanes * 2 * clock / 1e6 == pytest.approx(
            sheet.dense_tflops["fp32"], rel=0.025
        )

    def test_no_rate_is_one_with_sparsity(self, sheet: GpuSheet) -> None:
        """A rate with sparsity is twice what units times clock give."""
        if sheet.multiprocessors is None or sheet.boost_clock_mhz is None:
            pytest.skip("no clock in the sheet")
        for dtype, tflops in sheet.dense_tflops.items():
            most = derived_flops(
                sheet.compute_capability, sheet.multiprocessors, sheet.boost_clock_mhz, dtype
            )
            if most is not None:
                assert tflops * 1e12 <= 1.06 * most, dtype

    def test_rates_rise_as_types_narrow(self, sheet: GpuSheet) -> None:
        known = [sheet.dense_tflops[d] for d in ("tf32", "bf16", "fp8") if d in sheet.dense_tflops]
        assert known == sorted(known)
        assert sheet.dense_tflops.get("bf16") in (None, sheet.dense_tflops.get("fp16"))

    def test_only_ampere_and_later_have_bf16(self, sheet: GpuSheet) -> None:
        if float(sheet.compute_capability) < 8.0:
            assert not {"bf16", "tf32", "fp8"} & sheet.dense_tflops.keys()
        elif float(sheet.compute_capability) < 8.9:
            assert "fp8" not in sheet.dense_tflops


class TestFiguresThatTablesGetWrong:
    @pytest.mark.parametrize(
        ("card", "dtype", "tflops", "wrong"),
        [
            ("h100-sxm5-80gb", "bf16", 989.5, 1979),
            ("h100-sxm5-80gb", "tf32", 494.5, 156),
            ("l4", "fp16", 121, 242),
            ("rtx-4090", "fp16", 165.2, 82.6),
            ("rtx-3090", "fp16", 71, 142),
            ("a10g", "bf16", 70, 125),
            ("l40", "fp16", 181, 362),
            ("rtx-5090", "fp16", 209.5, 419),
        ],
    )
    def test_rates(self, card: str, dtype: str, tflops: float, wrong: float) -> None:
        rate = SHEETS[card].dense_tflops[dtype]
        assert rate == pytest.approx(tflops, rel=0.005)
        assert rate != pytest.approx(wrong, rel=0.1)

    def test_sizes_and_bandwidths(self) -> None:
        assert SHEETS["l4"].memory_gb_per_s == 300
        assert SHEETS["l4"].multiprocessors == 58
        assert SHEETS["a10"].memory_gb == 24
        assert SHEETS["p40"].memory_gb_per_s == 346
        assert SHEETS["h100-pcie-80gb"].memory_gb_per_s == 2000
        assert "fp16" not in SHEETS["gtx-1080-ti"].dense_tflops

    def test_links_count_both_ways_and_bridges_two_cards(self) -> None:
        assert SHEETS["h100-sxm5-80gb"].nvlink_gb_per_s_both_ways == 900
        assert SHEETS["a100-pcie-80gb"].nvlink_gpus == 2
        assert SHEETS["rtx-4090"].nvlink_gb_per_s_both_ways is None
        assert SHEETS["t4"].pcie_bytes_per_s == pytest.approx(15.75e9, rel=0.001)
        assert SHEETS["h100-sxm5-80gb"].pcie_bytes_per_s == pytest.approx(63e9, rel=0.001)


class TestFinding:
    @pytest.mark.parametrize(
        ("typed", "found"),
        [
            ("H100-SXM5-80GB", "h100-sxm5-80gb"),
            ("nvidia a100-sxm4-80gb", "a100-sxm4-80gb"),
            ("RTX 3090", "rtx-3090"),
            ("geforce rtx 3090 ti", "rtx-3090-ti"),
            ("4090", "rtx-4090"),
            ("a10", "a10"),
            ("T4", "t4"),
            ("1080ti", "gtx-1080-ti"),
        ],
    )
    def test_names_as_people_write_them(self, typed: str, found: str) -> None:
        assert slug(find_sheet(typed)) == found

    def test_every_slug_and_driver_name_finds_its_card(self) -> None:
        for name, sheet in SHEETS.items():
            assert find_sheet(name) is sheet
            assert all(find_sheet(known) is sheet for known in sheet.nvml_names)

    def test_a_name_of_several_cards_asks_which(self) -> None:
        for typed in ("h100", "NVIDIA H100"):
            with pytest.raises(BadInputError, match=r"(?i)which .*h100-nvl.*h100-pcie.*h100-sxm5"):
                find_sheet(typed)

    def test_an_unknown_name_offers_near_ones(self) -> None:
        with pytest.raises(BadInputError, match="rtx-4090") as raised:
            find_sheet("rtx-4091")
        assert raised.value.exit_code == 2
        with pytest.raises(BadInputError, match="no GPU ''"):
            find_sheet("")


class TestOwnFiles:
    CARD = """
name = "{name}"
nvml_names = ["Some Card"]
architecture = "Ada"
compute_capability = "8.9"
memory_gb = 12
memory_gb_per_s = 500
mark = "measured"
sources = [{{document = "measured by me", figures = ["memory_gb", "memory_gb_per_s"]}}]

[dense_tflops]
fp32 = 20.0
"""

    def add(self, name: str) -> None:
        user_folder().mkdir(parents=True, exist_ok=True)
        (user_folder() / "own.toml").write_text(self.CARD.format(name=name), encoding="utf-8")

    @pytest.fixture(autouse=True)
    def clean(self) -> Iterator[None]:
        """No own card before, and none left for other tests."""
        self.remove()
        yield
        self.remove()

    def remove(self) -> None:
        if user_folder().is_dir():
            for path in user_folder().iterdir():
                path.unlink()

    def test_one_file_adds_a_card(self) -> None:
        self.add("My Card 12GB")
        assert find_sheet("my-card-12gb").memory_gb_per_s == 500
        assert len(catalogue()) == len(SHEETS) + 1

    def test_it_wins_over_the_one_that_ships(self) -> None:
        self.add("L4")
        assert find_sheet("l4").mark == "measured"
        assert len(catalogue()) == len(SHEETS)

    def test_a_damaged_one_is_named(self) -> None:
        user_folder().mkdir(parents=True, exist_ok=True)
        (user_folder() / "own.toml").write_text("name = 3")
        with pytest.raises(ArtefactError, match=r"own\.toml"):
            catalogue()
        (user_folder() / "own.toml").unlink()

    @pytest.mark.parametrize(
        ("line", "other", "message"),
        [
            ("memory_gb = 12", "memory_gb = nan", "memory_gb must be"),
            ("memory_gb_per_s = 500", "memory_gb_per_s = 0", "memory_gb_per_s must be"),
            ("memory_gb_per_s = 500", "power_w = -1", "power_w must be"),
            ('"8.9"', '"Ada"', "compute_capability"),
            ('"8.9"', '"99.0"', "of no card that can be predicted"),
            ("memory_gb = 12", "memory_gb = 12288", "memory_gb is in GB"),
            ("memory_gb_per_s = 500", "memory_gb_per_s = 500e9", "1e9 bytes per second"),
            ("memory_gb_per_s = 500", "memory_gb_per_s = 1e-300", "1e9 bytes per second"),
            ("memory_gb_per_s = 500", "multiprocessors = 1000000000000", "multiprocessors is"),
            ("fp32 = 20.0", "fp32 = 38.4e12", "1e12 operations"),
            ("fp32 = 20.0", "fp33 = 20.0", "no known type"),
            ("memory_gb = 12", "memory_gb = 12\nyear = 2025-01-01", "own.toml"),
            ('name = "Card 9"', 'name = "NVIDIA"', "a name of its own"),
        ],
    )
    def test_a_figure_that_makes_no_sense_is_named(
        self, line: str, other: str, message: str
    ) -> None:
        self.add("Card 9")
        path = user_folder() / "own.toml"
        assert line in path.read_text()
        path.write_text(path.read_text().replace(line, other))
        with pytest.raises(ArtefactError, match=message) as raised:
            catalogue()
        assert "own.toml" in str(raised.value) and "\n" not in str(raised.value)

    def test_a_file_that_is_no_text_is_named(self) -> None:
        self.add("Card 9")
        (user_folder() / "own.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(ArtefactError, match=r"own\.toml"):
            catalogue()


def test_files_are_named_as_the_card_is_typed() -> None:
    folder = Path(__file__).parent.parent / "suanli" / "devices" / "gpus"
    for path in folder.glob("*.toml"):
        name = tomllib.loads(path.read_text(encoding="utf-8"))["name"]
        assert slug(find_sheet(name)) == path.stem
