"""A file that somebody changed is refused with the tensor's name, whatever was changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import random_ids, tiny_model
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.calibration.file import KVCalibration, load_calibration
from rotq.kv.calibration.statistics import collect
from rotq.kv.calibration.stored_file import HEADER_LIMIT, KIND
from rotq.kv.presets import preset

MODEL = tiny_model("llama", dtype=torch.float32)
IDS_BT = random_ids(2, 40)
STATISTICS = collect(MODEL, IDS_BT, sinks=4)
Facts = dict[str, Any]


def made(name: str = "k3v3") -> KVCalibration:
    return calibrate(MODEL, IDS_BT, preset(name), statistics=STATISTICS)


def rewrite(
    path: Path,
    facts: Callable[[Facts], object] | None = None,
    tensors: Callable[[dict[str, Tensor]], object] | None = None,
) -> None:
    """Change a file's facts or its tensors, in place."""
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()[KIND])
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for change, given in ((facts, said), (tensors, held)):
        if change is not None:
            change(given)
    contiguous = {name: tensor.contiguous() for name, tensor in held.items()}
    save_file(contiguous, path, metadata={KIND: json.dumps(said)})


def refused(path: Path) -> str:
    """The one line, without the path, that loading the file ends with."""
    with pytest.raises(RotqError) as error:
        load_calibration(path, MODEL.config)
    line = str(error.value)
    assert str(path) in line
    assert "\n" not in line
    assert len(line) < 500
    return line.replace(str(path), "FILE")


def layer(**changes: Any) -> Callable[[Facts], object]:
    return lambda facts: facts["layers"]["0"].update(changes)


def form(**changes: Any) -> Callable[[Facts], object]:
    return lambda facts: facts["layers"]["0"]["format"].update(changes)


def scheme(**changes: Any) -> Callable[[Facts], object]:
    return lambda facts: facts["spec"].update(changes)


def top(**changes: Any) -> Callable[[Facts], object]:
    return lambda facts: facts.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (top(version=[1]), "FILE has version [1], known is 2"),
        (top(more=1), "its facts are not version"),
        (lambda facts: facts.pop("source"), "its facts are not version"),
        (top(model_hash=5), "its model_hash is 5"),
        (top(layers=[]), "its layers is []"),
        (top(source="x"), "its source is 'x'"),
        (top(spec=None), "its spec is None"),
        (lambda facts: facts["layers"].update({"00": {}}), "does not hold every layer"),
        (lambda facts: facts["layers"].update({"0": 3}), "layer 0: its facts are not"),
        (scheme(k_bits=3.0), "k_bits: 3.0 is no int"),
        (scheme(value_mean=1), "value_mean: 1 is no bool"),
        (scheme(mean="odd"), "mean: 'odd' is not one of none, static, rope"),
        (scheme(norm=["log8"]), "norm: ['log8'] is not one of"),
        (scheme(alpha="all"), "alpha: 'all' is no float or null"),
        (scheme(beta=float("nan")), "beta: nan is not between"),
        (scheme(sinks=10**12), "sinks: 1000000000000 is not between"),
        (scheme(boundary=1), "layer 0: its format.k_bits is 3, not 8"),
        (form(k_bits=7), "layer 0: its format.k_bits is 7, not 3"),
        (form(page_size=2**40), "layer 0: its format.page_size is 1099511627776, not 64"),
        (form(more=1), "layer 0: its facts are not format.head_dim, "),
        (layer(format=None), "layer 0: its facts are not format.head_dim, "),
        (layer(heads=0), "layer 0: its heads is 0, not 2"),
        (layer(heads=10**9), "layer 0: its heads is 1000000000, not 2"),
        (layer(heads=True), "layer 0: its heads is True, not 2"),
        (layer(mean="none"), "layer 0: its mean is 'none', not 'rope' or 'static'"),
        (layer(mean="static"), "layer 0: its rotary_scale is"),
        (layer(key_gain="norm"), "layer 0: its key_gain is 'norm', not 'lsq'"),
        (layer(value_search=4.0), "layer 0: its value_search is 4.0, not 0 or 4"),
        (layer(key_search=0), "'0.key.metric_HDD' belongs to no layer"),
        (layer(rotary_scale=float("nan")), "layer 0: its rotary_scale is nan, not 1.0"),
    ],
)
def test_facts(tmp_path: Path, change: Callable[[Facts], object], message: str) -> None:
    path = tmp_path / "kv"
    made().save(path)
    rewrite(path, facts=change)
    if message.startswith("layer 0: its rotary_scale is") and "nan" not in message:
        message = "'0.inv_freq_R' belongs to no layer"
    assert message in refused(path)


def cut(tensor: Tensor) -> Tensor:
    return tensor[..., :-1]


CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda tensor: None,
    "empty": lambda tensor: tensor[:0],
    "narrower": cut,
    "deeper": lambda tensor: tensor[None],
    "double": lambda tensor: tensor.double(),
    "half": lambda tensor: tensor.half(),
    "words": lambda tensor: tensor.to(torch.int64),
    "not finite": lambda tensor: tensor.float() * torch.nan,
    "zeros": torch.zeros_like,
    "huge": lambda tensor: tensor.float() * 1e25 + 1e25,
    "negative": lambda tensor: -tensor,
}
SOUND = {
    "mean_HD": ("zeros", "negative"),
    "base_H": ("zeros", "negative", "narrower"),
    "matrix_HDD": ("negative",),
    "residual_scale_H": ("zeros",),
    "gamma_base_H": ("zeros", "negative"),
    "sketch_DD": ("negative",),
}
"""Changes that leave a tensor what it may be; one base may be that of both heads."""

CODEBOOK = ("levels_HL", "thresholds_HL", "unit_H")
"""These say together what one of them says wrongly."""


@pytest.mark.parametrize("name", ["k3v3", "turboquant-prod", "turboesm"])
def test_every_tensor_and_every_change(tmp_path: Path, name: str) -> None:
    whole, path = tmp_path / "whole", tmp_path / "kv"
    made(name).save(whole)
    with safe_open(whole, framework="pt") as file:
        names = [n for n in file.keys() if n.startswith("0.")]  # noqa: SIM118
    outcomes: dict[tuple[str, str], str] = {}
    for tensor in names:
        for label, change in CHANGES.items():
            if label in SOUND.get(tensor.rpartition(".")[2], ()):
                continue

            def put(
                held: dict[str, Tensor],
                tensor: str = tensor,
                change: Callable[[Tensor], Tensor | None] = change,
            ) -> None:
                found = change(held.pop(tensor))
                held |= {} if found is None else {tensor: found}

            path.write_bytes(whole.read_bytes())
            rewrite(path, tensors=put)
            outcomes[tensor, label] = refused(path)
    assert len(outcomes) > 100
    for (tensor, label), said in outcomes.items():
        side, _, own = tensor.rpartition(".")
        named = CODEBOOK if own in CODEBOOK else (own,)
        assert any(f"{side}.{name}" in said for name in named), (tensor, label, said)


@pytest.mark.parametrize(
    ("tensor", "index", "value", "message"),
    [
        ("0.key.matrix_HDD", (0, 0), 0.0, "0.key.matrix_HDD has "),
        ("0.key.levels_HL", (0, 0), 100, "0.key.levels_HL does not ascend"),
        ("1.value.thresholds_HL", (0, 2), 0.5, "1.value.thresholds_HL is not half-way"),
        ("0.key.metric_HDD", (0, 0, 1), 1.0, "0.key.metric_HDD is no metric"),
        ("0.key.metric_HDD", (0, 3, 3), -1.0, "0.key.metric_HDD is no metric"),
        ("0.key.unit_H", (0,), -0.02, "0.key.unit_H is not between"),
        ("0.value.base_H", (0,), 127.0, "0.value.base_H is not between -128 and 96"),
        ("0.inv_freq_R", (2,), 1.0, "0.inv_freq_R is not that of the model"),
    ],
)
def test_one_number(
    tmp_path: Path, tensor: str, index: tuple[int, ...], value: float, message: str
) -> None:
    path = tmp_path / "kv"
    made().save(path)

    def put(held: dict[str, Tensor]) -> None:
        held[tensor][index] = value

    rewrite(path, tensors=put)
    assert message in refused(path)
    with pytest.raises(RotqError, match=tensor):
        PackedCache(MODEL, path)


def test_a_basis_without_an_inverse_or_not_orthogonal(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    made().save(path)
    flat_DD = torch.ones(16, 16) / 4

    def put(held: dict[str, Tensor]) -> None:
        held["0.key.matrix_HDD"] = flat_DD[None]

    rewrite(path, tensors=put)
    assert "0.key.matrix_HDD has no inverse" in refused(path)
    made("turboquant").save(path)
    skewed_DD = torch.diag(torch.linspace(0.5, 1.5, 16))
    skewed_DD /= skewed_DD.norm() / 4

    def skew(held: dict[str, Tensor]) -> None:
        held["0.key.matrix_HDD"] = skewed_DD[None]

    rewrite(path, tensors=skew)
    assert "0.key.matrix_HDD is not orthogonal" in refused(path)


def test_what_belongs_to_no_layer(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    made().save(path)
    rewrite(path, tensors=lambda held: held.update({"9.key.matrix_HDD": torch.zeros(1)}))
    assert "'9.key.matrix_HDD' belongs to no layer" in refused(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": ', "[]", "1" * 10_000])
def test_facts_that_are_no_object(tmp_path: Path, text: str) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "kv", metadata={KIND: text})
    assert "FILE is damaged: its facts are no" in refused(tmp_path / "kv")


def test_a_header_that_is_larger_than_any(tmp_path: Path) -> None:
    (tmp_path / "kv").write_bytes((HEADER_LIMIT + 1).to_bytes(8, "little") + b"{}")
    assert f"cannot read FILE: a header of {HEADER_LIMIT + 1} bytes" in refused(tmp_path / "kv")
