"""Schemes by name."""

from dataclasses import replace

import pytest

from rotq.kv.presets import PRESETS, KVSpec, preset


@pytest.mark.parametrize("name", ["k3v3", "k4v3", "k4v2", "k8v3", "k4v4", "k2v2"])
def test_ours_are_named_for_their_bits(name: str) -> None:
    spec = preset(name)
    assert f"k{spec.k_bits}v{spec.v_bits}" == name
    assert (spec.mean, spec.sinks, spec.recent, spec.norm) == ("rope", 4, 0, "log8")
    assert spec.needs_calibration


def test_baselines() -> None:
    assert not preset("turboquant").needs_calibration
    assert not preset("turboquant-prod").needs_calibration
    assert preset("turboesm").needs_calibration
    assert (preset("turboesm").billed_bits, preset("turboesm").residual) == (4.5, "sign")


@pytest.mark.parametrize(("typed", "meant"), [("k3-v3", "k3v3"), ("turboqant", "turboquant")])
def test_unknown_name_gets_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"no KV preset '{typed}'; did you mean {meant}"):
        preset(typed)


def test_a_name_like_none_gets_the_list() -> None:
    with pytest.raises(ValueError, match="known: k3v3, k4v3"):
        preset("zzzz")


@pytest.mark.parametrize("name", PRESETS)
def test_dict_round_trip(name: str) -> None:
    assert KVSpec.from_dict(preset(name).to_dict()) == preset(name)


def test_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown keys of a KV scheme: k_bit"):
        KVSpec.from_dict({**preset("k3v3").to_dict(), "k_bit": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_bits": 1}, "k_bits: 1 is not between 2 and 8"),
        ({"v_bits": 9}, "v_bits: 9 is not between 2 and 8"),
        ({"sinks": -1}, "sinks: -1 is not between 0"),
        ({"alpha": 3.0}, "alpha: 3.0 is not between 0 and 2"),
        ({"beta": -0.5}, "beta: -0.5 is not between 0 and 1"),
        ({"gain": "norm"}, "search needs gain lsq"),
        ({"norm": "none", "search": 0}, "codebook kmeans and norm none go together"),
    ],
)
def test_out_of_range(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(preset("k3v3"), **change)


def test_boundary_layers() -> None:
    spec = replace(preset("k3v3"), boundary=2, boundary_bits=8)
    bits = [spec.layer_bits(layer, 6) for layer in range(6)]
    assert bits == [(8, 8), (8, 8), (3, 3), (3, 3), (8, 8), (8, 8)]


def test_oblivious() -> None:
    spec = preset("k4v3").oblivious()
    assert (spec.name, spec.k_bits, spec.needs_calibration) == ("k4v3-oblivious", 4, False)
    assert preset("turboquant").oblivious() is preset("turboquant")
    with pytest.raises(ValueError, match="turboesm does not exist without calibration"):
        preset("turboesm").oblivious()
