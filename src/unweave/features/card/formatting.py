"""Numbers and text the way people read them. Pure functions, used as template filters."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

from markupsafe import Markup, escape

MISSING = "–"


def number(value: Any, digits: int = 3) -> str:
    """Three significant digits, thousands separated, no trailing noise.

    >>> number(12345678), number(0.012345), number(12.3456), number(None), number(-0.5)
    ('12,345,678', '0.0123', '12.3', '–', '−0.5')
    """
    if isinstance(value, bool) or value is None:
        return MISSING if value is None else str(value).lower()
    if isinstance(value, str):
        return value
    value = float(value)
    if not math.isfinite(value):
        return MISSING if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000 or value == int(value):
        text = f"{size:,.0f}"
    elif size < 10**-digits:
        mantissa, exponent = f"{size:.{digits - 2}e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        text = f"{size:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"−{text}" if value < 0 else text


def value(number_: Any) -> str:
    """An activation: two decimals, so that columns line up, and fewer for large ones.

    >>> value(3.14159), value(0.0042), value(-120.55), value(4036.3)
    ('3.14', '0.0042', '−120.5', '4,036')
    """
    number_ = float(number_)
    if not math.isfinite(number_):
        return MISSING
    size = abs(number_)
    if size and size < 0.1:
        text = f"{size:.2g}"
    else:
        text = f"{size:,.{2 if size < 100 else 1 if size < 1000 else 0}f}"
    return f"−{text}" if number_ < 0 else text


def percent(share: Any) -> str:
    """A share as a percentage with two or three significant digits.

    >>> percent(0.1234), percent(0.000456), percent(0), percent(1)
    ('12.3%', '0.046%', '0%', '100%')
    """
    if share is None or not math.isfinite(float(share)):
        return MISSING
    share = 100 * float(share)
    if share == 0 or share >= 99.95:
        return f"{share:.0f}%"
    if share < 1e-4:
        return f"{share:.0e}%".replace("e-0", "e-")
    decimals = 1 if share >= 1 else 1 - math.floor(math.log10(share))
    return f"{share:.{decimals}f}%"


def one_in(share: Any) -> str:
    """How often, in words: ``1 in 813 tokens``."""
    share = float(share)
    if not math.isfinite(share) or share <= 0:
        return "never"
    every = 1 / share
    return f"1 in {every:,.0f}" if every >= 9.5 else f"1 in {every:.1f}"


_GLYPHS = {"\n": "↵", "\r": "␍", "\t": "⇥", "\xa0": "⍽", "\xad": "‑"}


def _glyph(character: str) -> str | None:
    """What to show instead of a character that cannot be seen or would disturb the line; None to keep it."""
    if character in _GLYPHS:
        return _GLYPHS[character]
    code = ord(character)
    if code < 32:
        return chr(0x2400 + code)
    if code == 127:
        return "␡"
    # U+200D and U+200C join letters and emoji, so they stay
    if unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") and code not in (0x200C, 0x200D):
        return f"U+{code:04X}"
    return None


def visible(text: str) -> Markup:
    """Escaped text in which what cannot be seen can: line breaks, tabs, control and direction characters.

    >>> str(visible("a<b\\n"))
    'a&lt;b<i class="nl">↵</i>'
    """
    if text.isprintable():
        return escape(text)
    parts = []
    for character in text:
        glyph = _glyph(character)
        if glyph is None:
            parts.append(str(escape(character)))
        else:
            parts.append(f'<i class="{"nl" if character == chr(10) else "ch"}">{glyph}</i>')
    return Markup("".join(parts))


def direction(text: str) -> str:
    """``"rtl"`` when most letters are written from right to left, else ``"ltr"``.

    Browsers go by the first letter (``dir=auto``), which turns an English context around for one Arabic word.

    >>> direction("the word مرحبا"), direction("مرحبا بالعالم a")
    ('ltr', 'rtl')
    """
    if text.isascii():
        return "ltr"
    kinds = [unicodedata.bidirectional(character) for character in text]
    right = sum(kind in ("R", "AL") for kind in kinds)
    return "rtl" if right > kinds.count("L") else "ltr"


def chip(text: str) -> Markup:
    """A token alone, where a space at its start or end is shown as a dot.

    >>> str(chip(" cat"))
    '<i class="ch">·</i>cat'
    """
    inner = text.strip(" ")
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    dot = Markup('<i class="ch">·</i>')
    if not inner:
        return dot * len(text)
    return dot * before + visible(inner) + dot * after


def plain(text: str) -> str:
    """The same for places that take no markup (attributes, titles)."""
    return "".join(_glyph(c) or c for c in text)
