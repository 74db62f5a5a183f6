"""Answers that say nothing: loops, broken text, strings of symbols."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_LOOP_WORDS = 1000
"""How far back from the end a loop is looked for: the search is quadratic."""

_MOJIBAKE = re.compile(r"�|[ÃÂ][\u0080-¿]|â€|ï¿½|ðŸ")
_SYMBOLS_OK = re.compile(r"[0-9=+\-*/^<>()\[\]{}.,:;%$€£°√π∞≈≤≥×÷ \n\t]+")


def is_degenerate(answer: str) -> bool:
    """True for an answer (not blank) that is a loop, mojibake, or not made of words."""
    text = unicodedata.normalize("NFKC", answer).strip()
    return _is_loop(text) or _is_mojibake(answer) or _is_gibberish(text)


def _is_loop(text: str) -> bool:
    """The text is mostly one piece said again and again.

    A piece of one word counts from 6 repetitions in a row, a longer one from 3, and the run
    must cover half of the words; a line counts from 3 occurrences that are half of the lines.
    """
    compact = re.sub(r"\s+", "", text)
    run = re.search(r"(.{1,4}?)\1{11,}", compact)
    if run and not set(run[0]) <= set("-=_*.~|#^+0") and 2 * len(run[0]) >= len(compact):
        return True
    words = [re.sub(r"[^\w]", "", w.lower()) or w for w in text.split()[-_LOOP_WORDS:]]
    for period in range(1, len(words) // 3 + 1):
        same = 0
        longest = 0
        for i in range(period, len(words)):
            same = same + 1 if words[i] == words[i - period] else 0
            longest = max(longest, same)
        covered = longest + period
        if covered >= (6 if period == 1 else 3) * period and 2 * covered >= len(words) and longest:
            return True
    lines = [line.strip().lower() for line in text.splitlines() if any(map(str.isalpha, line))]
    if lines:
        most = Counter(lines).most_common(1)[0][1]
        if most >= 3 and 2 * most >= len(lines):
            return True
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(grams) >= 24 and len(set(grams)) < 0.4 * len(grams)


def _is_mojibake(text: str) -> bool:
    """Bytes decoded with the wrong table: three marks of it, or one in every ten characters."""
    marks = len(_MOJIBAKE.findall(text))
    return marks >= 3 or 10 * marks > len(text.strip())


def _is_gibberish(text: str) -> bool:
    """No letters or digits at all, or few words that a person could read aloud."""
    letters = sum(map(str.isalpha, text))
    if not letters:
        return not any(map(str.isdigit, text)) and not _only_mathematics(text)
    if len(_scripts(text)) >= 4:
        return True
    words = [w for w in re.findall(r"[^\W\d_]+", text) if len(w) > 1]
    if "```" in text or len(words) < 4:
        return len(text) >= 24 and letters < 0.25 * len(text) and not re.search(r"\d", text)
    readable = sum(map(_readable, words))
    return readable < 0.5 * len(words)


def _only_mathematics(text: str) -> bool:
    return len(text) > 1 and bool(re.search(r"[=<>√π∞]", text) and _SYMBOLS_OK.fullmatch(text))


def _scripts(text: str) -> set[str]:
    """Writing systems of the letters (Han, kana and Latin marks counted as one each)."""
    names = (unicodedata.name(c, "UNKNOWN").split()[0] for c in text if c.isalpha())
    eastern = {"CJK": "EAST ASIAN", "HIRAGANA": "EAST ASIAN", "KATAKANA": "EAST ASIAN"}
    found = {eastern.get(name, name) for name in names}
    # Formulas borrow these two: they are no sign of a broken model.
    return found - {"GREEK", "MICRO", "MATHEMATICAL", "DOUBLE-STRUCK", "MODIFIER"}


def _readable(word: str) -> bool:
    """A word has a vowel, no five consonants in a row, and ends; other scripts always pass."""
    plain = unicodedata.normalize("NFD", word.lower())
    if not "a" <= plain[0] <= "z":
        return True
    letters = "".join(c for c in plain if "a" <= c <= "z")
    if len(letters) > 28 or re.search(r"[bcdfghjklmnpqrstvwxz]{6}", letters):
        return False
    return bool(re.search(r"[aeiouy]", letters)) or word.isupper() or len(letters) <= 3
