"""Grids of embedding and head, and what is refused or noted with them."""

from typing import Any

import pytest
import torch
from tiny_models import MemorySource, tiny_model

from rotq.job.outer_plan import FEW_ROWS
from rotq.job.plan import Plan, make_plan
from rotq.models.skeleton import Skeleton
from rotq.recipe import load_recipe

BASE = {"weights.group_size": 16, "weights.group_fallback": "auto"}
ROTQ = {"output.format": "rotq"}
SYMMETRIC = {"weights.symmetric": True}
ROTATED = {"rotation.residual": "hadamard"}


def plan(name: str, **changes: Any) -> Plan:
    skeleton = Skeleton.open(MemorySource(tiny_model(name, dtype=torch.float32)))
    return make_plan(skeleton, load_recipe(None, {**BASE, **changes}), torch.float32)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("llama", {}, {}),
        ("llama", {"weights.embedding": 6}, {"model.embed_tokens": 6}),
        ("llama", {"weights.head": 8}, {"lm_head": 8}),
        ("llama-tied", {"weights.embedding": 6}, {"model.embed_tokens": 6}),
        ("llama-tied", {"weights.embedding": 6, "weights.head": 6}, {"model.embed_tokens": 6}),
        (
            "llama-tied",
            {"weights.embedding": 6, "weights.head": 8, **ROTATED},
            {"model.embed_tokens": 6, "lm_head": 8},
        ),
        ("bert", {"weights.embedding": 4}, {"bert.embeddings.word_embeddings": 4}),
        ("gpt2", {"weights.embedding": 4}, {"transformer.wte": 4}),
    ],
    ids=str,
)
def test_bits_by_name(name: str, changes: dict[str, Any], expected: dict[str, int]) -> None:
    found = plan(name, **ROTQ, **changes)
    assert {name: grid.bits for name, grid in found.outer.items()} == expected
    assert all(grid.symmetric for grid in found.outer.values())
    assert all(found.shapes[name] == (97, 48) for name in found.outer)
    assert not set(found.outer) & set(found.grids)


def test_group_sizes_fall_back_as_those_of_layers_do() -> None:
    changes = {"weights.embedding": 6, **ROTQ}
    assert plan("llama", **changes).outer["model.embed_tokens"].group_size == 48
    wide = plan("llama", **changes, **{"weights.outer_group_size": -1})
    assert wide.outer["model.embed_tokens"].group_size == -1
    with pytest.raises(
        ValueError, match=r"model.embed_tokens: group size 64 .*group_fallback=auto"
    ):
        plan("llama", **changes, **{"weights.group_fallback": "error"})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama-tied",
            {"weights.head": 8, **ROTQ},
            "lm_head is tied to model.embed_tokens; set weights.embedding=8",
        ),
        (
            "llama",
            {"weights.embedding": 8, **SYMMETRIC},
            "model.embed_tokens cannot be packed in compressed-tensors: transformers looks for",
        ),
        ("llama", {"weights.head": 8}, "lm_head cannot be packed .* no zero points"),
        ("mixtral", {"weights.head": 8, **SYMMETRIC}, "lm_head cannot be packed .* fuses experts"),
    ],
    ids=["tied", "embedding", "zero points", "experts"],
)
def test_what_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(name, **changes)


def test_what_loaders_do_not_read_may_stay_dense() -> None:
    found = plan(
        "llama",
        **{"weights.embedding": 8, "weights.head": 8, "weights.outer_fallback": "dense"},
        **SYMMETRIC,
    )
    assert list(found.outer) == ["lm_head"]
    assert sum("model.embed_tokens stays dense" in note for note in found.notes) == 1


def test_alphabets_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotq.job.outer_plan.FEW_ROWS", 97)
    found = plan("esm", **{"weights.embedding": 6, **ROTQ})
    assert not found.outer
    assert any("97 rows are nothing to save" in note for note in found.notes)
    assert 33 <= FEW_ROWS < 97


@pytest.mark.parametrize("kind", ["normalizing", "own"])
def test_embeddings_that_do_more_are_refused(kind: str) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    skeleton = Skeleton.open(MemorySource(model))
    table = skeleton.model.get_submodule("model.embed_tokens")
    if kind == "normalizing":
        table.max_norm = 1.0
    else:
        skeleton.model.set_submodule("model.embed_tokens", Doubling(97, 48))
    recipe = load_recipe(None, {**BASE, **ROTQ, "weights.embedding": 6})
    with pytest.raises(ValueError, match=r"weights.embedding: model.embed_tokens cannot be packed"):
        make_plan(skeleton, recipe, torch.float32)
    kept = load_recipe(
        None, {**BASE, **ROTQ, "weights.embedding": 6, "weights.outer_fallback": "dense"}
    )
    found = make_plan(skeleton, kept, torch.float32)
    assert not found.outer
    assert any(note.startswith("model.embed_tokens stays dense: ") for note in found.notes)


def test_a_head_that_is_no_linear_layer_is_refused_or_kept() -> None:
    skeleton = Skeleton.open(MemorySource(tiny_model("llama", dtype=torch.float32)))
    skeleton.model.set_submodule("lm_head", torch.nn.Identity())
    with pytest.raises(ValueError, match=r"weights.head=6: lm_head is no linear layer"):
        make_plan(skeleton, load_recipe(None, {**BASE, **ROTQ, "weights.head": 6}), torch.float32)
    changes = {"weights.head": 6, "weights.outer_fallback": "dense"}
    found = make_plan(skeleton, load_recipe(None, {**BASE, **ROTQ, **changes}), torch.float32)
    assert not found.outer
    assert "no head is packed: lm_head is no linear layer that can be" in found.notes


class Doubling(torch.nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)
