"""Greedy answers, one by one, of vLLM with processes of its own: MODEL LENGTHS OPTIONS as JSON.

Prints one line: a list of answers, tokens and log probabilities.
"""

import json
import sys
from pathlib import Path

from vllm_engines import ask, engine, prompts_of


def main() -> None:
    model, lengths, options = sys.argv[1:]
    with engine(Path(model), **json.loads(options)) as llm:
        answers = [ask(llm, [prompt])[0] for prompt in prompts_of(*json.loads(lengths))]
    sys.stdout.write("\n" + json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
