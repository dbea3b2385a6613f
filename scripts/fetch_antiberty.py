"""Make a checkpoint folder of AntiBERTy, an antibody model inside the package ``antiberty``.

    pip install --no-deps antiberty==0.1.3
    python scripts/fetch_antiberty.py models/antiberty

The package is only looked up, never imported. Its weights are a BertForMaskedLM with more heads
(species, chain, graft), which are left out; its vocabulary becomes a tokenizer that takes plain
sequences. Exit code 4 says that it is not installed. (Ruffolo et al., arXiv 2112.07782; MIT.)

Antibodies are needed too, and no open set of them can be had without a hub. ``heldout.fasta`` gets
ten real chains of scripts/antibodies.fasta. ``calibration.fasta`` gets sequences that the model
draws: from ten other chains, with half of the residues masked and drawn anew, five times over.
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from rotq.calibration.batches import bucketed
from rotq.calibration.fasta import Record
from rotq.calibration.residues import ResidueCodec
from rotq.calibration.sequences import read_proteins
from rotq.disk.filling import folder_to_fill
from rotq.errors import RotqError

ANTIBODIES = Path(__file__).with_name("antibodies.fasta")
DRAWN, ROUNDS, SHARE = 96, 5, 0.5
PACKAGE = "antiberty"
WEIGHTS = "AntiBERTy_md_smooth/pytorch_model.bin"
NOT_INSTALLED = 4
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def find(ending: str) -> Path | None:
    """A file of the installed package; None where it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if str(file).endswith(ending)), None)


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A token for each letter, [CLS] and [SEP] around them."""
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": word for name, word in SPECIAL.items()}
    )


def make_model(weights: Path) -> BertForMaskedLM:
    """The masked language model alone."""
    config = BertConfig.from_pretrained(weights.parent, local_files_only=True)
    config.architectures = ["BertForMaskedLM"]
    model = BertForMaskedLM(config)
    tensors = torch.load(weights, map_location="cpu", weights_only=True)
    wanted = model.state_dict()
    model.load_state_dict({name: tensors[name] for name in wanted})
    return model.eval()


@torch.inference_mode()
def draw(model: BertForMaskedLM, codec: ResidueCodec, starts: list[Record]) -> list[str]:
    """Sequences from the model itself, one seed for all."""
    generator = torch.Generator().manual_seed(0)
    residues = torch.tensor(sorted(codec.scored))
    letters = {id: letter for letter, id in codec.ids.items()}
    windows = [codec.encode(starts[n % len(starts)].sequence) for n in range(DRAWN)]
    found = []
    for batch in bucketed(windows, 16, codec.pad_id, frozenset()):
        ids_BT = batch.ids_BT
        for _ in range(ROUNDS):
            hide_BT = torch.isin(ids_BT, residues)
            hide_BT &= torch.rand(ids_BT.shape, generator=generator) < SHARE
            masked_BT = ids_BT.masked_fill(hide_BT, codec.mask_id)
            logits_BTV = model(input_ids=masked_BT, attention_mask=batch.mask_BT).logits
            p_MV = logits_BTV[hide_BT][:, residues].softmax(-1)
            ids_BT[hide_BT] = residues[torch.multinomial(p_MV, 1, generator=generator)[:, 0]]
        found += ["".join(letters[id] for id in row if id in letters) for row in ids_BT.tolist()]
    return found


def write_fasta(path: Path, sequences: dict[str, str]) -> None:
    lines = (f">{name}\n{sequence}\n" for name, sequence in sequences.items())
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    weights, vocab = find(WEIGHTS), find("vocab.txt")
    if weights is None or vocab is None:
        print(
            f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.3", file=sys.stderr
        )
        sys.exit(NOT_INSTALLED)
    try:
        folder = folder_to_fill(arguments.folder, "fetch_antiberty.py")
    except RotqError as error:
        sys.exit(f"fetch_antiberty.py: {error}")
    model, tokenizer = make_model(weights), make_tokenizer(vocab.read_text().split())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    records = read_proteins(ANTIBODIES).records
    starts = [record for record in records if record.description == "split=calibration"]
    drawn = draw(model, ResidueCodec(tokenizer), starts)
    named = {f"drawn-{number}": sequence for number, sequence in enumerate(drawn)}
    write_fasta(folder / "calibration.fasta", named)
    held_out = {r.name: r.sequence for r in records if r.description == "split=heldout"}
    write_fasta(folder / "heldout.fasta", held_out)
    print(arguments.folder)


if __name__ == "__main__":
    main()
