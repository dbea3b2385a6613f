"""Tests of the plugin: those in ``engine`` need vLLM, and run by ``make vllm``."""

from importlib.util import find_spec

collect_ignore = ["engine"] if find_spec("vllm") is None else []
