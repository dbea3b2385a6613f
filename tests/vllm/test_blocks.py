"""Blocks of bytes as pages: each thing has a place of its own, a token is in one block only."""

import pytest
import torch

from rotq.errors import RotqError
from rotq.ops import KVFormat
from rotq.vllm.blocks import BlockLayout, Blocks

P, H = 3, 2
FORMATS = {
    "k3v3": KVFormat(head_dim=64, k_bits=3, v_bits=3),
    "k4v2, width 40": KVFormat(head_dim=40, k_bits=4, v_bits=2, page_size=128),
    "fp16 norms, qjl": KVFormat(
        head_dim=64, k_bits=2, v_bits=3, norm="float16", residual="qjl", page_size=64
    ),
    "no norms, sign": KVFormat(head_dim=32, k_bits=3, v_bits=3, norm="none", residual="sign"),
}


def blocks_of(layout: BlockLayout, *, gap: int = 0) -> tuple[torch.Tensor, Blocks]:
    """Blocks of ones, with other bytes between them."""
    size = H * layout.format.page_size * layout.bytes_per_token
    store = torch.full((P, size + gap), 1, dtype=torch.int8)
    block_PHSC = store[:, :size].view(P, H, layout.format.page_size, layout.bytes_per_token)
    return store, layout.view(block_PHSC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_parts_do_not_overlap(name: str, sinks: int, dtype: torch.dtype) -> None:
    layout = BlockLayout(format=FORMATS[name], sinks=sinks, dtype=dtype)
    store, blocks = blocks_of(layout, gap=64)
    parts = [*blocks.pages.tensors(), blocks.whole_P2HND]
    assert blocks.pages.has_whole_pages
    for part in parts:
        before = int(store.count_nonzero())
        part.zero_()
        assert before - int(store.count_nonzero()) == part.nbytes
    # what is left over is less than a byte for each token and head, and the gaps
    left = int(store.count_nonzero()) - P * 64
    assert 0 <= left < P * H * layout.format.page_size


def test_a_block_holds_all_of_its_tokens() -> None:
    layout = BlockLayout(format=FORMATS["k3v3"], sinks=4, dtype=torch.float32)
    store, blocks = blocks_of(layout)
    for part in (*blocks.pages.tensors(), blocks.whole_P2HND):
        part[1].zero_()
    assert store[[0, 2]].eq(1).all()
    assert blocks.pages.k_codes.shape == (P, H, 64, 6)
    assert blocks.whole_P2HND.shape == (P, 2, H, 4, 64)


@pytest.mark.parametrize(("size", "bits"), [(64, 4.125), (128, 3.625), (256, 3.375)])
def test_room_of_first_tokens_is_shared_by_a_block(size: int, bits: float) -> None:
    form = KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=size)
    layout = BlockLayout(format=form, sinks=4, dtype=torch.bfloat16)
    assert layout.bytes_per_token * 8 / (2 * 64) == bits


def test_other_blocks_are_refused() -> None:
    layout = BlockLayout(format=FORMATS["k3v3"], sinks=4, dtype=torch.float32)
    C = layout.bytes_per_token
    with pytest.raises(RotqError, match="made for 64"):
        layout.view(torch.zeros(P, H, 128, C, dtype=torch.int8))
    with pytest.raises(RotqError, match="contiguous"):
        layout.view(torch.zeros(P, 64, H, C, dtype=torch.int8).transpose(1, 2))
