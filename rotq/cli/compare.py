"""``rotq compare``: several checkpoints of one model in one table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.eval import scored_tokens
from rotq.cli.loading import choose, device_map, find, say_device, show
from rotq.cli.options import (
    ModelName,
    Seed,
    bos_option,
    device_option,
    model_options,
    output_options,
    text_option,
    window_options,
)

if TYPE_CHECKING:
    from rotq.checkpoint.location import Location


@click.command()
@click.argument("checkpoints", type=ModelName(), nargs=-1, required=True)
@click.option("--reference", type=ModelName(), required=True, help="The original model.")
@text_option
@window_options
@bos_option("auto")
@click.option(
    "--seed", type=Seed(), default=0, show_default=True, help="Of the draws behind intervals."
)
@device_option
@model_options
@output_options
def compare(
    checkpoints: tuple[str, ...],
    reference: str,
    text: str,
    windows: int,
    seq_len: int,
    bos: str,
    seed: int,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Size, perplexity and divergence of CHECKPOINTS, and how sure their order is.

    All are scored on the same windows as the original. The logarithm of a perplexity over another
    comes with its 95 % interval: an interval that holds 0 says that the two are not told apart.
    The same command gives the same figures.

    \b
    rotq compare out/w3 out/w4 --reference models/llama --text test.txt
    """
    from rotq.checkpoint.load import load_model
    from rotq.evaluation.comparison import compare_scores
    from rotq.evaluation.perplexity import Protocol, score_windows

    twice = sorted({name for name in checkpoints if checkpoints.count(name) > 1})
    if twice:
        raise click.UsageError(f"{twice[0]} is given twice")
    chosen = choose(device)
    places = [find(name) for name in checkpoints]
    original = find(reference)
    ids_N, protocol = scored_tokens(
        [original, *places],
        text,
        Protocol(windows=windows, seq_len=seq_len),
        bos=bos,
        trust_remote_code=trust_remote_code,
    )
    say_device(device, chosen)
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": device_map(chosen),
        "trust_remote_code": trust_remote_code,
    }
    theirs = load_model(original, **options)
    scores, costs = [], []
    for place in places:
        # one at a time: only its scores are kept
        model = load_model(place, **options)
        costs.append(_cost(place, model))
        score, described = score_windows(
            model,
            ids_N,
            protocol=protocol,
            reference=theirs,
            on_window=show(f"{place}: window"),
        )
        scores.append(score)
    compared = compare_scores(scores, described, seed=seed)
    report = {
        "reference": reference,
        "text": text,
        "checkpoints": [
            {"name": name, **cost, **one.to_dict()}
            for name, cost, one in zip(checkpoints, costs, compared, strict=True)
        ],
    }
    if as_json:
        click.echo(json.dumps(report))
        return
    from rotq.report.compare_tables import compare_table

    click.echo(compare_table(report), nl=False)


def _cost(place: Location, model: Any) -> dict[str, Any]:
    """Bytes of the weights, and bits and seconds where a job's report has them."""
    from rotq.checkpoint.gguf import find_gguf
    from rotq.checkpoint.inspection import read_checkpoint

    gguf = find_gguf(place.path)
    report = None if gguf is not None else read_checkpoint(place).report
    if report is None:
        stored = gguf.stat().st_size if gguf is not None else _stored(place, model)
        return {"bytes": stored, "bits_all_in": None, "bits": None, "seconds": None}
    return {
        "bytes": report.bytes,
        "bits_all_in": report.bits_per_weight_all_in,
        "bits": report.bits_per_weight,
        "seconds": report.seconds,
    }


def _stored(place: Location, model: Any) -> int:
    """Bytes of a dense checkpoint's tensors; of a pickled one as they are loaded."""
    from rotq.checkpoint.weight_files import find_entries, leading_name

    if leading_name(place.path, {file.name for file in place.path.iterdir()}) is None:
        return int(model.get_memory_footprint())
    return sum(entry.num_bytes for entry in find_entries(place.path))
