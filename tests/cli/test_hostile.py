"""Some of the hostile files of scripts/hostile, one of each kind: one plain line as their end.

``python scripts/hostile/run.py`` has them all, each in a process of its own, within bounds of time
and memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rotq.cli.main import main

HOSTILE = Path(__file__).parents[2] / "scripts" / "hostile"

REFUSED = (
    "config-deep-within-dry",
    "config-layers-huge-dry",
    "config-rope-word-dry",
    "config-text-config-dry",
    "config-quantized-list-dry",
    "config-quantized-group-word-ppl",
    "header-shape-overflow-ppl",
    "header-offsets-far-ppl",
    "header-dtype-number-job",
    "header-entry-lone-surrogate-job",
    "weights-length-far-ppl",
    "weights-not-a-number-job",
    "index-map-lists-ppl",
    "index-device-job",
    "tokenizer-model-unknown-ppl",
    "tokenizer-added-far-job",
    "tokenizer-added-far-ppl",
    "tokenizer-regex-backtracking-job",
    "tokenizer-config-added-ppl",
    "recipe-pattern-nothing",
    "recipe-source-surrogate",
    "recipe-name-surrogate",
    "set-key-deep",
    "lines-text-list-job",
    "text-binary-ppl",
    "text-device-ppl",
    "fasta-letters-far-job",
    "fasta-gzip-cut-pll",
)
TAKEN = ("config-dtype-number-inspect", "tokenizer-padding-far-ppl", "fasta-separators-pll")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bench, and the cases by name."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(HOSTILE)
        known = set(sys.modules)
        import bench
        import config_files
        import recipes
        import texts
        import tokenizer_files
        import weights

        kinds = (config_files, weights, tokenizer_files, recipes, texts)
        cases = {case.name: case for kind in kinds for case in kind.cases()}
        yield bench.Bench(tmp_path_factory.mktemp("hostile")), cases
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(HOSTILE)):
                del sys.modules[name]


@pytest.mark.parametrize("name", [*REFUSED, *TAKEN])
def test_a_hostile_file_is_one_plain_line(hostile: Any, name: str) -> None:
    bench, cases = hostile
    bench.clear()
    arguments = [str(argument) for argument in cases[name].build(bench)]
    result = CliRunner().invoke(main, arguments, prog_name="rotq")
    assert isinstance(result.exception, SystemExit | None)
    assert "unexpected" not in result.stderr
    if name in TAKEN:
        assert result.exit_code == 0, result.stderr
    else:
        assert result.exit_code in (1, 2)
        assert result.stderr.splitlines()[-1].startswith("rotq: error: ")
