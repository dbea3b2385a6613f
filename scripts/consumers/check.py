"""A checkpoint of rotq's in the programs that others run it with: what they write, their logits.

    python scripts/consumers/check.py OUT --work DIR --transformers ENV/bin/python \\
        --gptqmodel ENV/bin/python --xllamacpp ENV/bin/python
    python scripts/consumers/check.py OUT-exl3 --work DIR --gptqmodel_exl3 ENV/bin/python

OUT is in compressed-tensors' format, or in EXL3 for the reader of that. Each reader runs in an
environment of its own, without rotq, on its file: the checkpoint itself, or what ``rotq export``
makes of it. Greedy text is compared with rotq's token by token, logits where a reader gives them,
both in the reader's dtype.
README.md has the environments. Exit 1 where a text differs before its end.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reading import digest
from torch import Tensor

from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.layers.quant_linear import QuantLinear

HERE = Path(__file__).parent
FORMATS = {"transformers": None, "gptqmodel": "gptq", "xllamacpp": "gguf", "gptqmodel_exl3": None}
"""What each reader is given; None for the checkpoint as it is."""
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "In 1969, the first people to walk on the Moon",
    "She opened the old wooden door and",
)


@dataclass(frozen=True)
class Text:
    """What a model writes behind a prompt, greedily."""

    ids: list[int]
    leads: list[float]
    """Of each token over the second, in nats."""


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> Text:
    """At most so many tokens behind a prompt."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    best = [scores[0].float().topk(2).values.tolist() for scores in made.scores]
    return Text(
        made.sequences[0, len(prompt) :].tolist(), [first - second for first, second in best]
    )


def equal_tokens(ours: Sequence[int], theirs: Sequence[int] | str, tokenizer: Any) -> int:
    """How many of our tokens are at the start of a reader's text, which may come decoded."""
    if isinstance(theirs, str):
        starts = [
            tokenizer.decode(ours[: n + 1], skip_special_tokens=True) for n in range(len(ours))
        ]
        same = [theirs.startswith(start) for start in starts]
    else:
        same = [theirs[: n + 1] == ours[: n + 1] for n in range(len(ours))]
    return same.index(False) if False in same else len(ours)


def exported(checkpoint: Path, kind: str | None, work: Path) -> Path:
    """The file or folder for a reader, made once."""
    if kind is None:
        return checkpoint
    folder = work / f"{checkpoint.name}-{kind}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "rotq", "export", checkpoint, "--format", kind]
        subprocess.run([*command, "-o", folder], check=True)
    return next(folder.glob("*.gguf")) if kind == "gguf" else folder


def read(reader: str, python: str, path: Path, asked: Path) -> dict[str, Any]:
    """What a reader says of a file."""
    found = asked.with_name(f"{reader}.json")
    subprocess.run([python, HERE / f"read_{reader}.py", path, asked, found], check=True)
    return dict(json.loads(found.read_text()))


@dataclass(frozen=True)
class Ours:
    """The same of rotq."""

    texts: list[Text]
    logits: Tensor
    """Of the last prompt."""
    weights: str
    """``digest`` of the quantized layers' weights."""
    model: Any
    """With dense weights."""

    def furthest(self, dense: Mapping[str, Tensor]) -> float:
        """The largest difference from a reader's weights, as a share of a layer's largest."""
        shares = []
        for name, theirs_NK in dense.items():
            own_NK = self.model.get_submodule(name).weight.float()
            shares.append(float((theirs_NK - own_NK).abs().max() / own_NK.abs().max()))
        return max(shares)


def ours_of(checkpoint: Path, dtype: str, asked: Mapping[str, Any]) -> Ours:
    """What rotq makes of the checkpoint, its weights unpacked."""
    packed = load_model(checkpoint, dtype=dtype)
    weights = {
        name: layer.dequantize(packed.dtype)
        for name, layer in packed.named_modules()
        if isinstance(layer, QuantLinear)
    }
    model = load_model(checkpoint, packed=False, dtype=dtype)
    with torch.no_grad():
        logits = model(torch.tensor([asked["prompts"][-1]])).logits.float()
    texts = [greedy(model, prompt, asked["tokens"]) for prompt in asked["prompts"]]
    return Ours(texts, logits, digest(weights), model)


def compare(reader: str, found: Mapping[str, Any], ours: Ours, tokenizer: Any) -> bool:
    """Print what a reader's texts and logits have of ours; whether the texts are the same."""
    print(f"{reader}: {found['dtype']}, {found['versions']}")
    if "weights" in found:
        print(f"  weights: {'bit by bit ours' if found['weights'] == ours.weights else 'not ours'}")
    if "dense" in found:
        dense = torch.load(found["dense"])
        share = ours.furthest(dense)
        print(f"  weights: {len(dense)} layers, {share:.1e} of a layer's largest apart at most")
    if "logits" in found:
        theirs = torch.load(found["logits"]).float()
        largest = (theirs - ours.logits).abs().max() / ours.logits.abs().max()
        print(f"  logits: {float(largest):.1e} of the largest apart at most")
    texts = found["greedy"] if "greedy" in found else found["texts"]
    equal = True
    for text, other in zip(ours.texts, texts, strict=True):
        common = equal_tokens(text.ids, other, tokenizer)
        told = f"  text: {common} of {len(text.ids)} tokens equal"
        if common < len(text.ids):
            equal = False
            told += f"; our next leads its second by {text.leads[common]:.3f} nats"
        print(told, flush=True)
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, default=Path("out/consumers"))
    parser.add_argument("--tokens", type=int, default=32)
    for reader in FORMATS:
        parser.add_argument(f"--{reader}", metavar="PYTHON", help="of its environment")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(options.checkpoint)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    told = {"prompts": prompts, "tokens": options.tokens}
    asked = options.work / "asked.json"
    asked.write_text(json.dumps(told))
    ours: dict[str, Ours] = {}
    equal = True
    for reader, kind in FORMATS.items():
        if python := getattr(options, reader):
            path = exported(options.checkpoint, kind, options.work)
            found = read(reader, python, path, asked)
            dtype = found["dtype"]
            if dtype not in ours:
                ours[dtype] = ours_of(options.checkpoint, dtype, told)
            equal &= compare(reader, found, ours[dtype], tokenizer)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
