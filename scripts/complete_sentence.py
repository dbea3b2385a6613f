"""One sentence of each of several models, to be read beside each other: greedy, on the CPU.

python scripts/complete_sentence.py models/smollm2 out/smollm2-w3
"""

import argparse
import sys
from pathlib import Path

import torch

from rotq.checkpoint.gguf import read_once
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.errors import RotqError

PROMPT = "The capital of France is"


def complete(model: Path, prompt: str, tokens: int) -> str:
    """The prompt with what the model says next, on one line.

    Raises:
        RotqError: the model cannot be loaded.
    """
    with read_once(model):
        tokenizer, loaded = load_tokenizer(model), load_model(model, packed=False)
    given = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        # a model's own settings may ask for a sample
        ids_1T = loaded.generate(**given, max_new_tokens=tokens, do_sample=False)
    return " ".join(tokenizer.decode(ids_1T[0], skip_special_tokens=True).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    for model in arguments.models:
        try:
            print(f"{model}: {complete(model, arguments.prompt, arguments.tokens)}", flush=True)
        except RotqError as error:
            sys.exit(f"complete_sentence.py: {error}")


if __name__ == "__main__":
    main()
