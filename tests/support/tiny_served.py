"""A tiny model with tokenizers made on the spot, and a server over it in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import uvicorn
from tiny_models import _LLAMA, CONFIGS, _randomize
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.presets import preset
from rotq.serve.engine.build import build_engine
from rotq.serve.engine.engine import Engine
from rotq.serve.engine.generation import Event, Generation
from rotq.serve.engine.sampling import Sampling
from rotq.serve.run import Served, build_server
from rotq.serve.settings import DENSE, Settings

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'developer' %}"
    "{{ raise_exception('no developers here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"
)
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so characters straddle tokens; 0 pads, 1 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<end>": 1} | {text: 2 + i for i, text in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        chat_template=TEMPLATE,
    )


def protein_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each amino acid, as causal protein models have; no chat template."""
    letters = {letter: 4 + i for i, letter in enumerate(AMINO_ACIDS)}
    special = {"<pad>": 0, "<end>": 1, "<start>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab=special | letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
    )


def served_model(
    name: str = "llama", *, vocab: int = 258, length: int = 640, dtype: torch.dtype = torch.float32
) -> Any:
    """A random model of ``tiny_models.CONFIGS`` with room for longer texts."""
    config_class, changes = CONFIGS[name]
    known = {**_LLAMA, **changes, "vocab_size": vocab, "max_position_embeddings": length}
    config = getattr(transformers, config_class)(**known, eos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        _randomize(model)
    return model.to(dtype).eval().requires_grad_(False)


def calibration_of(model: Any, kv: str) -> Any:
    """Data-oblivious constants of a preset; None for a dense cache."""
    return None if kv == DENSE else data_oblivious(model.config, preset(kv))


@contextmanager
def running_engine(model: Any, kv: str = "k3v3", **settings: Any) -> Iterator[Engine]:
    """An engine that is closed in the end."""
    rows = settings.pop("rows", None)
    limits = Settings(**{"kv_memory": 4 << 20, "max_batch": 6, "max_queue": 200, **settings})
    engine = build_engine(model, calibration_of(model, kv), limits, rows=rows)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


class Listener:
    """Takes the events of one sequence."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.last:
            self.over.set()

    def wait(self, seconds: float = 60) -> Event:
        assert self.over.wait(seconds), "the engine never ended the sequence"
        return self.events[-1]


def generation(
    prompt: list[int], max_tokens: int, listener: Callable[[Event], None], **options: Any
) -> Generation:
    """A greedy sequence whose log probabilities tell one bit from another."""
    sampling = options.pop("sampling", Sampling(temperature=0, logprobs=1))
    return Generation(
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        decode=lambda ids: "".join(chr(0x4E00 + token) for token in ids),
        emit=listener,
        **options,
    )


@dataclass
class Running:
    """A server that takes requests."""

    url: str
    served: Served
    errors: list[Exception]


@contextmanager
def running_server(
    model: Any,
    tokenizer: Any,
    kv: str = "k3v3",
    *,
    api_key: str | None = None,
    local: bool = False,
    **settings: Any,
) -> Iterator[Running]:
    """A server on a free port of the loopback; its model is called ``tiny``."""
    limits = Settings(**{"kv_memory": 8 << 20, "max_batch": 8, **settings})
    errors: list[Exception] = []
    served = build_server(
        model,
        tokenizer,
        calibration_of(model, kv),
        limits,
        name="tiny",
        api_key=api_key,
        local=local,
        on_error=errors.append,
    )
    # starting takes a second or two, which is what others can wait for with their first text
    if limits.request_timeout < 10:
        served.service.tokenization.start()
    config = uvicorn.Config(served.app, port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(url=f"http://127.0.0.1:{port}", served=served, errors=errors)
    finally:
        served.close()
        server.should_exit = True
        thread.join()
