"""docs/models.md says what scripts/families.py found, and the adapters say the same."""

import json
import sys
from pathlib import Path

import pytest
from tiny_families import FAMILIES, tiny_family_config
from tiny_multimodal import CLASSES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rotq.models.registry import ADAPTERS

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "scripts" / "models.json").read_text())


def test_the_page_is_rendered_from_the_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    models_page = __import__("models_page")
    sys.modules.pop("models_page")
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert models_page.render(FOUND) == page, "run python scripts/families.py --markdown"


def test_every_family_was_tried_and_none_crashed() -> None:
    assert FOUND.keys() == {*FAMILIES, *CLASSES}
    outcomes = {
        (family, name): trial["outcome"]
        for family, all in FOUND.items()
        for name, trial in all.items()
    }
    assert set(outcomes.values()) == {"ok", "refused"}


@pytest.mark.parametrize(
    ("trial", "least"),
    [("rotated", 160), ("residual", 70), ("w3 tuned", 160), ("cache", 95), ("transformers", 15)],
)
def test_as_many_families_as_are_promised(trial: str, least: int) -> None:
    families = [FOUND[name] for name in FAMILIES]
    assert sum(all.get(trial, {}).get("outcome") == "ok" for all in families) >= least


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f] in ADAPTERS]
)
def test_rotations_are_those_of_the_adapters(family: str) -> None:
    adapter = ADAPTERS[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    obstacle = adapter.residual_obstacle(tiny_family_config(family))
    assert (FOUND[family]["residual"]["outcome"] == "ok") == (obstacle is None)
    assert (FOUND[family]["value"]["outcome"] == "ok") == adapter.value_rotation
    assert (FOUND[family]["down"]["outcome"] == "ok") == adapter.down_rotation
