"""Trains the third model of docs/laboratory.md, a Qwen3 of 6.7 million parameters: an hour on one core.

    python -c "import nltk; [nltk.download(name, 'nltk_data') for name in ('abc', 'brown', 'inaugural', 'masc_tagged',
        'movie_reviews', 'state_union', 'webtext')]"
    python docs/benchmarks/qwen3/train.py nltk_data/corpora ../shared/data/text runs/qwen3/model

It reads raw text of NLTK's corpora, the first 90 % of the WikiText-2 train slice and the first half of the C4 slice.
"""

import json
import random
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm

STEPS, BATCH, LENGTH, WARMUP = 900, 16, 256, 50
CHARACTERS = 20_000
"""Documents are cut into parts of so many characters, which are shuffled."""

TAGS = {"brown": "/", "masc_tagged": "_"}
"""What stands between a word and its tag."""

SPACED = ("brown", "masc_tagged", "movie_reviews")
"""Corpora with spaces around punctuation."""


def documents(corpora: Path, texts: Path) -> Iterator[str]:
    """Yield all texts, part by part."""
    for name in ("brown", "movie_reviews", "abc", "state_union", "webtext", "inaugural", "masc_tagged"):
        archive = zipfile.ZipFile(corpora / f"{name}.zip")
        for file in archive.namelist():
            if file.endswith("/") or re.search(r"README|CONTENTS|cats\.txt|\.xml$|\.csv|categories", file):
                continue
            text = archive.read(file).decode("utf-8" if name in TAGS else "latin-1", "replace")
            if name in TAGS:
                lines = [[word.rsplit(TAGS[name], 1)[0] for word in line.split()] for line in text.splitlines()]
                text = "\n".join(" ".join(words) for words in lines if words)
            text = (tidied(text) if name in SPACED else text).strip()
            if len(text) > 200:
                yield from cut(text)
    wikitext = (texts / "wikitext2_train_slice.txt").read_text(encoding="utf-8")
    yield from cut(wikitext[: int(len(wikitext) * 0.9)])
    for line in (texts / "c4_slice.jsonl").read_text(encoding="utf-8").splitlines()[:150]:
        yield from cut(json.loads(line)["text"])


def tidied(text: str) -> str:
    """Return ``text`` without spaces around punctuation, and with plain quotation marks."""
    text = re.sub(r" ([.,;:!?')\]]|'s|n't|'re|'ve|'ll|'d|'m)", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    for mark in ("`` ", " ''", "``", "''"):
        text = text.replace(mark, '"')
    return text


def cut(text: str) -> list[str]:
    """Return ``text`` in parts."""
    return [text[start : start + CHARACTERS] for start in range(0, len(text), CHARACTERS)]


def tokenizer_of(parts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of 4,096 tokens that is trained on ``parts``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        parts, trainers.BpeTrainer(vocab_size=4096, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token=None)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about the nearest matrix whose singular values are 1, by five steps of Newton and Schulz (Muon)."""
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    found = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = found @ found.T
        found = 3.4445 * found + (-4.7750 * gram + 2.0315 * gram @ gram) @ found
    return found if wide is matrix else found.T


def main(corpora: str, texts: str, output: str) -> None:
    """Train the model and write it to the folder ``output``."""
    parts = list(documents(Path(corpora), Path(texts)))
    random.Random(0).shuffle(parts)
    tokenizer = tokenizer_of(parts)
    stream = torch.tensor([token for part in parts for token in [*tokenizer(part).input_ids, tokenizer.eos_token_id]])
    rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    torch.manual_seed(0)
    rows = rows[torch.randperm(len(rows))]
    config = transformers.Qwen3Config(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    matrices = [one for name, one in model.named_parameters() if one.ndim == 2 and "embed" not in name]
    rest = [one for name, one in model.named_parameters() if one.ndim != 2 or "embed" in name]
    means = {one: torch.zeros_like(one) for one in matrices}
    optimizers = [
        torch.optim.SGD(matrices, lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    # The rates rise, stay, and fall to 0 over the second half.
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / WARMUP, (STEPS - step) / (0.5 * STEPS), 1.0)
        )
        for optimizer in optimizers
    ]
    with tqdm(total=STEPS, unit="step") as bar:
        for step in range(STEPS):
            batch = rows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(rows)]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            for one, mean in means.items():
                mean.lerp_(one.grad, 0.05)
                one.grad.copy_(orthogonal(one.grad.lerp(mean, 0.95)) * 0.2 * max(one.shape) ** 0.5)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
