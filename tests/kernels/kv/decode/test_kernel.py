"""Decode kernels against an fp64 oracle: no worse than twice plain PyTorch in the same dtype."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_device import attend_by_kernel, is_interpreted
from kv_cases import paged_slots, tokens_of, transform_of
from prmt_emulation import emulate_prmt
from torch import Tensor

from rotq_kernels.kv.attention import packed_attention_reference
from rotq_kernels.kv.decode import kernel, launch
from rotq_kernels.kv.encode.reference import dequantize_kv_reference, encode_kv_reference
from rotq_kernels.kv.format import DenseKV, KVFormat, KVHistory, KVPages

RAGGED = [150, 0, 1]
STARTS = [3, 0, 1700]


def poison(tensor: Tensor) -> None:
    """Fill with NaN or the largest integer."""
    top = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    tensor.fill_(top)


class Case:
    """Ragged packed sequences on poisoned pages, dense tokens behind them, fresh queries."""

    def __init__(
        self,
        form: KVFormat,
        *,
        heads: int = 1,
        group: int = 2,
        tokens: int = 1,
        dtype: torch.dtype = torch.float16,
        mean: str = "rope",
        rotary_pairs: int | None = None,
        lengths: list[int] = RAGGED,
        starts: list[int] = STARTS,
        window: int = 0,
        has_dense: bool = True,
    ) -> None:
        self.dtype, self.window = dtype, window
        self.transform = transform_of(form, heads, mean=mean, rotary_pairs=rotary_pairs)
        if form.k_bits <= 4:
            # another table, and one that is not symmetric, for each head
            self.transform.key.levels_HL += torch.arange(heads, dtype=torch.int8)[:, None]
        if form.norm == "none" and self.transform.gamma_base_H is not None:
            # the size of all residuals: such that they matter
            self.transform.gamma_base_H.fill_(-2.0)
        slot_BT, self.table_BJ, num_pages = paged_slots(lengths, form.page_size)
        self.length_B, self.start_B = (
            torch.tensor(numbers, dtype=torch.int32) for numbers in (lengths, starts)
        )
        self.pages = KVPages.empty(form, num_pages, heads)
        for tensor in self.pages.tensors():
            poison(tensor)
        B, most = len(lengths), max(lengths)
        k_BHTD, v_BHTD = tokens_of(self.transform, B, most)
        position_BT = self.start_B[:, None] + torch.arange(most)
        encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, self.transform, self.pages)
        generator = torch.Generator().manual_seed(5)
        self.q_BMTD = torch.randn(B, heads * group, tokens, form.head_dim, generator=generator).to(
            dtype
        )
        self.position_BT = (self.start_B + self.length_B)[:, None] + torch.arange(
            tokens, dtype=torch.int32
        )
        self.dense = self._dense() if has_dense else None

    def _dense(self) -> DenseKV:
        """Three sinks where there is room for them, 38 empty places, the fresh tokens."""
        B, T = self.position_BT.shape
        k_BHND, v_BHND = (x.to(self.dtype) for x in tokens_of(self.transform, B, 41 + T, seed=1))
        place_N = torch.arange(41)
        sink_BN = place_N.where(place_N < self.start_B[:, None].clamp(max=3), -1)
        position_BN = torch.cat((sink_BN, self.position_BT), dim=1).int()
        return DenseKV(k_BHND=k_BHND, v_BHND=v_BHND, position_BN=position_BN)

    def history(self) -> KVHistory:
        return KVHistory(
            pages=self.pages,
            page_table_BJ=self.table_BJ,
            length_B=self.length_B,
            start_B=self.start_B,
            constants=self.transform,
            dense=self.dense,
            window=self.window,
        )

    @property
    def scale(self) -> float:
        return 1.5 * float(self.q_BMTD.shape[-1] ** -0.5)

    def run(self, **more: Any) -> Tensor:
        """The kernels' output; what no key is stored in is poison."""
        history = self.history()
        if self.dense is not None:
            gone_BN = self.dense.position_BN < 0
            history.dense = replace(
                self.dense, k_BHND=self.dense.k_BHND.clone(), v_BHND=self.dense.v_BHND.clone()
            )
            for tensor in (history.dense.k_BHND, history.dense.v_BHND):
                tensor.transpose(1, 2)[gone_BN] = float("nan")
        return attend_by_kernel(self.q_BMTD, self.position_BT, history, scale=self.scale, **more)

    def oracle(self) -> Tensor:
        return packed_attention_reference(
            self.q_BMTD, self.position_BT, self.history(), scale=self.scale, dtype=torch.float64
        )

    def baseline(self) -> Tensor:
        """Plain attention in the query's dtype over what the codes stand for."""
        q_BMTD, position_BT = self.q_BMTD, self.position_BT
        k_BHND, v_BHND = dequantize_kv_reference(
            self.pages, self.table_BJ, self.length_B, self.start_B, self.transform,
            dtype=torch.float64,
        )  # fmt: skip
        token_N = torch.arange(k_BHND.shape[2])
        position_BN = (self.start_B[:, None] + token_N).where(token_N < self.length_B[:, None], -1)
        if self.dense is not None:
            k_BHND = torch.cat((k_BHND, self.dense.k_BHND), dim=2)
            v_BHND = torch.cat((v_BHND, self.dense.v_BHND), dim=2)
            position_BN = torch.cat((position_BN, self.dense.position_BN), dim=1)
        ahead_BTN = position_BT[:, :, None] - position_BN[:, None]
        seen_BTN = (position_BN[:, None] >= 0) & (ahead_BTN >= 0)
        if self.window:
            seen_BTN &= ahead_BTN < self.window
        group = q_BMTD.shape[1] // k_BHND.shape[1]
        k_BMND, v_BMND = (
            x.to(self.dtype).repeat_interleave(group, dim=1) for x in (k_BHND, v_BHND)
        )
        score_BMTN = q_BMTD @ k_BMND.mT * self.scale
        share_BMTN = score_BMTN.masked_fill(~seen_BTN[:, None], -torch.inf).softmax(-1)
        return share_BMTN.nan_to_num(0.0) @ v_BMND


def assert_no_worse(case: Case, **more: Any) -> None:
    ours, baseline, oracle = case.run(**more), case.baseline(), case.oracle()
    assert ours.dtype == case.dtype
    assert ours.shape == case.q_BMTD.shape

    def worst(found: Tensor) -> float:
        return (found.double() - oracle).abs().max().item()

    assert worst(ours) <= 2 * worst(baseline) + 1e-5


FORMATS = {
    "width 64": KVFormat(head_dim=64, k_bits=3, v_bits=3),
    "width 80": KVFormat(head_dim=80, k_bits=4, v_bits=3),
    "width 96": KVFormat(head_dim=96, k_bits=2, v_bits=4, page_size=32),
    "width 128": KVFormat(head_dim=128, k_bits=3, v_bits=3),
    "width 256": KVFormat(head_dim=256, k_bits=3, v_bits=3, page_size=128),
    "width 40": KVFormat(head_dim=40, k_bits=4, v_bits=2, page_size=16),
    "width 32": KVFormat(head_dim=32, k_bits=3, v_bits=3, page_size=256),
    "k2v2": KVFormat(head_dim=64, k_bits=2, v_bits=2, page_size=16),
    "k5v8": KVFormat(head_dim=64, k_bits=5, v_bits=8, norm="float16"),
    "k6v7": KVFormat(head_dim=32, k_bits=6, v_bits=7),
    "k7v6": KVFormat(head_dim=32, k_bits=7, v_bits=6),
    "k8v5": KVFormat(head_dim=128, k_bits=8, v_bits=5, norm="none"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    assert_no_worse(Case(FORMATS[name]))


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.bfloat16), (128, torch.float32)], ids=str)
def test_dtypes(width: int, dtype: torch.dtype) -> None:
    form = KVFormat(head_dim=width, k_bits=3, v_bits=3)
    assert_no_worse(Case(form, heads=2, dtype=dtype, lengths=[70, 9], starts=[5, 0]))


@pytest.mark.parametrize(
    ("residual", "norm"), [*itertools.product(["sign", "qjl"], ["log8", "float16", "none"])]
)
def test_residuals(residual: Any, norm: Any) -> None:
    form = KVFormat(head_dim=32, k_bits=2, v_bits=3, residual=residual, norm=norm)
    assert_no_worse(Case(form, heads=2, lengths=[70, 9], starts=[5, 0]))


@pytest.mark.parametrize("residual", ["sign", "qjl"])
def test_residuals_of_wide_heads(residual: Any) -> None:
    form = KVFormat(head_dim=160, k_bits=3, v_bits=3, residual=residual)
    assert_no_worse(Case(form, dtype=torch.float32, lengths=[70], starts=[5]))


@pytest.mark.parametrize(
    ("group", "tokens"), [(1, 1), (3, 2), (5, 1), (8, 1), (7, 2), (16, 1), (4, 4)]
)
def test_groups_and_fresh_tokens(group: int, tokens: int) -> None:
    form = KVFormat(head_dim=64, k_bits=3, v_bits=3)
    case = Case(form, heads=2, group=group, tokens=tokens, lengths=[67], starts=[5])
    assert_no_worse(case)


@pytest.mark.parametrize("mean", ["none", "static"])
def test_means_that_do_not_turn(mean: str) -> None:
    form = KVFormat(head_dim=64, k_bits=3, v_bits=3)
    assert_no_worse(Case(form, heads=2, mean=mean, lengths=[70, 1], starts=[5, 0]))


def test_partial_rope_far_out() -> None:
    """24 turned elements of 80, the last tokens of a million."""
    form = KVFormat(head_dim=80, k_bits=3, v_bits=3)
    case = Case(form, dtype=torch.float32, rotary_pairs=12, lengths=[200], starts=[999_000])
    assert_no_worse(case, splits=3)


@pytest.mark.parametrize("window", [1, 40, 140])
def test_window(window: int) -> None:
    form = KVFormat(head_dim=64, k_bits=3, v_bits=3)
    case = Case(form, tokens=2, window=window, lengths=[300, 20], starts=[5, 0])
    assert_no_worse(case, splits=2)


@pytest.mark.parametrize("splits", [1, 5])
def test_splits(splits: int) -> None:
    form = KVFormat(head_dim=128, k_bits=3, v_bits=3)
    case = Case(form, dtype=torch.float32, lengths=[300, 64], starts=[5, 0])
    assert_no_worse(case, splits=splits)


def test_packed_tokens_only() -> None:
    form = KVFormat(head_dim=64, k_bits=3, v_bits=3)
    case = Case(form, has_dense=False)
    assert_no_worse(case)
    assert bool((case.run()[1] == 0).all()), "a sequence without tokens gives zeros"


def test_queries_that_see_only_part() -> None:
    """Queries in the middle of the packed tokens; one before all of them; padding."""
    form = KVFormat(head_dim=64, k_bits=3, v_bits=3)
    case = Case(form, tokens=4, dtype=torch.float32, lengths=[150], starts=[10])
    case.position_BT = torch.tensor([[70, 159, 9, -1]], dtype=torch.int32)
    case.dense = None
    assert_no_worse(case)
    assert bool((case.run()[0, :, 2:] == 0).all())


def test_no_packed_tokens() -> None:
    form = KVFormat(head_dim=64, k_bits=3, v_bits=3)
    case = Case(form, dtype=torch.float32, lengths=[5, 3], starts=[0, 0])
    case.length_B.zero_()
    case.table_BJ = case.table_BJ[:, :0]
    case.pages = KVPages.empty(form, 0, 1)
    assert_no_worse(case)


def test_large_scores() -> None:
    """Nothing overflows where one token takes all weight, and the rest underflows."""
    form = KVFormat(head_dim=64, k_bits=3, v_bits=3)
    case = Case(form, dtype=torch.float32, lengths=[150], starts=[0])
    case.q_BMTD *= 300
    assert_no_worse(case)


@pytest.mark.parametrize("residual", ["none", "sign", "qjl"])
def test_large_means_and_queries(residual: Any) -> None:
    """Whose product fp16 does not hold."""
    form = KVFormat(head_dim=64, k_bits=3, v_bits=3, residual=residual)
    case = Case(form, lengths=[150], starts=[0])
    case.transform.key.mean_HD *= 3000
    case.q_BMTD *= 30
    assert float(case.q_BMTD.abs().max() * case.transform.key.mean_HD.abs().max()) > 65504
    assert_no_worse(case)


@pytest.mark.parametrize("residual", ["none", "qjl"])
def test_with_prmt(residual: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What NVIDIA's GPUs run, the instruction emulated: bitwise the portable path's result."""
    form = KVFormat(head_dim=64, k_bits=3, v_bits=4, residual=residual)
    case = Case(form, lengths=[150], starts=[5])
    ran = emulate_prmt(monkeypatch)
    decode = kernel.decode_kernel
    # with NVIDIA's tile of 8 query rows: a BLAS may sum in another order for another tile
    tile: dict[str, Any] = {"N": 8}

    class Launcher:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            return lambda *given, **named: decode[grid](*given, **named | tile)

    monkeypatch.setattr(kernel, "decode_kernel", Launcher())
    portable = case.run()
    assert not ran
    tile["PTX"] = True
    assert torch.equal(case.run(), portable)
    assert bool(ran) == is_interpreted()


@pytest.mark.parametrize(
    ("name", "turned"),
    [("width 64", False), ("width 64", True), ("width 96", False), ("width 256", True)],
)
def test_orders_of_lanes(name: str, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other versions of Triton: another order of the same exact sums."""
    case = Case(replace(FORMATS[name], residual="sign"), lengths=[70], starts=[5])
    expected = case.run()
    monkeypatch.setattr(launch, "lane_order", lambda has_ptx: {"PAIRS": True, "TURNED": turned})
    assert torch.equal(case.run(), expected)


def test_long_chunk_of_wide_heads() -> None:
    """fp32 queries of wide heads have no prefill kernel that fits a small GPU."""
    form = KVFormat(head_dim=160, k_bits=3, v_bits=3)
    dtype = torch.float32
    assert_no_worse(Case(form, group=4, tokens=17, dtype=dtype, lengths=[70], starts=[5]))


def test_long_chunk() -> None:
    """More query rows than a decode tile."""
    form = KVFormat(head_dim=64, k_bits=3, v_bits=3)
    assert_no_worse(Case(form, group=3, tokens=7, lengths=[70], starts=[5]))
