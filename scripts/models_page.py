"""docs/models.md, rendered from the outcomes of scripts/families.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

VLLM = Path(__file__).parent / "vllm_architectures.txt"
ROTATIONS = {"residual": "R1", "value": "R2", "attention": "R3", "down": "R4"}

Outcomes = dict[str, dict[str, dict[str, str]]]
"""Family to trial to outcome and reason, see ``family_trials``."""

CLASSES = set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values())

_PARTS = """## The text part of multimodal classes

Of every class that has a text decoder beside towers for images or sounds a tiny random one was
tried in the same way. The decoder is quantized, calibrated on text; what lies beside it is copied
byte by byte, and named in the report. The result is loaded by transformers' own class
(`AutoModelForImageTextToText`), in both formats.

- **Rotations**: R1 turns the projector's last layer with the residual stream, and every other layer
  that adds image features to it (DeepStack): `rotq/models/multimodal.py` has them, and
  `tests/models/test_multimodal.py` the proof in fp64, with images. Where they are not known R1 is
  refused.
- **image**: with an image between the words packed layers gave the logits of dense ones, and all
  tensors beside the decoder were what they had been. `-`: no image was made for the class here.
- **PackedCache**: for text; after images too where their tokens do not see each other, which is
  refused (Gemma 3).
"""

_HEAD = """# Model families

Written by `python scripts/families.py --markdown` from what `python scripts/families.py` found: of
every causal language model of transformers 5.23 a tiny random one is quantized, reloaded and
compared bit by bit. A family is a `model_type`. What is not listed as rotated is quantized without
rotation, by the layers that a trial run finds; what cannot be done is refused in one line, by
`--dry-run` too. Files that are quantized already are refused (DeepSeek-V3 and gpt-oss are released
in fp8 and mxfp4 only: a dense conversion is needed). Masked protein models (ESM-2, ESM-C, BERT) are
in [proteins.md](proteins.md).

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
    families = {name: all for name, all in found.items() if name not in CLASSES}
    classes = {name: all for name, all in found.items() if name in CLASSES}
    parts = [_HEAD, *_outcomes(families, level="##")]
    parts += ["", _PARTS, *_outcomes(classes, level="###")]
    return "\n".join(parts) + "\n"


def _outcomes(found: Outcomes, *, level: str) -> Iterator[str]:
    """Counts, table and reasons; headings of that level."""
    done = {name: all for name, all in found.items() if "rotated" in all}
    refused = {n: all for n, all in found.items() if n not in done and "quantized" in all}
    not_made = {n: all for n, all in found.items() if n not in done and n not in refused}
    yield from (*_counts(done), "", *_table(done))
    yield from ("", f"{level} Refused", "", *_reasons(refused, "quantized"))
    yield from ("", f"{level} Quantized without a packed cache", "")
    yield from _reasons(_without_cache(done), "cache")
    yield from ("", f"{level} Not tried", "")
    yield from ("transformers does not make these from a small configuration.", "")
    yield from _reasons(not_made, "made")


def _counts(done: Outcomes) -> Iterator[str]:
    def number(trial: str) -> int:
        return sum(all.get(trial, {}).get("outcome") == "ok" for all in done.values())

    what = "classes" if done.keys() & CLASSES else "families"
    yield (
        f"{len(done)} {what} are quantized and reloaded, {number('residual')} with exact "
        f"rotations of the residual stream, {number('w3 tuned')} by w3 with tuning, "
        f"{number('cache')} with PackedCache, {number('transformers')} compared in transformers "
        "without rotq."
    )


def _table(done: Outcomes) -> Iterator[str]:
    vllm = set(VLLM.read_text().split("\n")[1:])
    sees = bool(done.keys() & CLASSES)
    columns = ["class" if sees else "family", "rotations", "w3", "PackedCache", "formats"]
    columns += ["image"] if sees else ["vLLM"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for name, all in sorted(done.items()):
        rotations = " ".join(short for key, short in ROTATIONS.items() if _ok(all, key))
        formats = "ct, rotq" if _ok(all, "quantized") else "rotq"
        if _ok(all, "transformers"):
            formats += "; transformers"
        cells = [name, rotations or "-", _yes(all, "w3 tuned"), _yes(all, "cache"), formats]
        if sees:
            last = _yes(all, "image")
        else:
            known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] in vllm and _ok(all, "quantized")
            last = "named" if known else "-"
        yield f"| {' | '.join([*cells, last])} |"


def _reasons(found: Outcomes, trial: str) -> Iterator[str]:
    """A line for each reason; families that share one are in one line."""
    families: dict[str, list[str]] = {}
    for name, all in sorted(found.items()):
        why = all[trial]["why"].partition(" for this kind of AutoModel")[0]
        families.setdefault(why.removeprefix(f"{name}: "), []).append(name)
    for why, names in families.items():
        yield f"- {', '.join(names)}: {why}"


def _without_cache(done: Outcomes) -> Outcomes:
    return {name: all for name, all in done.items() if not _ok(all, "cache")}


def _ok(all: dict[str, Any], trial: str) -> bool:
    return bool(all.get(trial, {}).get("outcome") == "ok")


def _yes(all: dict[str, Any], trial: str) -> str:
    return "yes" if _ok(all, trial) else "-"
