"""One spelling for one meaning: what the judge matches on, instead of the answer as written."""

from __future__ import annotations

import re
import unicodedata

CODE = "<code>"
"""Stands for a code fence in normalised text."""

_QUOTES = str.maketrans({**dict.fromkeys("‘’‛ʼ`´′", "'"), **dict.fromkeys("“”„‟«»″", '"')})
_DASHES = re.compile("[‐‑‒–—―]")
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
_CONTRACTIONS = [
    (re.compile(r"\bcan(?:'t|t\b| not\b)"), "cannot"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"\bshan't\b"), "shall not"),
    (re.compile(r"\b(do|does|did|would|should|could)nt\b"), r"\1 not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"\b(?:i'm|im)\b"), "i am"),
    (re.compile(r"\blet's\b"), "let us"),
    (re.compile(r"\b(it|that|this|there|what|here|who|how)'s\b"), r"\1 is"),
    (re.compile(r"'re\b"), " are"),
    (re.compile(r"'ve\b"), " have"),
    (re.compile(r"'ll\b"), " will"),
    (re.compile(r"\b(i|we|you|it|that|they)'d\b"), r"\1 would"),
]
_LABEL = re.compile(
    r"(?:assistant|ai|answer|response|reply|output|bot|chatbot|model|system|a|\w{0,16}gpt)\s*:\s*"
)
_TAG = re.compile(r"\[[^\]\n]{0,40}\]|\([^)\n]{0,40}\)|<\|?\w{1,20}\|?>")


def normalise(answer: str) -> str:
    """Lower case, NFKC, straight quotes, contractions written out, no Markdown emphasis.

    Line breaks survive (lists need them), code fences become ``CODE``, a finished
    ``<think>`` block, leading marks, tags such as ``[CLASSIC]`` and a speaker's label go.
    """
    text = _THINKING.sub("", unicodedata.normalize("NFKC", answer))
    text = text.replace("```", f"\n{CODE}\n").translate(_QUOTES)
    text = _DASHES.sub("-", text).lower()
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cf", "Cc"))
    text = re.sub(r"[*_#~]+", "", text)
    for pattern, spelt_out in _CONTRACTIONS:
        text = pattern.sub(spelt_out, text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n[ \n]*", "\n", text)
    return _without_label(_unwrapped(_without_label(text.strip())))


def _without_label(text: str) -> str:
    """Drop leading marks, bracketed tags and speaker labels, however many there are."""
    while True:
        shorter = text
        if not shorter.startswith(CODE):
            shorter = re.sub(r"^[^\w\"'\[(<]+", "", shorter)
            for pattern in (_TAG, _LABEL):
                if match := pattern.match(shorter):
                    shorter = shorter[match.end() :]
        if shorter == text:
            return text
        text = shorter


def _unwrapped(text: str) -> str:
    """An answer that is one quotation (closed at its end, or cut off) loses its quotes."""
    if text.startswith('"') and text.find('"', 1) in (-1, len(text) - 1):
        return text.strip('"')
    return text


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans of the sentences of normalised `text`; a line break ends one as well."""
    spans, start = [], 0
    for match in re.finditer(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bdr)(?<!\bmr)[.!?]+[\"')]*\s+|\n", text):
        if text[start : match.end()].strip():
            spans.append((start, match.end()))
        start = match.end()
    if text[start:].strip():
        spans.append((start, len(text)))
    return spans
