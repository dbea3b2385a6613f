"""Runs of tokens: enough of them, of one length, and no long last wave."""

import pytest

from rotq_kernels.kv.decode.splits import (
    LONGEST_RUN,
    MOST_SPLITS,
    RESIDENT,
    SHORTEST_RUN,
    choose_run,
    makespan,
    run_of,
)

H100 = 132


@pytest.mark.parametrize("rows", RESIDENT)
@pytest.mark.parametrize("tokens", [32768, 131072])
def test_no_machine_waits_for_a_last_wave(tokens: int, rows: int) -> None:
    """Of 1 to 64 equal sequences of 8 KV heads, within 15 % of what all SMs together could do."""
    slots = RESIDENT[rows] * H100
    for batch in range(1, 65):
        run = choose_run(tokens, 8 * batch, H100, rows, 64)
        ideal = 8 * batch * tokens / slots
        assert makespan(tokens, 8 * batch, run, slots) <= 1.15 * ideal, batch


@pytest.mark.parametrize("tokens", [0, 1, 64, 1000, 8192, 131072, 1 << 20])
@pytest.mark.parametrize("batch", [1, 7, 32, 500])
@pytest.mark.parametrize("tile", [32, 64, 256])
def test_runs_cover_all_tokens(tokens: int, batch: int, tile: int) -> None:
    run = choose_run(tokens, 8 * batch, H100, 8, tile)
    assert run % tile == 0
    assert run > 0
    splits = -(-tokens // run)
    assert splits <= MOST_SPLITS
    if tokens >= SHORTEST_RUN:
        assert run >= min(SHORTEST_RUN, run_of(tokens, 1, tile))
    if tokens <= LONGEST_RUN * MOST_SPLITS:
        assert run <= max(LONGEST_RUN, tile)
