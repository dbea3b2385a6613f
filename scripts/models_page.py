"""docs/models.md, rendered from the outcomes of scripts/families.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VLLM = Path(__file__).parent / "vllm_architectures.txt"
ROTATIONS = {"residual": "R1", "value": "R2", "attention": "R3", "down": "R4"}

Outcomes = dict[str, dict[str, dict[str, str]]]
"""Family to trial to outcome and reason, see ``family_trials``."""

_HEAD = """# Model families

Written by `python scripts/families.py --markdown` from what `python scripts/families.py` found: of
every causal language model of transformers 5.23 a tiny random one is quantized, reloaded and
compared bit by bit. A family is a `model_type`. What is not listed as rotated is quantized without
rotation, by the layers that a trial run finds; what cannot be done is refused in one line, by
`--dry-run` too. Files that are quantized already are refused (DeepSeek-V3 and gpt-oss are released
in fp8 and mxfp4 only: a dense conversion is needed). Masked protein models (ESM-2, ESM-C, BERT) are in [proteins.md](proteins.md).

- **Rotations**: R1 residual stream, R2 values, R3 queries and keys, R4 the MLP's last input. Each
  job checks in fp64 that they leave the function as it was. Why a family has no R1 is in its file
  in `rotq/models/families/`.
- **w3**: the preset with tuning runs and its result reloads.
- **PackedCache**: logits token by token equal those of a dense cache that gives decoded codes back.
- **Formats**: `ct` is compressed-tensors, `rotq` the own format. Where it says *transformers*,
  logits of the `ct` files in transformers without rotq were equal to those of the dense model with
  the dequantized weights put in, up to the rounding of fp32. Experts are compared with symmetric
  grids, since transformers reads no others.
- **vLLM**: its 0.32.0 names the architecture, and the files are `ct`; by reading, not run.
"""


def render(found: Outcomes) -> str:
    """The whole page."""
    done = {name: all for name, all in found.items() if "rotated" in all}
    refused = {n: all for n, all in found.items() if n not in done and "quantized" in all}
    not_made = {n: all for n, all in found.items() if n not in done and n not in refused}
    parts = [_HEAD, *_counts(done), "", *_table(done)]
    parts += ["", "## Refused", "", *_reasons(refused, "quantized")]
    parts += [
        "",
        "## Quantized without a packed cache",
        "",
        *_reasons(_without_cache(done), "cache"),
    ]
    parts += [
        "",
        "## Not tried",
        "",
        "transformers does not make these from a small configuration.",
    ]
    parts += ["", *_reasons(not_made, "made")]
    return "\n".join(parts) + "\n"


def _counts(done: Outcomes) -> Iterator[str]:
    def number(trial: str) -> int:
        return sum(all.get(trial, {}).get("outcome") == "ok" for all in done.values())

    yield (
        f"{len(done)} families are quantized and reloaded, {number('residual')} with exact "
        f"rotations of the residual stream, {number('w3 tuned')} by w3 with tuning, "
        f"{number('cache')} with PackedCache, {number('transformers')} compared in transformers "
        "without rotq."
    )


def _table(done: Outcomes) -> Iterator[str]:
    vllm = set(VLLM.read_text().split("\n")[1:])
    yield "| family | rotations | w3 | PackedCache | formats | vLLM |"
    yield "|---|---|---|---|---|---|"
    for name, all in sorted(done.items()):
        rotations = " ".join(short for key, short in ROTATIONS.items() if _ok(all, key))
        formats = "ct, rotq" if _ok(all, "quantized") else "rotq"
        if _ok(all, "transformers"):
            formats += "; transformers"
        known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] in vllm and _ok(all, "quantized")
        cells = [name, rotations or "-", _yes(all, "w3 tuned"), _yes(all, "cache"), formats]
        yield f"| {' | '.join([*cells, 'named' if known else '-'])} |"


def _reasons(found: Outcomes, trial: str) -> Iterator[str]:
    """A line for each reason; families that share one are in one line."""
    families: dict[str, list[str]] = {}
    for name, all in sorted(found.items()):
        families.setdefault(all[trial]["why"].replace("|", "\\|"), []).append(name)
    for why, names in families.items():
        yield f"- {', '.join(names)}: {why}"


def _without_cache(done: Outcomes) -> Outcomes:
    return {name: all for name, all in done.items() if not _ok(all, "cache")}


def _ok(all: dict[str, Any], trial: str) -> bool:
    return bool(all.get(trial, {}).get("outcome") == "ok")


def _yes(all: dict[str, Any], trial: str) -> str:
    return "yes" if _ok(all, trial) else "-"
