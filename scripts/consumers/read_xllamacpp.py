"""llama.cpp through xllamacpp, without rotq: texts of a GGUF file."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import xllamacpp


def main():
    asked = json.loads(Path(sys.argv[2]).read_text())
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers = 0
    server = xllamacpp.Server(params)
    shared = {"max_tokens": asked["tokens"], "temperature": 0, "cache_prompt": False}
    texts = [
        server.handle_completions({"prompt": prompt, **shared})["choices"][0]["text"]
        for prompt in asked["prompts"]
    ]
    # activations are in fp32, but for the 8 bits in which they are multiplied
    told = {"texts": texts, "dtype": "float32", "versions": f"xllamacpp {version('xllamacpp')}"}
    Path(sys.argv[3]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
