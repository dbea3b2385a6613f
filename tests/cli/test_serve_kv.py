"""`rotq serve-kv` as a process, with real checkpoints; `rotq bench serve`."""

import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from fork_server import Fork, ForkServer
from tiny_checkpoints import W4, write_checkpoint
from tiny_jobs import load_script
from tiny_served import byte_tokenizer, served_model

from rotq.cli import serve_kv
from rotq.cli.main import main
from rotq.kv import PackedCache
from rotq.kv.calibration.calibrate import calibrate, data_oblivious
from rotq.kv.presets import preset
from rotq.serve.settings import Settings, parse_size

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("facts", "ending"),
    [
        ({"cuda_graph": False, "cuda_graph_refused": None}, "passes of 4"),
        ({"cuda_graph": True, "cuda_graph_refused": None}, "steps in a CUDA graph"),
        (
            {"cuda_graph": False, "cuda_graph_refused": "it waits"},
            "steps in no CUDA graph: it waits",
        ),
    ],
)
def test_the_ready_line_says_why_there_is_no_graph(facts: dict[str, Any], ending: str) -> None:
    of_all = {
        "model": "m",
        "kv": "k3v3",
        "page_bits_per_element": 3.25,
        "capacity_tokens": 64,
        "max_batch": 4,
        "rows": 4,
        "warm_up_seconds": None,
    }
    assert serve_kv._ready_line("http://a", of_all | facts, False).endswith(ending)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    served_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class Server:
    """One that takes requests."""

    facts: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.facts["address"])

    def ask(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        asked = {"model": self.facts["model"], "prompt": "Hello", "temperature": 0, **body}
        return httpx.post(f"{self.url}/v1/completions", json=asked, headers=headers, timeout=60)


class Process(Server):
    """One in a process of its own."""

    def __init__(self, process: Fork) -> None:
        self.process = process
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr and self.process.stderr.read()
        self.facts = json.loads(line)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and what was said on stderr."""
        self.process.send_signal(number)
        _, said = self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, said

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/stats").json()
        return found


def unread_stream(server: Process, body: dict[str, Any]) -> socket.socket:
    """A connection whose answer has begun, and that nobody reads."""
    address = httpx.URL(server.url)
    held = socket.create_connection((address.host, address.port))
    content = json.dumps({"model": server.facts["model"], **body}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
        f"\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    held.sendall(head.encode() + content)
    assert held.recv(15) == b"HTTP/1.1 200 OK"
    return held


@contextmanager
def serving(
    forks: ForkServer, folder: Path, *arguments: str, **environment: str
) -> Iterator[Process]:
    command = ["serve-kv", str(folder), "--port", "0", "--json", "--kv-memory", "2MiB", *arguments]
    process = forks.start("rotq", command, **environment)
    try:
        yield Process(process)
    finally:
        process.kill()
        process.communicate()


Asked = Callable[..., tuple[httpx.Response, str]]


@pytest.fixture
def asked_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """What the command answers in this process, and what it says on stderr until SIGTERM."""
    with ThreadPoolExecutor(1) as pool:

        def asked(folder: Path, *arguments: str, **body: Any) -> tuple[httpx.Response, str]:
            found: list[Future[httpx.Response]] = []

            def once(address: str, facts: dict[str, Any], _: bool) -> str:
                server = Server()
                server.facts = {"address": address, **facts}
                found.append(pool.submit(server.ask, **body))
                found[0].add_done_callback(lambda _: os.kill(os.getpid(), signal.SIGTERM))
                return ""

            monkeypatch.setattr(serve_kv, "_ready_line", once)
            command = ["serve-kv", folder, "--port", "0", "--kv-memory", "2MiB", *arguments]
            result = run(*command)
            assert result.exit_code == 0, result.stderr
            return found[0].result(), result.stderr

        yield asked


def test_it_serves_and_drains(folder: Path, fresh_processes: ForkServer) -> None:
    """On the loopback, under another name, with a key from the environment."""
    name = ["--model-name", "other"]
    with serving(fresh_processes, folder, *name, ROTQ_API_KEY="right") as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert server.facts["model"] == "other"
        assert server.facts["kv"] == "k3v3"
        assert server.ask().status_code == 401
        key = {"authorization": "Bearer right"}
        assert server.ask(key, max_tokens=3).is_success
        found: list[httpx.Response] = []
        body = {"max_tokens": 200, "ignore_eos": True}
        thread = threading.Thread(target=lambda: found.append(server.ask(key, **body)))
        thread.start()
        while httpx.get(f"{server.url}/stats", headers=key).json()["running"] == 0:
            time.sleep(0.01)
        code, said = server.end()
        thread.join()
        assert code == 0
        assert found[0].json()["usage"]["completion_tokens"] == 200
        assert server.facts["calibrated"]
        assert "Traceback" not in said


def test_what_does_not_end_in_time_gets_an_error(folder: Path, fresh_processes: ForkServer) -> None:
    dense = ["--drain-timeout", "0.2", "--kv", "dense"]
    with serving(fresh_processes, folder, *dense) as server:
        assert server.facts["kv"] == "dense"
        found: list[httpx.Response] = []
        body = {"max_tokens": 600, "ignore_eos": True, "n": 16}
        threads = [threading.Thread(target=lambda: found.append(server.ask(**body)))]
        threads[0].start()
        while httpx.get(f"{server.url}/stats").json()["running"] == 0:
            time.sleep(0.01)
        code, said = server.end(signal.SIGINT)
        threads[0].join()
        assert code == 0
        assert found[0].status_code == 503
        assert found[0].json()["error"]["code"] == "shutting_down"
        assert "Traceback" not in said


@pytest.mark.parametrize("key", ["", "  ", "secret\n", " secret"])
def test_a_key_that_nobody_can_send_is_refused(
    folder: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROTQ_API_KEY", key)
    result = run("serve-kv", folder)
    assert result.exit_code == 2
    assert "ROTQ_API_KEY" in result.stderr.splitlines()[-1]
    assert "secret" not in result.stderr


def masked(path: Path) -> Path:
    config = transformers.BertConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.BertForMaskedLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("command", [["serve-kv"], ["bench", "serve"]], ids=" ".join)
@pytest.mark.parametrize("kv", ["k3v3", "dense"])
def test_a_masked_model_is_refused(tmp_path: Path, command: list[str], kv: str) -> None:
    result = run(*command, masked(tmp_path / "bert"), "--kv", kv)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert "is a masked language model" in last


def saved(path: Path, **changes: Any) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}
    config = transformers.LlamaConfig(vocab_size=258, **{**sizes, **heads, **changes})
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_advice_works(tmp_path: Path, asked_here: Asked) -> None:
    """A head width that no packed cache has: what the refusal says to do can be done."""
    path = saved(tmp_path / "narrow")
    result = run("serve-kv", path)
    assert result.exit_code == 1
    assert "--kv dense serves it" in result.stderr.splitlines()[-1]
    assert asked_here(path, "--kv", "dense", max_tokens=2)[0].is_success
    # and where it could not, nothing is advised
    heads = {"num_attention_heads": 3, "num_key_value_heads": 2, "hidden_size": 48}
    uneven = saved(tmp_path / "uneven", **heads)
    result = run("serve-kv", uneven)
    assert result.exit_code == 1
    assert "--kv dense" not in result.stderr


@pytest.mark.parametrize("command", [("serve-kv",), ("bench", "serve")])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv", "nope"], "no KV preset"),
        (["--kv", "k3v3,k3v3"], "named twice"),
        (["--kv", "kv2.5,kv2.50"], "named twice"),
        (["--kv", "k3v3,dense,dense"], "named twice"),
        (["--kv", "dense", "--sinks", "2"], "no --sinks"),
        (["--kv", "dense", "--kv-calibration", "none"], "no calibration"),
        (["--kv", "k3v3", "--sinks", "2000"], "sinks"),
    ],
)
def test_caches_are_refused_before_the_model_is_looked_for(
    command: tuple[str, ...], options: list[str], message: str
) -> None:
    result = run(*command, "no/such/model", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("sinks", [0, 1])
def test_a_server_keeps_as_many_sinks_whole_as_asked(
    folder: Path, sinks: int, asked_here: Asked
) -> None:
    chosen = ["--kv", "k2v2", "--kv-calibration", "none", "--sinks", str(sinks)]
    body = {"prompt": "a cat sat on the mat" * 2, "max_tokens": 8, "ignore_eos": True}
    answer, _ = asked_here(folder, *chosen, **body)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    spec = dataclasses.replace(preset("k2v2"), sinks=sinks)
    cache = PackedCache(model, data_oblivious(model.config, spec))
    assert cache.calibration.sinks == sinks
    ids = torch.tensor([byte_tokenizer()("a cat sat on the mat" * 2)["input_ids"]])
    written = model.generate(
        ids, past_key_values=cache, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    text = byte_tokenizer().decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.json()["choices"][0]["text"] == text


def test_results_that_round_keys_and_values_are_served(tmp_path: Path, asked_here: Asked) -> None:
    path = saved(tmp_path / "model", head_dim=16, num_key_value_heads=2)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 100)
    small = ["--num-samples", "2", "--seq-len", "32", "--calibration", str(text)]
    made = run("quantize", path, "-c", "quarot-w4a4kv4", "-o", tmp_path / "out", *small)
    assert made.exit_code == 0, made.stderr
    for kv in ("k3v3", "dense"):
        answer, said = asked_here(tmp_path / "out", "--kv", kv, max_tokens=2)
        assert answer.is_success
        assert ("in place of the model's own rounding" in said) == (kv != "dense")
        assert "calibrate-kv" not in said


@pytest.mark.parametrize("signals", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGINT] * 4])
def test_more_signals_end_it_without_a_traceback(
    folder: Path, signals: list[int], fresh_processes: ForkServer
) -> None:
    """Streams are under way, of which one has a client that does not read."""
    body = {"prompt": "a", "max_tokens": 600, "stream": True, "ignore_eos": True, "n": 8}
    with serving(fresh_processes, folder, "--drain-timeout", "60", "--kv", "dense") as server:
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(server.ask(**body)))
        thread.start()
        held = unread_stream(server, body | {"n": 1})
        while sum(server.stats()[name] for name in ("running", "waiting")) < 9:
            time.sleep(0.01)
        for number in signals[:-1]:
            server.process.send_signal(number)
            time.sleep(0.3)
        began = time.monotonic()
        code, said = server.end(signals[-1])
        thread.join()
        held.close()
        assert time.monotonic() - began < 20
        # one that comes when all is over finds a process that has no ears for it
        assert code in ((0,) if len(signals) == 2 else (0, -signals[-1])), said
        assert "Traceback" not in said
        assert "CancelledError" not in said
        assert "shutting_down" in found[0].text


@pytest.mark.parametrize("format", ["compressed-tensors", "rotq"])
def test_packed_checkpoints(tmp_path: Path, format: str) -> None:
    """Its greedy text is that of the dense model with the same weights."""
    from tiny_served import Listener, generation

    from rotq.checkpoint.load import load_model
    from rotq.serve.engine.build import build_engine

    written = write_checkpoint(tmp_path, grids=(W4,), format=format)
    found = []
    for model in (load_model(written.path), written.dense):
        calibration = data_oblivious(model.config, preset("k3v3"))
        engine = build_engine(model, calibration, Settings(kv_memory=1 << 20, max_batch=2))
        engine.start()
        listener = Listener()
        engine.submit([generation([5, 6, 7], 20, listener)])
        listener.wait()
        engine.close()
        found.append([item.token for event in listener.events for item in event.piece.picked])
    assert found[0] == found[1]
    assert len(set(found[0])) > 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--kv", "k9"], 2, ["k9"]),
        (["--kv", "k3v3,k4v3"], 2, ["one scheme"]),
        (["--kv-memory", "much"], 2, ["much"]),
        (["--kv-memory", "1KiB"], 1, ["hold no page"]),
        (["--max-length", "9999"], 1, ["9999", "640"]),
        (
            ["--kv", "turboesm", "--kv-calibration", "none"],
            1,
            ["does not exist without calibration"],
        ),
        (["--kv", "dense", "--kv-calibration", "x"], 2, ["no calibration"]),
        (["--kv-calibration", "missing"], 1, ["missing"]),
        (["--host", "300.1.1.1", "--port", "0"], 1, ["300.1.1.1"]),
        (["--device", "cuda"], 1, ["cuda"]),
        (["--request-timeout", "0"], 2, ["request-timeout"]),
        (["--request-timeout", "nan"], 2, ["request_timeout"]),
        (["--drain-timeout", "nan"], 2, ["drain_timeout"]),
        (["--drain-timeout", "inf"], 2, ["drain_timeout"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_wrong_usage(folder: Path, arguments: list[str], code: int, words: list[str]) -> None:
    result = run("serve-kv", folder, *arguments)
    assert result.exit_code == code, result.stderr
    assert result.stderr.splitlines()[-1].startswith("rotq: error: ")
    assert all(word in result.stderr for word in words)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = run("serve-kv", tmp_path / "no")
    assert result.exit_code == 1
    assert "does not exist" in result.stderr


def test_a_missing_package_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = run("serve-kv", folder)
    assert result.exit_code == 1
    assert "pip install 'rotq[serve]'" in result.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 1 << 30),
        ("1.5MiB", 3 << 19),
        ("4GB", 4 * 10**9),
        ("10KB", 10**4),
        ("77", 77),
        ("77B", 77),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "1TiB", "nan", "inf", "1e999"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_bench(folder: Path) -> None:
    load = ["--requests", "3", "--clients", "2", "--prompt-tokens", "20", "--output-tokens", "4"]
    result = run("bench", "serve", folder, *load, "--kv-memory", "1MiB", "--json")
    assert result.exit_code == 0, result.stderr
    packed, dense = (json.loads(line) for line in result.stdout.splitlines())
    assert (packed["kv"], dense["kv"]) == ("k3v3", "dense")
    assert packed["load"]["requests"] == 3
    assert packed["capacity_tokens"] > dense["capacity_tokens"]
    result = run("bench", "serve", folder, *load, "--kv", "dense", "--kv-memory", "1MiB")
    assert "between tokens, ms" in result.stdout
    assert run("bench", "serve", folder, "--kv", "dense,dense").exit_code == 2


def test_a_calibration_file_serves_other_bits_and_no_other_scheme(
    folder: Path, tmp_path: Path
) -> None:
    ids = torch.randint(2, 258, (2, 64), generator=torch.Generator().manual_seed(0))
    file = tmp_path / "kv.safetensors"
    calibrate(served_model(), ids, preset("k3v3")).save(file)
    load = ["--requests", "1", "--prompt-tokens", "90", "--output-tokens", "3", "--json"]
    command = ["bench", "serve", folder, *load, "--kv-calibration", file, "--kv-memory", "1MiB"]
    result = run(*command, "--kv", "k4v3,dense")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "device: cpu\n"
    assert [json.loads(line)["kv"] for line in result.stdout.splitlines()] == ["k4v3", "dense"]
    result = run("serve-kv", folder, "--kv", "turboesm", "--kv-calibration", file)
    assert result.exit_code == 1
    assert "does not serve turboesm" in result.stderr


def test_a_short_soak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The script of the long one; see docs/serving.md for what that found."""
    load_script("train_tiny")
    soak = load_script("soak_serve")
    arguments = ["--seconds", "3", "--clients", "24", "--queue", "6", "--growth", "0.5"]
    monkeypatch.setattr(sys, "argv", ["soak_serve.py", *arguments])
    monkeypatch.chdir(ROOT)
    servers, start = [], soak.start

    def started(*given: Any) -> Any:
        servers.append(start(*given))
        return servers[0]

    monkeypatch.setattr(soak, "start", started)
    with pytest.raises(SystemExit) as end:
        soak.main()
    servers[0][0].stdout.close()
    shown = capsys.readouterr()
    assert end.value.code == 0, shown.out + shown.err
    found = json.loads(shown.out)
    assert found["problems"] == []
    assert found["outcomes"]["stream"] > 0
    assert found["outcomes"]["429"] > 0


def test_the_soak_knows_what_is_wrong() -> None:
    load_script("train_tiny")
    soak = load_script("soak_serve")
    tally = soak.Tally(answers={"x": {"a", "b"}}, problems=["lost"])
    stats = {"running": 1, "waiting": 0, "rss_warm": 100, "rss_end": 120}
    assert len(soak.judge(tally, stats, exit_code=1, growth=0.05)) == 5
    clean = {"running": 0, "waiting": 0, "rss_warm": 100, "rss_end": 104}
    assert soak.judge(soak.Tally(answers={"x": {"a"}}), clean, exit_code=0, growth=0.05) == []
