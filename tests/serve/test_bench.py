"""The benchmark counts what was asked for, and the same for every cache."""

import pytest
from tiny_served import byte_tokenizer, calibration_of, served_model

from rotq.errors import RotqError
from rotq.report.serve_tables import bench_table
from rotq.serve.bench import Load, Measured, measure, percentiles
from rotq.serve.settings import Settings

LOAD = Load(requests=6, clients=3, prompt_tokens=80, output_tokens=10)


def run(kv: str, load: Load = LOAD, **settings: int) -> Measured:
    model = served_model()
    limits = Settings(**{"kv_memory": 1 << 20, "max_batch": 4, "max_queue": 3, **settings})
    return measure(model, calibration_of(model, kv), limits, load, byte_tokenizer().decode)


def test_two_caches_side_by_side() -> None:
    found = [run("k3v3"), run("dense")]
    prompts = sum(map(len, LOAD.prompts(258)))
    for measured in found:
        assert measured.output_tokens_per_second == pytest.approx(60 / measured.seconds)
        assert measured.total_tokens_per_second == pytest.approx((60 + prompts) / measured.seconds)
        for times in (measured.first_token, measured.inter_token, measured.request):
            assert 0 < times["p50"] <= times["p90"] <= times["p99"]
        assert measured.first_token["p50"] < measured.request["p50"]
        assert 1 <= measured.peak_running <= 3
        assert 0 < measured.peak_cache_bytes < measured.cache_bytes_total <= 1 << 20
    packed, dense = found
    assert packed.capacity_tokens > 3 * dense.capacity_tokens
    assert packed.bits_per_element < dense.bits_per_element
    table = bench_table([measured.to_dict() for measured in found])
    header = table.splitlines()[0].split()
    assert header == ["k3v3-oblivious", "dense"]
    assert "40 to 80 random tokens" in table


def test_prompts_are_of_mixed_lengths_and_repeat() -> None:
    prompts = Load(requests=50, clients=1, prompt_tokens=20, output_tokens=1).prompts(100)
    lengths = {len(prompt) for prompt in prompts}
    assert (min(lengths), max(lengths)) == (10, 20)
    again = Load(requests=50, clients=1, prompt_tokens=20, output_tokens=1, seed=1)
    assert prompts != again.prompts(100)
    assert again.prompts(100) == again.prompts(100)


def test_percentiles() -> None:
    assert percentiles([float(n) for n in range(1, 101)]) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([3.0]) == {"p50": 3, "p90": 3, "p99": 3}
    assert percentiles([]) == {"p50": 0, "p90": 0, "p99": 0}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RotqError, match="requests of 900 tokens"):
        run("k3v3", Load(requests=1, clients=1, prompt_tokens=890, output_tokens=10))
