"""Which font of this machine has the letters of some texts. Matplotlib's own has Latin, Greek and Cyrillic ones."""

from __future__ import annotations

import re
from collections.abc import Iterable

DEFAULT = "DejaVu Sans"
# families that have Chinese, Japanese and Korean letters, on Linux, macOS and Windows
_WIDE = re.compile(r"CJK|Source Han|WenQuanYi|Droid Sans Fallback|Hei|YaHei|PingFang|Arial Unicode|Gothic|Unifont")


def font_for(texts: Iterable[str]) -> str | None:
    """The name of a font family that has every letter of `texts`, None when no font at hand has."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    letters = {ord(letter) for text in texts for letter in text if not letter.isspace()}
    entries = font_manager.fontManager.ttflist
    wide = sorted({(entry.name, entry.fname) for entry in entries if _WIDE.search(entry.name)})
    own = font_manager.findfont(DEFAULT, fallback_to_default=True)
    for name, path in ((DEFAULT, own), *wide):
        if letters <= FT2Font(path).get_charmap().keys():
            return name
    return None
