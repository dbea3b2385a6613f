"""Train a small ESM-2 and a small causal protein model: real, if small, where no hub is reachable.

    python scripts/train_tiny_esm.py out/tiny-plm --fasta proteins.fasta

OUT gets ``esm`` (EsmForMaskedLM: rotary, LayerNorm, token dropout, tied head), ``causal``
(LlamaForCausalLM with the same vocabulary), ``calibration.fasta`` and ``heldout.fasta``. Weights,
split and batches come from fixed seeds, and one thread does the arithmetic, so one machine makes
the same bytes each time.

Minutes on a CPU are too few to learn proteins at large, so a few families are learned well. Two
sequences belong to one family if their sketches, the 16 least hashes of their 14-mers, meet;
families are joined transitively (single linkage). The largest families of proteins of moderate
length are taken, and from each some members are held out of whose 14-mers at most half occur in the
members that are trained on.

A masked residue enters ESM as the vector zero, so its first query is the bias alone. Where that
starts at zero, as usual, attention sees no positions, and what a single residue somewhere in the
window tells is next to nothing: training stays at the frequencies of residues (docs/log.md). So
each head starts by looking at one neighbour; see ``look_nearby``.
"""

import argparse
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    EsmConfig,
    EsmForMaskedLM,
    EsmTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.esm.configuration_esm import get_default_vocab_list

from rotq.calibration.batches import Batch, padded
from rotq.calibration.fasta import AMBIGUOUS, Record
from rotq.calibration.residues import ResidueCodec
from rotq.calibration.sequences import read_proteins
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.disk.filling import folder_to_fill
from rotq.errors import RotqError
from rotq.evaluation.perplexity import summed_nll, window_logits
from rotq.evaluation.pseudo_perplexity import PLLProtocol, evaluate_pll

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
STEPS = {"esm": 500, "causal": 150}
"""More teach the causal model its sequences by heart."""
WINDOWS = {"esm": (32, 66), "causal": (8, 258)}
"""Pieces of a step and their tokens: short for what is learned from neighbours; as long as what is
scored for the causal model, whose attention does not carry on beyond."""
LEARNING_RATE = 3e-3
MASKED = 0.3
"""Share of the residues that are asked for: more than ESM-2's 0.15, for more to learn in a step."""
SHARPNESS = 3.0
"""Of the first look at a neighbour; see ``look_nearby``."""
KMER, SKETCH = 14, 16
FAMILIES = 2
LARGEST, MEDIAN_LENGTH = 500, 400
"""Members of a family at the most (more are chained together, not related); residues."""
HELD_OUT, KNOWN = 0.25, 0.5
"""Share of a family that is held out at the most; share of a held-out member's k-mers that the
training members may have."""
SHORTEST = 40
"""Residues of the shortest sequence that is used."""


def split(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """(training, held out) of the largest families of short proteins."""
    wanted = [family for family in families(records) if _fits(family)]
    training: list[Record] = []
    held_out: list[Record] = []
    for family in sorted(wanted, key=len, reverse=True)[:FAMILIES]:
        apart = _apart(family)
        held_out += apart
        training += [record for record in family if record not in apart]
    return training, held_out


def families(records: Sequence[Record]) -> list[list[Record]]:
    """Sequences whose sketches meet, transitively."""
    parents = list(range(len(records)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    owner: dict[int, int] = {}
    for index, record in enumerate(records):
        for value in sketch(record.sequence):
            parents[root(index)] = root(owner.setdefault(value, index))
    found: dict[int, list[Record]] = {}
    for index, record in enumerate(records):
        found.setdefault(root(index), []).append(record)
    return list(found.values())


def _fits(family: Sequence[Record]) -> bool:
    lengths = sorted(len(record.sequence) for record in family)
    return len(family) <= LARGEST and lengths[len(lengths) // 2] <= MEDIAN_LENGTH


def _apart(family: Sequence[Record]) -> list[Record]:
    """Members that the others tell little enough about, in an order that is fixed and random."""
    apart: list[Record] = []
    for record in sorted(family, key=lambda record: _digest(record.sequence)):
        if len(apart) >= HELD_OUT * len(family):
            break
        others = [other for other in family if other not in apart and other is not record]
        known = set().union(*(kmers(other.sequence) for other in others))
        own = kmers(record.sequence)
        if len(own & known) <= KNOWN * len(own):
            apart.append(record)
    return apart


def kmers(sequence: str) -> set[str]:
    """Its pieces of KMER residues."""
    return {sequence[start : start + KMER] for start in range(len(sequence) - KMER + 1)}


def sketch(sequence: str) -> list[int]:
    """The least hashes of its k-mers."""
    return sorted(map(_digest, kmers(sequence)))[:SKETCH]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def usable(record: Record) -> bool:
    """Long enough, and without unknown residues."""
    return len(record.sequence) >= SHORTEST and not AMBIGUOUS & set(record.sequence)


def make_tokenizer(folder: Path) -> EsmTokenizer:
    """ESM-2's own vocabulary of 33 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vocab.txt"
    file.write_text("\n".join(get_default_vocab_list()), encoding="utf-8")
    return EsmTokenizer(str(file))


def make_models(codec: ResidueCodec) -> dict[str, PreTrainedModel]:
    """Untrained, with seeded weights."""
    tokenizer = codec.tokenizer
    shared = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": codec.pad_id}
    esm = EsmConfig(
        **shared,
        mask_token_id=codec.mask_id,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        layer_norm_eps=1e-5,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    causal = LlamaConfig(
        **shared,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    models = {"esm": EsmForMaskedLM(esm), "causal": LlamaForCausalLM(causal)}
    look_nearby(models["esm"])
    return models


@torch.no_grad()
def look_nearby(model: EsmForMaskedLM) -> None:
    """Let each head start at one neighbour: -1, 1 in the first layer of two heads, -2, 2 next.

    RoPE turns a query at position i by R(i) and a key at j by R(j), so what their biases q and k
    add to a score is q R(j - i) k. It is largest at j - i = d for k = R(-d) q. Modifies the biases
    of all queries and keys, which are free to leave it again.
    """
    for number, layer in enumerate(model.esm.encoder.layer):
        attention = layer.attention.self
        heads, width = attention.num_attention_heads, attention.attention_head_size
        order = torch.arange(number * heads, (number + 1) * heads)
        offset_H1 = ((order // 2 + 1) * (2 * (order % 2) - 1))[:, None]
        angle_HF = -offset_H1 * model.esm.rotary_embeddings.inv_freq
        key_HD = SHARPNESS * torch.cat((angle_HF.cos(), angle_HF.sin()), dim=1)
        query_HD = SHARPNESS * (torch.arange(width) < width // 2).repeat(heads, 1)
        attention.query.bias.copy_(query_HD.flatten())
        attention.key.bias.copy_(key_HD.flatten())


def draw(
    kind: str, records: Sequence[Record], codec: ResidueCodec, generator: torch.Generator
) -> Batch:
    """One batch of random pieces of random sequences."""
    number, room = WINDOWS[kind][0], WINDOWS[kind][1] - codec.num_special
    windows = []
    for index in torch.randint(0, len(records), (number,), generator=generator).tolist():
        sequence = records[index].sequence
        start = int(torch.randint(0, max(1, len(sequence) - room + 1), (), generator=generator))
        windows.append(codec.encode(sequence[start : start + room]))
    return padded(windows, codec.pad_id, frozenset(codec.around[0] + codec.around[1]))


def masked_loss(
    model: PreTrainedModel, batch: Batch, codec: ResidueCodec, generator: torch.Generator
) -> Tensor:
    """MASKED of the residues are asked for, and masked all of them."""
    shape = batch.ids_BT.shape
    asked_BT = torch.isin(batch.ids_BT, torch.tensor(sorted(codec.scored)))
    asked_BT &= torch.rand(shape, generator=generator) < MASKED
    input_BT = batch.ids_BT.masked_fill(asked_BT, codec.mask_id)
    mask_BT = torch.ones_like(input_BT) if batch.mask_BT is None else batch.mask_BT
    hidden_BTC = model.esm(input_ids=input_BT, attention_mask=mask_BT).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden_BTC[asked_BT]), batch.ids_BT[asked_BT])


def causal_loss(
    model: PreTrainedModel, batch: Batch, codec: ResidueCodec, generator: torch.Generator
) -> Tensor:
    """Each next token, padding left out."""
    label_BT = batch.ids_BT
    if batch.mask_BT is not None:
        label_BT = label_BT.masked_fill(batch.mask_BT == 0, -100)
    return model(input_ids=batch.ids_BT, labels=label_BT).loss


LOSSES = {"esm": masked_loss, "causal": causal_loss}


def train(
    kind: str, model: PreTrainedModel, records: Sequence[Record], codec: ResidueCodec, steps: int
) -> list[float]:
    """AdamW with linear warm-up and decay; the loss in nats per token at each step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    warmup = max(1, steps // 10)
    losses = []
    model.train()
    for step in range(steps):
        share = min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * share
        loss = LOSSES[kind](model, draw(kind, records, codec, generator), codec, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            print(f"{kind}: step {step + 1}, loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    model.eval()
    return losses


def write_fasta(path: Path, records: Sequence[Record]) -> None:
    """Sequences under their names."""
    lines = (f">{record.name} {record.description}\n{record.sequence}\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def make_tiny_plm(folder: Path, fasta: Path, steps: dict[str, int]) -> dict[str, list[float]]:
    """Split, train, save; returns the losses of both models."""
    folder = folder_to_fill(folder, "train_tiny_esm.py")
    records = [record for record in read_proteins(fasta).records if usable(record)]
    training, held_out = split(records)
    print(f"{len(training)} sequences to train on, {len(held_out)} held out")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses = {}
    codec = ResidueCodec(make_tokenizer(folder / "esm"))
    for kind, model in make_models(codec).items():
        losses[kind] = train(kind, model, training, codec, steps[kind])
        model.save_pretrained(folder / kind)
        make_tokenizer(folder / kind).save_pretrained(folder / kind)
    torch.set_num_threads(num_threads)
    write_fasta(folder / "calibration.fasta", training[:1024])
    write_fasta(folder / "heldout.fasta", held_out)
    return losses


def shuffled(records: Sequence[Record], generator: torch.Generator) -> list[Record]:
    """The same residues in random order."""
    return [
        Record(
            name=record.name,
            sequence="".join(
                record.sequence[index]
                for index in torch.randperm(len(record.sequence), generator=generator).tolist()
            ),
        )
        for record in records
    ]


def sanity(folder: Path) -> dict[str, dict[str, float]]:
    """(Pseudo-)perplexity of each model, and of the frequencies of residues, on real sequences."""
    held_out = read_proteins(folder / "heldout.fasta").records
    training = read_proteins(folder / "calibration.fasta").records
    some = {
        "held out": held_out[:32],
        "shuffled": shuffled(held_out[:32], torch.Generator().manual_seed(0)),
        "trained on": training[:: math.ceil(len(training) / 32)],
    }
    codec = ResidueCodec(load_tokenizer(folder / "esm"))
    esm, causal = (load_model(folder / kind) for kind in ("esm", "causal"))
    protocol = PLLProtocol(max_length=256, positions=16)
    share = frequencies(training)
    return {
        "frequencies": {name: frequency_perplexity(share, found) for name, found in some.items()},
        "esm": {
            name: evaluate_pll(esm, found, codec, protocol=protocol).masked
            for name, found in some.items()
        },
        "causal": {name: perplexity(causal, found, codec) for name, found in some.items()},
    }


def frequencies(records: Sequence[Record]) -> dict[str, float]:
    """Share of each letter."""
    counts = Counter("".join(record.sequence for record in records))
    return {letter: count / counts.total() for letter, count in counts.items()}


def frequency_perplexity(share: dict[str, float], records: Sequence[Record]) -> float:
    """Of a model that knows nothing else; letters without a share are left out."""
    letters = [x for record in records for x in record.sequence[:256] if x in share]
    return math.exp(-sum(math.log(share[letter]) for letter in letters) / len(letters))


@torch.inference_mode()
def perplexity(model: PreTrainedModel, records: Sequence[Record], codec: ResidueCodec) -> float:
    """Of the first 256 residues of each protein and what ends it."""
    nll, tokens = 0.0, 0
    for record in records:
        ids_T = torch.tensor(codec.encode(record.sequence[:256]))
        nll += summed_nll(window_logits(model, ids_T)[:-1], ids_T[1:])
        tokens += len(ids_T) - 1
    return math.exp(nll / tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fasta", type=Path, required=True)
    parser.add_argument("--steps", type=int, help=f"of each model; default: {STEPS}")
    arguments = parser.parse_args()
    steps = dict.fromkeys(STEPS, arguments.steps) if arguments.steps else STEPS
    try:
        losses = make_tiny_plm(arguments.folder, arguments.fasta, steps)
    except RotqError as error:
        sys.exit(f"train_tiny_esm.py: {error}")
    for kind, found in sanity(arguments.folder).items():
        print(f"{kind}: perplexity", ", ".join(f"{name} {x:.2f}" for name, x in found.items()))
    for kind, values in losses.items():
        first, last = (sum(part) / len(part) for part in (values[:20], values[-20:]))
        print(f"{kind}: loss {first:.3f} to {last:.3f} nats")


if __name__ == "__main__":
    main()
