"""`multilora train …`: fine-tuning from the command line, a command for each task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.private.settings import Privacy
from lora_runtime.train.rows.answer import AnswerSchema
from lora_runtime.train.rows.classify import ClassifySchema
from lora_runtime.train.rows.embed import EmbedSchema
from lora_runtime.train.rows.tokens import TokensSchema
from lora_runtime.train.tasks.options import (
    GENERATE_TEMPLATE,
    TRANSLATE_TEMPLATE,
    AnswerOptions,
    ClassifyOptions,
    EmbedOptions,
    PromptOptions,
    TaskOptions,
    TokensOptions,
)
from lora_runtime.types import Pooling, ProblemType
from server.train_cli.shared import DATA, trains

train_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Fine-tune LoRA adapters that this server loads.",
)


def _data(text: str, *flags: str, metavar: str | None = None, shown: bool | str = True) -> Any:
    return typer.Option(*flags, help=text, metavar=metavar, show_default=shown, rich_help_panel=DATA)


def _privacy(text: str, *flags: str) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel="Private training")


class ProblemName(StrEnum):
    """The problem types as they are typed on a command line."""

    SINGLE_LABEL = "single-label"
    MULTI_LABEL = "multi-label"
    REGRESSION = "regression"


_Chat = Annotated[bool, _data("The prompt is the user's message of the tokenizer's chat template.", "--chat")]
_System = Annotated[str | None, _data("The system's message before it; needs --chat.")]
_Fields = Annotated[
    list[str] | None,
    _data("The column of a field of the template, if it has another name; may be repeated.", metavar="FIELD=COLUMN"),
]
_Generation = Annotated[
    list[str] | None,
    _data("Default of sampling when the adapter is served; may be repeated.", metavar="NAME=VALUE"),
]


@train_app.callback()
def _group() -> None:  # pyright: ignore[reportUnusedFunction] - keeps the commands' own names
    """Fine-tune LoRA adapters that this server loads."""


@trains(train_app, "classify")
def classify(
    text_column: Annotated[str, _data("The text.")] = "text",
    pair_column: Annotated[str | None, _data("The second text of a pair. Default: text_pair, if there is one.")] = None,
    label_column: Annotated[str, _data("The label, or the number to predict.")] = "label",
    problem_type: Annotated[ProblemName, _data("What the labels are.")] = ProblemName.SINGLE_LABEL,
    separator: Annotated[str, _data("What joins the labels of a multi-label row.")] = "|",
    private: Annotated[
        bool,
        _privacy(
            "Train with differential privacy (DP-SGD, Opacus): the weights tell little of any one training row. The"
            " base, the labels' names and the number of rows count as public; metrics of the validation rows, and the"
            " choice of the best pass by them, are not covered.",
            "--private",
        ),
    ] = False,
    epsilon: Annotated[float | None, _privacy("How little, at most; the noise follows. Or --noise-multiplier.")] = None,
    noise_multiplier: Annotated[
        float | None, _privacy("Noise over the norm that gradients are cut to; ε follows.")
    ] = None,
    max_grad_norm: Annotated[float, _privacy("The norm that the gradient of a row is cut to.")] = 1.0,
    delta: Annotated[
        float | None, _privacy("The probability that ε does not hold. Default: 1 / (10 · training rows).")
    ] = None,
) -> TaskOptions:
    """Fine-tune a text classifier, and write its adapter folder.

    Reads CSV, TSV, JSONL, JSON or a folder of the library datasets. The pass with the best validation result is
    kept: by accuracy, by macro-F1 for multi-label rows, by mean squared error for regression. The folder appears
    when training has succeeded, never before.
    """
    kind = ProblemType[problem_type.name]
    privacy = Privacy(epsilon, noise_multiplier, max_grad_norm, delta) if private else None
    given = {"epsilon": epsilon, "noise_multiplier": noise_multiplier, "delta": delta}
    for name, value in given.items():
        if value is not None and not private:
            raise InvalidRequest(name, "has no meaning without private")
    return ClassifyOptions(ClassifySchema(text_column, pair_column, label_column, kind, separator), privacy)


@trains(train_app, "classify-tokens")
def classify_tokens(
    words_column: Annotated[str, _data("The list of words; CoNLL files have no columns to name.")] = "tokens",
    tags_column: Annotated[str | None, _data("The list of tags. Default: tags, else ner_tags.")] = None,
) -> TaskOptions:
    """Fine-tune a classifier of words, such as names in a text, and write its adapter folder.

    Reads CoNLL, JSONL, JSON or a folder of the library datasets. A word's tag is learnt at its first token. The
    pass with the best F1 over entities is kept.
    """
    return TokensOptions(TokensSchema(words_column, tags_column))


@trains(train_app, "answer", max_length=384, epochs=3, learning_rate=5e-4)
def answer(
    question_column: Annotated[str, _data("The question; SQuAD's JSON has no columns to name.")] = "question",
    context_column: Annotated[str, _data("The text that holds the answer.")] = "context",
    answer_column: Annotated[str, _data("The answer, where there is no column answers.")] = "answer",
    doc_stride: Annotated[
        int | None, _data("Tokens that windows of a long context share. Default: as serving does.")
    ] = None,
    max_answer_tokens: Annotated[int, _data("Tokens of the longest answer that validation finds.")] = 30,
) -> TaskOptions:
    """Fine-tune extractive question answering, and write its adapter folder.

    Reads SQuAD's JSON (version 1 or 2), JSONL, CSV or a folder of the library datasets. A long context is read in
    windows of --max-length tokens that overlap. The pass with the best F1 over words is kept.
    """
    schema = AnswerSchema(question=question_column, context=context_column, answer=answer_column)
    return AnswerOptions(schema, doc_stride, max_answer_tokens)


@trains(train_app, "generate", max_length=256, epochs=3, batch_size=8, learning_rate=3e-4)
def generate(
    template: Annotated[str, _data("The prompt; {name} is a field.")] = GENERATE_TEMPLATE,
    field: _Fields = None,
    completion_column: Annotated[str, _data("The text to write after the prompt.")] = "completion",
    chat: _Chat = False,
    system: _System = None,
    generation: _Generation = None,
) -> TaskOptions:
    """Fine-tune a decoder to go on from a prompt, and write its adapter folder.

    Reads CSV, TSV, JSONL, JSON or a folder of the library datasets, with a column for each field of the template.
    Only the completion and its end are learnt. The pass with the lowest perplexity is kept.
    """
    return PromptOptions(template, _pairs("field", field), completion_column, chat, system, _defaults(generation))


@trains(train_app, "translate", max_length=256, epochs=3, batch_size=8, learning_rate=3e-4)
def translate(
    template: Annotated[
        str, _data("The prompt; {text} is the source.", shown="{text} and a line break")
    ] = TRANSLATE_TEMPLATE,
    source_column: Annotated[str, _data("The text to translate.")] = "source",
    target_column: Annotated[str, _data("Its translation.")] = "target",
    field: _Fields = None,
    chat: _Chat = False,
    system: _System = None,
    generation: _Generation = None,
    eval_samples: Annotated[int, _data("Validation rows that every pass translates, for BLEU and chrF.")] = 32,
) -> TaskOptions:
    """Fine-tune a decoder to translate, and write its adapter folder.

    Reads CSV, TSV, JSONL, JSON or a folder of the library datasets. The template may name {source_language} and
    {target_language} beside {text}. The pass with the lowest perplexity is kept; BLEU and chrF are of the first
    validation rows, translated greedily.
    """
    columns = {"text": source_column, **_pairs("field", field)}
    return PromptOptions(template, columns, target_column, chat, system, _defaults(generation), True, eval_samples)


@trains(train_app, "embed", without=("loss",), epochs=3, batch_size=32, learning_rate=5e-4)
def embed(
    text_column: Annotated[str, _data("The text.")] = "text",
    positive_column: Annotated[str, _data("A text that means the same, or answers it.")] = "positive",
    negative_column: Annotated[str | None, _data("A text that does not. Default: negative, if there is one.")] = None,
    score_column: Annotated[
        str | None, _data("How close the pair is, 0 to 1. Default: score, if there is one.")
    ] = None,
    pooling: Annotated[
        Pooling | None, _data("What becomes the vector. Default: mean; of decoders, the last token.")
    ] = None,
    normalize: Annotated[bool, _data("Serve vectors of length 1.")] = True,
    temperature: Annotated[float, _data("What cosines are divided by; pairs and triplets alone.")] = 0.05,
) -> TaskOptions:
    """Fine-tune vectors of texts, and write their adapter folder.

    Reads CSV, TSV, JSONL, JSON or a folder of the library datasets. Pairs and triplets are learnt against the other
    rows of a batch, so a larger --batch-size teaches more; scored pairs by the squared error of their cosine. The
    best pass is kept: by how many texts find their own, or by rank correlation with the scores.
    """
    schema = EmbedSchema(text_column, positive_column, negative_column, score_column)
    return EmbedOptions(schema, pooling, normalize, temperature)


def _pairs(name: str, given: Sequence[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in given or ():
        key, sign, value = item.partition("=")
        if not sign or not key or not value:
            raise InvalidRequest(name, f"is {item!r}; write NAME=VALUE")
        pairs[key] = value
    return pairs


def _defaults(given: Sequence[str] | None) -> Mapping[str, Any]:
    """Values are JSON where they are valid JSON, else text."""
    values: dict[str, Any] = {}
    for key, text in _pairs("generation", given).items():
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values
