"""Tokens that a GiB of vLLM's cache holds, whole and packed, by vLLM's own count: MODEL."""

import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    for dtype in ("float32", "bfloat16"):
        for asked in ({}, {"rotq_kv": "k3v3"}):
            llm = LLM(
                sys.argv[1],
                dtype=dtype,
                max_model_len=512,
                enforce_eager=True,
                block_size=128,
                max_num_seqs=8,
                additional_config=asked,
            )
            cache = llm.llm_engine.vllm_config.cache_config
            tokens = cache.num_gpu_blocks * cache.block_size
            print(f"{dtype} {asked or 'whole'}: {tokens} tokens", flush=True)
            llm.llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
