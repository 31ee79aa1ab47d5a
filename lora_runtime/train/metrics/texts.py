"""Metrics of written texts: sacreBLEU's BLEU and chrF, and perplexity."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA = re.compile("[\u3040-\u30ff]")
_CHINESE_SHARE = 0.3  # of the letters; a few names in Latin script do not make a text English
_KANA_SHARE = 0.1


def score_texts(predictions: Sequence[str], references: Sequence[str], tokenize: str | None = None) -> dict[str, float]:
    """`bleu` and `chrf` of the whole corpus, from 0 to 100, as `sacrebleu` prints them.

    `tokenize` is one of sacreBLEU's tokenizers; None asks `bleu_tokenizer`. There is one reference for each prediction,
    and one at least.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu = BLEU(tokenize=tokenize or bleu_tokenizer(references))
    return {
        "bleu": float(bleu.corpus_score(predictions, [references]).score),
        "chrf": float(CHRF().corpus_score(predictions, [references]).score),
    }


def bleu_tokenizer(references: Sequence[str]) -> str:
    """sacreBLEU's `zh` where the references are Chinese, `char` where they are Japanese, else its default, `13a`."""
    text = "".join(references)
    letters = sum(map(str.isalpha, text))
    if len(_KANA.findall(text)) > _KANA_SHARE * letters:
        return "char"
    return "zh" if len(_HAN.findall(text)) > _CHINESE_SHARE * letters else "13a"


def perplexity(sum_nll: float, num_tokens: int) -> float:
    """exp of the mean negative log likelihood (natural logarithm) of `num_tokens` predicted tokens."""
    assert num_tokens > 0
    try:
        return math.exp(sum_nll / num_tokens)
    except OverflowError:
        return math.inf
