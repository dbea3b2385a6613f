"""Files that rotq has written beside its weights, changed by somebody else."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import Bench, Case
from config_files import DEEP

Values = dict[str, Any]

BYTES: dict[str, str | bytes] = {
    "empty": "",
    "list": "[]",
    "nothing": "{}",
    "deep": DEEP,
    "latin": b"{\xe9}",
}

REPORT: dict[str, Callable[[Values], object]] = {
    "version": lambda report: report.update(schema_version=[]),
    "layers-null": lambda report: report.update(layers=None),
    "layers-words": lambda report: report.update(layers=["a"]),
    "layer-error": lambda report: report["layers"][0].update(relative_error="large"),
    "layer-shape": lambda report: report["layers"][0].update(shape=3),
    "bytes-zero": lambda report: report.update(original_bytes=0),
    "bytes-word": lambda report: report.update(bytes="x"),
    "recipe-empty": lambda report: report.update(recipe={}),
    "recipe-word": lambda report: report.update(recipe="w4"),
    "data-list": lambda report: report.update(data=[]),
    "versions-null": lambda report: report.update(versions=None),
    "notes-numbers": lambda report: report.update(notes=[1]),
    "notes-control": lambda report: report.update(notes=["\x1b[2J"]),
    "flatness-word": lambda report: report.update(flatness={"a": "b"}),
    "evaluation-list": lambda report: report.update(evaluation=[1]),
    "more": lambda report: report.update(unknown=1),
}

PROVENANCE: dict[str, object] = {
    "files-list": {"files": ["config.json"]},
    "files-number": {"files": {"config.json": 3}},
    "files-up": {"files": {"../../x": "0"}},
    "files-absolute": {"files": {"/etc/passwd": "0"}},
    "files-nul": {"files": {"a\0b": "0"}},
    "files-long": {"files": {"x" * 5000: "0"}},
    "no-files": {"seed": 0},
}

RECIPES = {
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{i}: &a{i} [{','.join(['*a'] * 9)}]\n" for i in range(9)),
    "word": "w4",
    "unknown": "nothing: 3\n",
    "python": "name: !!python/name:os.system\n",
}


def cases() -> Iterator[Case]:
    for file in ("report.json", "rotq_provenance.json", "rotq_recipe.yaml"):
        for name, content in BYTES.items():
            yield Case(
                f"own-{file}-{name}",
                lambda bench, f=file, c=content: _inspect(bench.damaged(bench.packed, f, c)),
            )
    for name, change in REPORT.items():
        yield Case(f"own-report-{name}", lambda bench, c=change: _inspect(_report(bench, c)))
    for name, values in PROVENANCE.items():
        yield Case(
            f"own-provenance-{name}",
            lambda bench, v=values: _inspect(
                bench.damaged(bench.packed, "rotq_provenance.json", json.dumps(v))
            ),
        )
    for name, content in RECIPES.items():
        yield Case(
            f"own-recipe-{name}",
            lambda bench, c=content: _inspect(bench.damaged(bench.packed, "rotq_recipe.yaml", c)),
        )
        yield Case(f"own-recipe-{name}-pll", lambda bench, c=content: _pll(bench, c))


def _inspect(checkpoint: Path) -> list[object]:
    return ["inspect", checkpoint, "--verify"]


def _report(bench: Bench, change: Callable[[Values], object]) -> Path:
    values = json.loads((bench.packed / "report.json").read_text())
    change(values)
    provenance = json.loads((bench.packed / "rotq_provenance.json").read_text())
    provenance["files"] = {"config.json": provenance["files"]["config.json"]}
    damaged = bench.damaged(bench.packed, "report.json", json.dumps(values))
    path = damaged / "rotq_provenance.json"
    path.unlink()
    path.write_text(json.dumps(provenance))
    return damaged


def _pll(bench: Bench, recipe: str) -> list[object]:
    model = bench.damaged(bench.esm, "rotq_recipe.yaml", recipe)
    few = ["--sequences", 1, "--max-length", 20, "--positions", 2, "--representations"]
    return ["eval", "pll", model, "--fasta", bench.fasta, "--reference", bench.esm, *few]
