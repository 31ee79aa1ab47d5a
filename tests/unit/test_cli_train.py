"""`multilora train …`: what its options become, and its help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_runtime.prompts.spec import PromptSpec
from lora_runtime.train.private.settings import Privacy
from lora_runtime.train.rows.answer import AnswerSchema
from lora_runtime.train.rows.classify import ClassifySchema
from lora_runtime.train.rows.embed import EmbedSchema
from lora_runtime.train.rows.tokens import TokensSchema
from lora_runtime.train.settings import (
    BaseBits,
    DataFiles,
    DeviceChoice,
    Init,
    LoraChoices,
    Optimisation,
    Optimizer,
    Precision,
    RunSettings,
    Schedule,
    TrainSettings,
)
from lora_runtime.train.tasks.options import (
    AnswerOptions,
    ClassifyOptions,
    EmbedOptions,
    PromptOptions,
    TaskOptions,
    TokensOptions,
)
from lora_runtime.types import Pooling, ProblemType
from server.cli_train import train_app
from server.control_cli.given import Given
from server.train_cli import running
from server.train_cli.publishing import Publication
from server.train_cli.searching import SearchOptions

COMMANDS = ("classify", "classify-tokens", "answer", "generate", "translate", "embed")
NEEDED = ("--base", "b", "--train", "t.csv", "--out", "o")


commands: list[running.TrainCommand] = []  # of the test under way


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TrainSettings]:
    """The settings of runs that were asked for; nothing is trained."""
    found: list[TrainSettings] = []
    commands.clear()

    def note(command: running.TrainCommand, errors: object) -> None:
        del errors
        commands.append(command)
        found.append(command.settings)

    monkeypatch.setattr(running, "_run", note)
    return found


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(train_app, arguments)


def test_every_shared_option_reaches_its_setting(asked: list[TrainSettings]) -> None:
    result = invoke(
        "classify", *NEEDED, "--valid", "v.csv", "--valid-share", "0.2", "--max-length", "64", "--rank", "8", "--alpha",
        "4", "--dropout", "0", "--target-modules", "query, value", "--rslora", "--dora", "--init", "eva",
        "--learning-rate", "0.01", "--scheduler", "reduce-on-plateau", "--warmup-ratio", "0", "--optimizer", "adam",
        "--loraplus-ratio", "4", "--weight-decay", "0", "--loss", "focal", "--epochs", "2", "--batch-size", "3",
        "--gradient-accumulation", "5", "--gradient-checkpointing", "--precision", "bf16", "--quantize", "4bit",
        "--eval-steps", "7", "--patience", "3", "--device", "cuda", "--seed", "9", "--threads", "2", "--overwrite",
        "--resume", "--no-report", "--tensorboard", "tb", "--text-column", "x", "--pair-column", "y", "--label-column",
        "z", "--problem-type", "multi-label", "--separator", ";",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    schema = ClassifySchema("x", "y", "z", ProblemType.MULTI_LABEL, ";")
    assert asked == [
        TrainSettings(
            "b",
            ClassifyOptions(schema),
            DataFiles(Path("t.csv"), Path("v.csv"), 0.2, 64),
            RunSettings(Path("o"), 9, 2, True, True, tensorboard=Path("tb"), report=False),
            LoraChoices(8, 4.0, 0.0, ("query", "value"), True, True, Init.EVA),
            Optimisation(
                0.01, Schedule.REDUCE_ON_PLATEAU, 0.0, Optimizer.ADAM, 4.0, 0.0, 2, 3, 5, True, Precision.BF16,
                BaseBits.NF4, 3, 7, "focal", DeviceChoice.CUDA,
            ),
        )
    ]  # fmt: skip


def test_the_defaults_are_those_of_the_library(asked: list[TrainSettings]) -> None:
    assert invoke("classify", *NEEDED).exit_code == 0
    assert asked == [TrainSettings("b", ClassifyOptions(), DataFiles(Path("t.csv")), RunSettings(Path("o")))]


TASKS: list[tuple[str, tuple[str, ...], TaskOptions]] = [
    (
        "classify-tokens",
        ("--words-column", "w", "--tags-column", "t"),
        TokensOptions(TokensSchema("w", "t")),
    ),
    (
        "answer",
        ("--question-column", "q", "--context-column", "c", "--answer-column", "a", "--doc-stride", "16"),
        AnswerOptions(AnswerSchema("q", "c", answer="a"), 16, 30),
    ),
    (
        "generate",
        ("--template", "{a} {b}", "--field", "b=other", "--completion-column", "c", "--chat", "--system", "be brief",
         "--generation", "temperature=0.5", "--generation", 'stop=["\\n"]'),
        PromptOptions(
            "{a} {b}", {"b": "other"}, "c", True, "be brief", {"temperature": 0.5, "stop": ["\n"]}
        ),
    ),
    (
        "translate",
        ("--template", "To {target_language}: {text}", "--source-column", "en", "--target-column", "zh", "--field",
         "target_language=lang", "--eval-samples", "4"),
        PromptOptions(
            "To {target_language}: {text}", {"text": "en", "target_language": "lang"}, "zh", is_translation=True,
            eval_samples=4,
        ),
    ),
    (
        "embed",
        ("--positive-column", "p", "--negative-column", "n", "--pooling", "cls", "--no-normalize", "--temperature",
         "0.1"),
        EmbedOptions(EmbedSchema("text", "p", "n"), Pooling.CLS, False, 0.1),
    ),
]  # fmt: skip


def test_a_search_its_publication_and_privacy_are_said_beside_the_settings(asked: list[TrainSettings]) -> None:
    search = (
        "--search",
        "trials=3",
        "--search-space",
        "rank=2,4",
        "--search-space",
        "dropout=0",
        "--search-storage",
        "s",
    )
    server = ("--publish", "acme/news@prod", "--server", "h:1", "--publish-timeout", "9", "--token-file", "k")
    tls = ("--tls", "--tls-ca", "ca", "--tls-cert", "c", "--tls-key", "x")
    result = invoke("embed", *NEEDED, *search, *server, *tls)
    assert result.exit_code == 0, result.output
    credentials = Given(token_file=Path("k"), tls=True, tls_ca=Path("ca"), tls_cert=Path("c"), tls_key=Path("x"))
    assert commands[0].search == SearchOptions(3, None, ("rank=2,4", "dropout=0"), Path("s"))
    assert commands[0].publication == Publication("acme/news", "prod", "h:1", 9.0, credentials)
    private = ("--private", "--noise-multiplier", "2", "--max-grad-norm", "0.5", "--delta", "1e-6")
    assert invoke("classify", *NEEDED, *private).exit_code == 0
    assert asked[1].privacy == Privacy(None, 2.0, 0.5, 1e-6)
    assert (commands[1].search, commands[1].publication) == (None, None)


@pytest.mark.parametrize(("command", "arguments", "wanted"), TASKS, ids=[task[0] for task in TASKS])
def test_a_tasks_own_options(
    asked: list[TrainSettings], command: str, arguments: tuple[str, ...], wanted: TaskOptions
) -> None:
    result = invoke(command, *NEEDED, *arguments)
    assert result.exit_code == 0, result.output
    assert asked[0].task == wanted


def test_what_is_said_of_prompts_is_what_multilora_json_takes() -> None:
    options = PromptOptions("{a}", generation={"stop": ["."]}, is_chat=True, system="s")
    assert PromptSpec(options.parsed, True, "s").template == options.parsed


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("classify", *NEEDED, "--rank", "0"), "error: rank: is 0; allowed: 1 to 256"),
    (("classify", *NEEDED, "--separator", ""), "error: separator: is empty"),
    (("generate", *NEEDED, "--template", "no field"), "error: template: has no field"),
    (("generate", *NEEDED, "--field", "x"), "error: field: is 'x'; write NAME=VALUE"),
    (("generate", *NEEDED, "--field", "x=y"), "error: field: 'x' is not in the template, whose fields are prompt"),
    (("generate", *NEEDED, "--system", "s"), "error: system: needs chat"),
    (("generate", *NEEDED, "--generation", "seed=1"), "error: generation: 'seed' is for requests alone"),
    (("embed", *NEEDED, "--temperature", "0"), "error: temperature: is 0.0"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=[case[1] for case in REFUSED])
def test_options_that_cannot_be_used_are_refused_in_one_line(
    asked: list[TrainSettings], arguments: tuple[str, ...], says: str
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(says)
    assert result.stderr.count("\n") == 1
    assert not asked


def test_an_embedding_has_no_choice_of_loss() -> None:
    result = invoke("embed", *NEEDED, "--loss", "focal")
    assert result.exit_code == 2
    assert "No such option" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_eighty_columns_and_has_its_panels(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    text = invoke(command, "--help").output
    assert max(map(len, text.splitlines())) <= 80
    for panel in ("Data", "LoRA", "Training", "Output"):
        assert re.search(rf"─ {panel} ─", text), panel
