"""A tokenizer.json from the pieces and scores of a SentencePiece BPE model, as llama2.c stores them.

Its algorithm: put a blank before the text, split into characters (what is no piece becomes its bytes), then join the
neighbours whose piece has the best score until none is left. As `tokenizers` writes it: BPE with byte fallback, whose
merges are all the ways to split a piece into two, in the order of the pieces' scores.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

__all__ = ["llama2c_encode", "write_tokenizer"]

_BYTES_FROM = 3
_PIECES_FROM = 259
_BOS = 1


def write_tokenizer(source: Path, path: Path) -> None:
    """Write `path`, a tokenizer.json that begins every text with token 1, from a JSON of "pieces" and "scores"."""
    from tokenizers import Tokenizer, models, normalizers, processors

    pieces, scores = _read(source)
    numbers = {piece: number for number, piece in enumerate(pieces)}
    splits = [
        (-scores[number], number, cut)
        for number, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if number >= _PIECES_FROM and piece[:cut] in numbers and piece[cut:] in numbers
    ]
    merges = [(pieces[number][:cut], pieces[number][cut:]) for _, number, cut in sorted(splits)]
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token=pieces[0], byte_fallback=True, fuse_unk=False))
    tokenizer.normalizer = normalizers.Prepend(" ")
    begin = pieces[_BOS]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, _BOS)])
    tokenizer.save(str(path))


def llama2c_encode(source: Path, text: str) -> list[int]:
    """Return the token numbers of `text` by the algorithm itself, slowly: the reference of the above."""
    pieces, scores = _read(source)
    numbers = {piece: number for number, piece in enumerate(pieces)}
    tokens: list[int] = []
    for character in " " + text:
        byte_tokens = [byte + _BYTES_FROM for byte in character.encode()]
        tokens += [numbers[character]] if character in numbers else byte_tokens
    while True:
        joined = [numbers.get(pieces[a] + pieces[b], -1) for a, b in itertools.pairwise(tokens)]
        best = max(range(len(joined)), key=lambda at: scores[joined[at]] if joined[at] >= 0 else -1e10, default=-1)
        if best < 0 or joined[best] < 0:
            return [_BOS, *tokens]
        tokens[best : best + 2] = [joined[best]]


def _read(source: Path) -> tuple[list[str], list[float]]:
    document = json.loads(source.read_text(encoding="utf-8"))
    return document["pieces"], document["scores"]
