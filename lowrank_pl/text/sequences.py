"""Text as sequences of tokens: tokenised as one stream, cut without overlap, cached on disk."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase

from lowrank_pl.text.settings import Calibration
from lowrank_pl.text.sources import TextSource, parse_mixture, read_stream, source_identity
from lowrank_pl.utils.files import atomic_write, cache_root, sha256_of
from lowrank_pl.utils.tensor_store import DamagedError, verify_checksum, with_checksum

__all__ = [
    "Calibration",
    "count_overlapping",
    "sequences_fingerprint",
    "token_windows",
    "tokenizer_fingerprint",
    "uses_bos",
    "warn_of_overlap",
]

SEGMENT = 1 << 16  # Characters tokenised at a time.
CONTEXT = 1 << 11  # Characters on either side that are tokenised with them; their tokens are dropped.
CACHE_FORMAT = "2"
PROBE = "The quick brown fox"
PASSAGE = 32  # This many equal tokens in a row are the same passage, not just the same phrase.

_log = logging.getLogger(__name__)


def token_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, *, length: int, sequences: int | None = None
) -> Tensor:
    r"""Return ``text`` as sequences of tokens, int64 ``[sequences, length]``.

    The sequences are consecutive and do not overlap; with ``every=N``, every N-th of them is returned. Documents are
    joined by a blank line and tokenised as one string without special tokens. If the tokenizer puts a BOS before every
    text (:func:`uses_bos`), each sequence is that BOS and ``length - 1`` tokens of text. Only as much of the text is
    read as the sequences need. The result is cached under ``cache_root() / "tokens"``. The sequences of a mixture come
    from its texts in turn, so that more of them begin with the fewer.

    Args:
        text: Name of the text; see :mod:`lowrank_pl.text.sources`.
        tokenizer: Tokenizer of the model that will read the sequences.
        length: Tokens of a sequence, at least 2.
        sequences: Number of sequences; by default all of the text. If the text has fewer, all are returned, with a
            warning.

    Raises:
        ValueError: The text can't be read, is empty, or has fewer tokens than one sequence.

    >>> from lowrank_pl.models.tiny import byte_tokenizer
    >>> found = token_windows("python-docs", byte_tokenizer(), length=8, sequences=2)
    >>> bytes(found.flatten().tolist())
    b'The "assert" sta'
    """
    if length < 2 or (sequences is not None and sequences < 1):
        raise ValueError(f"length={length}, sequences={sequences} were given: expected length >= 2 and sequences >= 1")
    sources = parse_mixture(text)
    if len(sources) == 1:
        return _windows(sources[0], tokenizer, length, sequences)
    if sequences is None:
        parts = [_windows(source, tokenizer, length, None) for source in sources]
        order = _mixing_order([source.share for source in sources], [len(part) for part in parts], None)
    else:
        order, parts = _first_of_mixture(sources, tokenizer, length, sequences)
    if sequences is not None and len(order) < sequences:
        _log.warning("%d sequences were asked for, the texts of %r have %d together", sequences, text, len(order))
    counts = [order.count(place) for place in range(len(sources))]
    told = ", ".join(f"{count} of {source.text}" for count, source in zip(counts, sources, strict=True))
    _log.info("%d sequences of a mixture: %s", len(order), told)
    streams = [iter(part) for part in parts]
    return torch.stack([next(streams[place]) for place in order])


def _first_of_mixture(
    sources: Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, length: int, total: int
) -> tuple[list[int], list[Tensor]]:
    """Return which text each of the first ``total`` sequences of a mixture comes from, and the sequences of each text.

    A text from which none comes is read too, so that a mistake in it is found.
    """
    ends: list[int | None] = [None] * len(sources)
    while True:
        order = _mixing_order([source.share for source in sources], ends, total)
        counts = [order.count(place) for place in range(len(sources))]
        parts = [
            _windows(source, tokenizer, length, max(1, count)) for source, count in zip(sources, counts, strict=True)
        ]
        # Only reading a text tells where it ends.
        short = [place for place, part in enumerate(parts) if len(part) < counts[place]]
        if not short:
            return order, parts
        for place in short:
            ends[place] = len(parts[place])


def _mixing_order(shares: Sequence[int], ends: Sequence[int | None], total: int | None) -> list[int]:
    """Return which text each sequence of a mixture comes from.

    Args:
        shares: How many sequences each text gives when a text with a share of 1 gives one.
        ends: How many sequences each text has; None where that is not known.
        total: How many sequences are wanted; None for all.

    >>> _mixing_order([2, 1], [None, None], 6)
    [0, 0, 1, 0, 0, 1]
    >>> _mixing_order([1, 1], [1, None], 4)
    [0, 1, 1, 1]
    """
    taken, order = [0] * len(shares), list[int]()
    while total is None or len(order) < total:
        left = [place for place, end in enumerate(ends) if end is None or taken[place] < end]
        if not left:
            break
        place = min(left, key=lambda place: (taken[place] + 1) / shares[place])
        taken[place] += 1
        order.append(place)
    return order


def _windows(source: TextSource, tokenizer: PreTrainedTokenizerBase, length: int, sequences: int | None) -> Tensor:
    """Return the sequences of one text, from the cache if they are there; see ``token_windows``."""
    text = source.text
    key = sha256_of(
        CACHE_FORMAT, tokenizer_fingerprint(tokenizer), source_identity(source), str(length), str(sequences)
    )
    path = cache_root() / "tokens" / f"{key}.safetensors"
    found = _read_cache(path, length)
    if found is None:
        found = _packed(text, tokenizer, length, sequences, every=source.every)
        _write_cache(path, found)
    if sequences is not None and len(found) < sequences:
        _log.warning("%d sequences of %d tokens were asked for, text %r has %d", sequences, length, text, len(found))
    return found.long()


def uses_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer puts its BOS token before every text, as Gemma's and Llama's do.

    >>> from lowrank_pl.models.tiny import byte_tokenizer
    >>> uses_bos(byte_tokenizer()), uses_bos(byte_tokenizer(bos=True))
    (False, True)
    """
    ids = tokenizer(PROBE, add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of everything that determines how the tokenizer turns text and chats into tokens."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Both change with every call that pads or truncates, which no call here does.
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab(), **_options(tokenizer)}
    probe = tokenizer(PROBE, add_special_tokens=True)["input_ids"]
    return sha256_of(json.dumps([state, probe, tokenizer.bos_token_id, tokenizer.chat_template], sort_keys=True))


def _options(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the options of a slow tokenizer that may change its tokens, as JSON by name.

    They are arguments that its own class names: the others depend on where it was loaded from.
    """
    own = [kind for kind in type(tokenizer).__mro__ if not issubclass(PreTrainedTokenizer, kind)]
    made_by = [vars(kind)["__init__"] for kind in own if "__init__" in vars(kind)]
    named = {name for make in made_by for name in inspect.signature(make).parameters}
    options = {}
    for name in sorted(named & tokenizer.init_kwargs.keys()):
        value = tokenizer.init_kwargs[name]
        # Vocabulary and special tokens are in the fingerprint already. None may be added by saving and loading.
        if value is not None and name != "vocab" and not name.endswith(("_file", "_path", "_token", "_tokens")):
            with suppress(TypeError):
                options[f"option {name}"] = json.dumps(value, sort_keys=True)
    return options


def sequences_fingerprint(sequences: Tensor) -> str:
    """Return the SHA-256 of the tokens and the shape of ``sequences``.

    >>> sequences_fingerprint(torch.zeros(2, 3)) == sequences_fingerprint(torch.zeros(3, 2))
    False
    """
    return sha256_of(str(tuple(sequences.shape)), sequences.to(torch.int64).contiguous().cpu().numpy().tobytes())


def _read_cache(path: Path, length: int) -> Tensor | None:
    """Return the sequences cached at ``path``; None if there are none or the file is not as it was written."""
    if not path.is_file():
        return None
    try:
        verify_checksum(path)
        found = load(path.read_bytes())["windows"]
    except (DamagedError, SafetensorError, KeyError, OSError, ValueError) as error:
        _log.warning("token cache %s is damaged and is built again: %s", path, error)
        return None
    if found.dtype != torch.int32 or found.dim() != 2 or found.shape[1] != length or not len(found):
        _log.warning("token cache %s holds %s %s and is built again", path, found.dtype, list(found.shape))
        return None
    return found


def _write_cache(path: Path, sequences: Tensor) -> None:
    """Write the sequences to the cache; one that is not writable is no reason to stop."""
    try:
        atomic_write(path, with_checksum({"windows": sequences}))
    except OSError as error:
        _log.warning("the tokens can't be cached: %s", error)


def _packed(text: str, tokenizer: PreTrainedTokenizerBase, length: int, sequences: int | None, *, every: int) -> Tensor:
    """Return the sequences of the text, int32 ``[sequences, length]``."""
    bos = [tokenizer.bos_token_id] if uses_bos(tokenizer) else []
    room = length - len(bos)
    wanted = None if sequences is None else ((sequences - 1) * every + 1) * room
    segments: list[Tensor] = []
    count = 0
    with tqdm(total=wanted, desc=f"tokens of {text}", unit="tok", unit_scale=True, delay=2, leave=False) as bar:
        for ids in _token_stream(read_stream(text, tokenizer=tokenizer), tokenizer):
            segments.append(torch.tensor(ids, dtype=torch.int32))
            count += len(ids)
            bar.update(len(ids))
            if wanted is not None and count >= wanted:
                break
    if count == 0:
        raise ValueError(f"text {text!r} is empty")
    if count < room:
        raise ValueError(
            f"text {text!r} has {count} tokens, but one sequence needs {room}: give a longer text or a smaller length"
        )
    body = torch.cat(segments)[: count // room * room].view(-1, room)[::every][:sequences]
    return torch.cat([torch.tensor([bos] * len(body), dtype=torch.int32).view(len(body), len(bos)), body], dim=1)


def _token_stream(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield, in lists, the tokens of the joined pieces, the same as if they were tokenised at once.

    Tokens depend on the text on both sides, and some tokenizers put a space before each text. Every segment is
    therefore tokenised with its context, and only the tokens that begin inside the segment are taken.
    """
    buffer, settled = "", 0  # The tokens of the first `settled` characters of the buffer are taken.
    for piece in _split(pieces):
        buffer += piece
        end = len(buffer) - CONTEXT
        if end - settled < SEGMENT:
            continue
        end, ids = _tokens_between(buffer, settled, end, tokenizer)
        yield ids
        begin = max(0, end - CONTEXT)
        buffer, settled = buffer[begin:], end - begin
    if len(buffer) > settled:
        yield _tokens_between(buffer, settled, len(buffer) + 1, tokenizer)[1]


def _split(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces, split into parts of at most ``SEGMENT`` characters."""
    for piece in pieces:
        for begin in range(0, len(piece), SEGMENT):
            yield piece[begin : begin + SEGMENT]


def _tokens_between(buffer: str, begin: int, end: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[int]]:
    """Return where the tokens end, and the tokens that begin at a character in ``[begin, end)``."""
    if not tokenizer.is_fast:
        # Without offsets, cut at the end of a line, which tokens rarely cross.
        if end < len(buffer):
            end = buffer.rfind("\n", begin, end) + 1 or end
        return end, tokenizer(buffer[begin:end], add_special_tokens=False, verbose=False)["input_ids"]
    coded = tokenizer(buffer, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(coded["input_ids"], coded["offset_mapping"], strict=True)
    return end, [token for token, (start, _) in pairs if begin <= start < end]


def count_overlapping(
    sequences: Tensor, others: Iterable[Tensor], tokenizer: PreTrainedTokenizerBase | None = None
) -> int:
    """Return how many ``sequences`` have their middle passage in ``others`` too.

    Args:
        sequences: ``[sequences, length]`` token ids, for example of a text to score.
        others: Token ids to compare with, each ``[sequences, length]``, for example of the calibration text.
        tokenizer: The tokenizer of both, so that a BOS at the head of sequences is skipped. Without it, passages that
            go on across the BOS of ``others`` are not found.
    """
    bos = int(tokenizer is not None and uses_bos(tokenizer))
    streams = [part[:, bos:].flatten() for part in others]
    return sum(any(_contains(stream, sequence[bos:]) for stream in streams) for sequence in sequences)


def warn_of_overlap(sequences: Tensor, others: Iterable[Tensor], tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Log a warning if the text of some sequences to score is also used for calibration or learning.

    Args:
        sequences: ``[sequences, length]`` token ids to score.
        others: Token ids used for calibration or learning, each ``[sequences, length]``.
        tokenizer: The tokenizer of both.
        what: What the sequences to score are called in the warning.
    """
    count = count_overlapping(sequences, others, tokenizer)
    if count:
        _log.warning(
            "%d of %d %s hold text that is also learned from: their perplexity is too low", count, len(sequences), what
        )


def _contains(stream: Tensor, sequence: Tensor) -> bool:
    """Return whether ``stream`` contains the tokens in the middle of ``sequence``, in a row."""
    begin = max(0, (len(sequence) - PASSAGE) // 2)
    probe = sequence[begin : begin + PASSAGE]
    if not 0 < len(probe) <= len(stream):
        return False
    # Only where the first token stands are the others looked at.
    starts = (stream[: len(stream) - len(probe) + 1] == probe[0]).nonzero().squeeze(1)
    for place, token in enumerate(probe[1:], 1):
        starts = starts[stream[starts + place] == token]
    return len(starts) > 0
