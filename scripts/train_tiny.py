"""Train a tiny Llama on the text that ships with Python: a real, if small, model for tests.

    python scripts/train_tiny.py out/tiny

Vocabulary, weights and batches come from fixed seeds, and one thread does the arithmetic, so
one machine makes the same bytes each time. The sizes are awkward on purpose: 96 hidden units are
no power of two, 64 does not divide them, and the embedding is tied.
"""

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rotq.calibration.texts import read_text
from rotq.calibration.tokenized import tokenize
from rotq.disk.filling import folder_to_fill
from rotq.errors import RotqError

SEQ_LEN = 128
BATCH = 16


def make_tokenizer(text: str, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def make_model(vocab_size: int, num_layers: int = 3) -> LlamaForCausalLM:
    """An untrained model with seeded weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, ids_N: Tensor, steps: int) -> float:
    """AdamW with a linear warm-up and decay; returns the last loss in nats per token."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    warmup = max(1, steps // 10)
    model.train()
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        starts = torch.randint(0, ids_N.numel() - SEQ_LEN, (BATCH,), generator=generator)
        ids_BT = torch.stack([ids_N[start : start + SEQ_LEN] for start in starts.tolist()])
        share = min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
        optimizer.param_groups[0]["lr"] = 4e-3 * share
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return float(loss.detach())


def make_tiny(folder: Path, steps: int, num_layers: int = 3) -> float:
    """Train and save model and tokenizer; returns the last training loss.

    Raises:
        RotqError: the folder holds something else.
    """
    folder = folder_to_fill(folder, "train_tiny.py")
    text = read_text("pydoc")
    tokenizer = make_tokenizer(text.content)
    model = make_model(len(tokenizer), num_layers)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loss = train(model, tokenize(text, tokenizer), steps)
    torch.set_num_threads(num_threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    try:
        loss = make_tiny(arguments.folder, arguments.steps)
    except RotqError as error:
        sys.exit(f"train_tiny.py: {error}")
    print(f"{arguments.folder}: {arguments.steps} steps, last loss {loss:.3f} nats per token")


if __name__ == "__main__":
    main()
