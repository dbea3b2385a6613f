"""A layer over blocks against dense attention over what the codes stand for."""

import itertools
from typing import Any

import pytest
import torch
from kv_cases import tokens_of, transform_of
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.codec import KVCodec
from rotq.ops import KVConstants, KVFormat
from rotq.vllm.blocks import BlockLayout, Blocks
from rotq.vllm.paged_layer import Batch, PagedLayer
from rotq.vllm.passes import requests_of

FORM = KVFormat(head_dim=32, k_bits=3, v_bits=4, page_size=64)
H, M, D, SIZE, SCALE = 2, 4, 32, 64, 0.3


class Sequence:
    """Keys, values and queries of one sequence, and its blocks."""

    def __init__(self, constants: KVConstants, length: int, blocks: list[int], seed: int) -> None:
        self.k_HTD, self.v_HTD = (x[0] for x in tokens_of(constants, 1, length, seed=seed))
        generator = torch.Generator().manual_seed(seed)
        self.q_MTD = torch.randn(M, length, D, generator=generator)
        self.blocks, self.constants = blocks, constants

    def expected(self, begin: int, end: int, *, sinks: int, window: int) -> Tensor:
        """Attention of tokens that are run as passes of these, (T, M, D), in fp64.

        Tokens before ``begin`` are codes but for the sinks, the others are whole.
        """
        codec, place = KVCodec(self.constants), torch.arange(end)
        codes = codec.encode(self.k_HTD[None, :, :end], self.v_HTD[None, :, :end], place[None])
        k_hat, v_hat = (x[0] for x in codec.decode(codes, place[None], torch.float64))
        is_whole_T11 = ((place < sinks) | (place >= begin))[:, None]
        k, v = (
            whole[:, :end].double().where(is_whole_T11, hat)
            for whole, hat in ((self.k_HTD, k_hat), (self.v_HTD, v_hat))
        )
        k, v = k.repeat_interleave(M // H, 0), v.repeat_interleave(M // H, 0)
        score = self.q_MTD[:, begin:end].double() @ k.mT * SCALE
        ahead = torch.arange(begin, end)[:, None] - place
        seen = (ahead >= 0) & ((ahead < window) if window else True)
        share = score.masked_fill(~seen, -torch.inf).softmax(-1)
        return (share @ v).transpose(0, 1)


def layer_and_blocks(
    form: KVFormat = FORM, *, sinks: int = 4, window: int = 0, mean: str = "rope"
) -> tuple[KVConstants, PagedLayer, Blocks]:
    constants = transform_of(form, H, mean=mean)
    layer = PagedLayer(constants, SIZE, sinks=sinks, window=window, scale=SCALE)
    layout = BlockLayout(format=layer.format, sinks=sinks, dtype=torch.float32)
    store = torch.zeros(12, H, SIZE, layout.bytes_per_token, dtype=torch.int8)
    return constants, layer, layout.view(store)


def run(layer: PagedLayer, blocks: Blocks, steps: list[tuple[Sequence, int, int]]) -> list[Tensor]:
    """New tokens begin to end of each sequence, in one batch; outputs (T, M, D)."""
    starts, parts = [0], []
    for sequence, begin, end in steps:
        starts.append(starts[-1] + end - begin)
        parts.append([x[:, begin:end] for x in (sequence.q_MTD, sequence.k_HTD, sequence.v_HTD)])
    q, k, v = (
        torch.cat([part[n] for part in parts], dim=1).transpose(0, 1).contiguous() for n in range(3)
    )
    width = max(len(sequence.blocks) for sequence, _, _ in steps)
    table_RJ = torch.tensor(
        [s.blocks + [0] * (width - len(s.blocks)) for s, _, _ in steps], dtype=torch.int32
    )
    batch = Batch(requests=requests_of(starts, [end for *_, end in steps]), table_RJ=table_RJ)
    out = torch.full_like(q, torch.nan)
    layer.attend(q, k, v, batch, blocks, out)
    return [out[a:b] for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("mean", ["none", "rope"])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("window", [0, 50])
def test_passes_and_steps(window: int, sinks: int, mean: str) -> None:
    constants, layer, blocks = layer_and_blocks(sinks=sinks, window=window, mean=mean)
    sequence = Sequence(constants, 152, [5, 2, 9], seed=1)
    (found,) = run(layer, blocks, [(sequence, 0, 150)])
    found = torch.cat([found, *(run(layer, blocks, [(sequence, t, t + 1)])[0] for t in (150, 151))])
    cuts = [0, 64, 128, 150, 151, 152]
    for begin, end in itertools.pairwise(cuts):
        expected = sequence.expected(begin, end, sinks=sinks, window=window)
        torch.testing.assert_close(found[begin:end].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_short_prompt_grows_over_its_sinks() -> None:
    constants, layer, blocks = layer_and_blocks()
    sequence = Sequence(constants, 7, [3], seed=2)
    found = [run(layer, blocks, [(sequence, 0, 2)])[0]]
    found += [run(layer, blocks, [(sequence, t, t + 1)])[0] for t in range(2, 7)]
    expected = [sequence.expected(0, 2, sinks=4, window=0)]
    expected += [sequence.expected(t, t + 1, sinks=4, window=0) for t in range(2, 7)]
    torch.testing.assert_close(torch.cat(found).double(), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_a_beginning_that_is_there_gives_the_same_bits() -> None:
    constants, layer, blocks = layer_and_blocks()
    sequence = Sequence(constants, 150, [1, 2, 3], seed=3)
    (first,) = run(layer, blocks, [(sequence, 0, 150)])
    sequence.blocks = [1, 2, 7]
    (again,) = run(layer, blocks, [(sequence, 128, 150)])
    assert torch.equal(again, first[128:])


def test_company_changes_no_bit() -> None:
    constants, layer, blocks = layer_and_blocks()
    here, there = (Sequence(constants, 151, [n, n + 1, n + 2], seed=n) for n in (1, 4))
    alone = [run(layer, blocks, [(one, 0, 150)])[0] for one in (here, there)]
    steps = [run(layer, blocks, [(one, 150, 151)])[0] for one in (here, there)]
    for tensor in (*blocks.pages.tensors(), blocks.whole_P2HND):
        tensor.zero_()
    together = run(layer, blocks, [(here, 0, 150), (there, 0, 150)])
    step = run(layer, blocks, [(here, 150, 151), (there, 150, 151)])
    for found, expected in ((together, alone), (step, steps)):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_what_is_stored_is_in_the_sequences_blocks() -> None:
    constants, layer, blocks = layer_and_blocks()
    run(layer, blocks, [(Sequence(constants, 70, [6, 1], seed=5), 0, 70)])
    for tensor in (*blocks.pages.tensors(), blocks.whole_P2HND):
        touched = tensor.flatten(1).ne(0).any(1).nonzero().flatten().tolist()
        assert touched == ([6] if tensor is blocks.whole_P2HND else [1, 6])
    # the sinks are whole, and not codes
    assert not blocks.pages.k_codes[6, :, :4].any()


@pytest.mark.parametrize("which", ["k_HTD", "v_HTD"])
def test_norms_that_do_not_fit(which: str) -> None:
    constants, layer, blocks = layer_and_blocks()
    sequence: Any = Sequence(constants, 70, [6, 1], seed=5)
    getattr(sequence, which)[:, 66] *= 1e9
    with pytest.raises(RotqError, match="hundreds of times larger"):
        run(layer, blocks, [(sequence, 0, 70)])
