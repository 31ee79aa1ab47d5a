"""Every task trained on a tiny random base: PEFT and this server answer alike, in one batch, and score as reported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from safetensors.torch import load_file
from seqeval.metrics import f1_score

from lora_runtime.adapters.metadata import read_metadata
from lora_runtime.answers.token_classes import TokenUnit
from lora_runtime.errors import BaseModelUnsupported, InvalidRequest, TrainingDataInvalid
from lora_runtime.model.encoder_text import TextEncoder
from lora_runtime.runtime import Runtime
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.train.progress import TrainReport
from lora_runtime.train.rows.classify import ClassifySchema
from lora_runtime.train.rows.embed import EmbedSchema
from lora_runtime.train.run import train
from lora_runtime.train.settings import (
    DataFiles,
    LoraChoices,
    Optimisation,
    RunSettings,
    TrainSettings,
)
from lora_runtime.train.tasks.answer import target_of
from lora_runtime.train.tasks.options import (
    AnswerOptions,
    ClassifyOptions,
    EmbedOptions,
    PromptOptions,
    TaskOptions,
    TokensOptions,
)
from lora_runtime.train.tasks.tokens import first_tokens
from lora_runtime.types import Pooling, Task
from tests.conformance.families import Base, build_base
from tests.conformance.matrix_bench import Bench
from tests.oracle import TaskOracle
from tests.text_encoders import make_encoder
from tests.training_rows import pairs, questions, sentences, topics, translations, write


def settings_for(base: Base, folder: Path, name: str, task: TaskOptions, make: Any, **changes: Any) -> TrainSettings:
    files = write(folder / f"{name}.jsonl", make(48, 1)), write(folder / f"{name}-valid.jsonl", make(20, 2))
    plain = TrainSettings(
        str(base.folder),
        task,
        DataFiles(*files, max_length=48),
        RunSettings(folder / "adapters" / name, threads=1, report=name in ("tokens", "answer", "translate")),
        LoraChoices(rank=4, dropout=0.0),
        Optimisation(epochs=3, batch_size=8, learning_rate=5e-3),
    )
    return plain.changed(**changes)


TRANSLATE = PromptOptions(
    template="say {text} =", columns={"text": "source"}, completion="target", is_translation=True, eval_samples=6,
    generation={"temperature": 0.0, "max_new_tokens": 24},
)  # fmt: skip


class Trained:
    """Adapters of one base, each trained once, and a server of them."""

    def __init__(self, name: str, root: Path) -> None:
        self.base = build_base(name, root)
        self.settings: dict[str, TrainSettings] = {}
        self.reports: dict[str, TrainReport] = {}
        self._root = root
        self._bench: Bench | None = None

    def train(self, name: str, task: TaskOptions, make: Any, **changes: Any) -> None:
        self.settings[name] = settings_for(self.base, self._root, name, task, make, **changes)
        self.reports[name] = train(self.settings[name])

    @property
    def bench(self) -> Bench:
        self._bench = self._bench or Bench(self.base, self._root / "served")
        return self._bench

    def runtime(self, name: str) -> Runtime:
        """With the adapter loaded under its name."""
        runtime = self.bench.runtime
        runtime.load(self.settings[name].run.out, name=name)
        return runtime

    def rows(self, name: str) -> list[dict[str, Any]]:
        valid = self.settings[name].data.valid
        assert valid is not None
        return [json.loads(line) for line in valid.read_text().splitlines()]

    def close(self) -> None:
        if self._bench is not None:
            self._bench.close()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    trained = Trained("bert", tmp_path_factory.mktemp("bert"))
    trained.train("classify", ClassifyOptions(), topics)
    trained.train("tokens", TokensOptions(), sentences, epochs=8)
    trained.train("answer", AnswerOptions(), questions)
    trained.train("embed", EmbedOptions(), pairs)
    yield trained
    trained.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    trained = Trained("llama", tmp_path_factory.mktemp("llama"))
    trained.train("classify", ClassifyOptions(), topics)
    trained.train("tokens", TokensOptions(), sentences)
    trained.train("embed", EmbedOptions(), pairs)
    trained.train("translate", TRANSLATE, translations, epochs=6)
    yield trained
    trained.close()


PEFT_TYPES = {
    "classify": "SEQ_CLS", "tokens": "TOKEN_CLS", "answer": "QUESTION_ANS", "embed": "FEATURE_EXTRACTION",
    "translate": "CAUSAL_LM",
}  # fmt: skip


@pytest.mark.parametrize("base", ["bert", "llama"])
def test_what_was_trained_answers_as_peft_beside_others_in_one_batch(base: str, request: pytest.FixtureRequest) -> None:
    trained: Trained = request.getfixturevalue(base)
    groups = [trained.bench.alone()]
    for name, settings in trained.settings.items():
        labels = trained.reports[name].plan.labels
        oracle = TaskOracle(
            trained.base.folder, settings.run.out, PEFT_TYPES[name], num_labels=len(labels) or None,
            last_token=base == "llama",
        )  # fmt: skip
        sequences = trained.base.sequences[:3]
        groups.append(trained.bench.group_of(settings.run.out, f"{name}-peft", PEFT_TYPES[name], oracle, sequences))
    for group, outputs in zip(groups, trained.bench.run(groups), strict=True):
        group.check(outputs)


@pytest.mark.parametrize("base", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_training_moved_every_matrix_and_lowered_the_loss(base: str, request: pytest.FixtureRequest) -> None:
    trained: Trained = request.getfixturevalue(base)
    for name, settings in trained.settings.items():
        tensors = load_file(settings.run.out / "adapter_model.safetensors")
        assert all(value.abs().max() > 0 for key, value in tensors.items() if "lora_B" in key), name
        losses = trained.reports[name].step_losses
        assert sum(losses[-6:]) < sum(losses[:6]), name


def test_the_served_tags_score_as_reported(bert: Trained) -> None:
    runtime = bert.runtime("tokens")
    rows = bert.rows("tokens")
    texts = [" ".join(row["tokens"]) for row in rows]
    found: list[list[str]] = []
    for row, labels in zip(rows, runtime.classify_tokens("tokens", texts, unit=TokenUnit.WORDS), strict=True):
        starts = [sum(len(word) + 1 for word in row["tokens"][:place]) for place in range(len(row["tokens"]))]
        by_start = {label.start: label.label for label in labels}
        found.append([by_start[start] for start in starts])
    wanted = bert.reports["tokens"].best.metrics["f1"]
    assert wanted > 0.5
    assert f1_score([row["tags"] for row in rows], found) == pytest.approx(wanted)


def test_the_served_answers_score_as_reported(bert: Trained) -> None:
    rows = bert.rows("answer")
    answers = bert.runtime("answer").answer(
        "answer", [(row["question"], row["context"]) for row in rows], allow_no_answer=True
    )
    right = 0
    for row, spans in zip(rows, answers, strict=True):
        text = row["context"][spans[0].start : spans[0].end]
        wanted = [answer["text"] for answer in row["answers"]] or [""]
        right += text in wanted
    assert right / len(rows) == pytest.approx(bert.reports["answer"].best.metrics["exact_match"])
    assert bert.reports["answer"].plan.num_truncated_rows > 0  # some contexts took several windows


@pytest.mark.parametrize("base", ["bert", "llama"])
def test_the_served_vectors_retrieve_as_reported(base: str, request: pytest.FixtureRequest) -> None:
    trained: Trained = request.getfixturevalue(base)
    runtime, rows = trained.runtime("embed"), trained.rows("embed")
    texts, positives = (
        torch.tensor(runtime.embed("embed", [row[name] for row in rows])) for name in ("text", "positive")
    )
    assert torch.allclose(texts.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
    nearest = (texts @ positives.T).argmax(1).tolist()
    right = sum(rows[place]["positive"] == row["positive"] for place, row in zip(nearest, rows, strict=True))
    assert right / len(rows) == pytest.approx(trained.reports["embed"].best.metrics["retrieval_accuracy"])


def test_a_translation_is_served_from_its_fields_and_scores_as_reported(llama: Trained) -> None:
    rows = llama.rows("translate")[: TRANSLATE.eval_samples]
    longest = 24  # what the adapter's own defaults say
    runtime = llama.runtime("translate")
    samples = runtime.generate("translate", [{"text": row["source"]} for row in rows])
    assert all(len(sample.tokens) <= longest for (sample,) in samples)
    metadata = read_metadata(llama.settings["translate"].run.out)
    assert metadata is not None
    assert metadata.prompt_template == "say {text} ="
    best = llama.reports["translate"].best
    assert metadata.metrics["perplexity"] == best.metrics["perplexity"]
    # the validation pass allows twice the longest target
    params = SamplingParams(temperature=0.0, max_new_tokens=_allowed(llama, rows))
    served = runtime.generate("translate", [{"text": row["source"]} for row in rows], params)
    chrf = sacrebleu.corpus_chrf([s.text for (s,) in served], [[row["target"] for row in rows]]).score
    assert chrf == pytest.approx(best.metrics["chrf"])


def _allowed(llama: Trained, rows: Sequence[dict[str, Any]]) -> int:
    encoder = llama.bench.runtime.encoder
    return 2 * max(encoder.encode_text("t", row["target"], add_special_tokens=False).num_tokens for row in rows)


def test_perplexity_is_that_of_the_completions_and_their_ends(llama: Trained) -> None:
    settings = llama.settings["translate"]
    oracle = TaskOracle(llama.base.folder, settings.run.out, "CAUSAL_LM")
    encoder = llama.bench.runtime.encoder
    nll, count = 0.0, 0
    for row in llama.rows("translate"):
        prompt = encoder.encode_text("p", f"say {row['source']} =", add_special_tokens=True).input_ids
        own = (*encoder.encode_text("c", row["target"], add_special_tokens=False).input_ids, 0)
        with torch.inference_mode():
            logits = oracle.model(input_ids=torch.tensor([[*prompt, *own]])).logits[0, len(prompt) - 1 : -1]
        nll += float(torch.nn.functional.cross_entropy(logits, torch.tensor(own), reduction="sum"))
        count += len(own)
    wanted = float(torch.exp(torch.tensor(nll / count)))
    assert llama.reports["translate"].best.metrics["perplexity"] == pytest.approx(wanted, rel=1e-4)


def test_a_chat_is_trained_as_it_will_be_served(llama: Trained, tmp_path: Path) -> None:
    base = replace(llama.base, folder=_with_chat_template(llama.base, tmp_path))
    options = PromptOptions(
        template="{text}", columns={"text": "source"}, completion="target", is_chat=True, system="be brief"
    )
    settings = settings_for(base, tmp_path, "chat", options, translations, epochs=1, max_length=90)
    report = train(settings)
    with Runtime(base.folder) as runtime:
        runtime.load(settings.run.out, name="chat")
        info = runtime.load(settings.run.out, name="chat2")
        assert info.card is not None and info.card.prompt is not None
        text = runtime.generation_for(info)
        oracle = TaskOracle(base.folder, settings.run.out, "CAUSAL_LM")
        nll, count = 0.0, 0
        assert settings.data.valid is not None
        for row in map(json.loads, settings.data.valid.read_text().splitlines()):
            (prompt,) = text.encode_prompts([info.card.prompt.prompt({"text": row["source"]}, "i")], max_length=None)
            own = (*text.encoder.encode_text("c", row["target"], add_special_tokens=False).input_ids, 0)
            ids = torch.tensor([[*prompt.input_ids, *own]])
            with torch.inference_mode():
                logits = oracle.model(input_ids=ids).logits[0, prompt.num_tokens - 1 : -1]
            nll += float(torch.nn.functional.cross_entropy(logits, torch.tensor(own), reduction="sum"))
            count += len(own)
    wanted = float(torch.exp(torch.tensor(nll / count)))
    assert report.best.metrics["perplexity"] == pytest.approx(wanted, rel=1e-4)


def _with_chat_template(base: Base, folder: Path) -> Path:
    import shutil

    from transformers import AutoTokenizer

    copy = shutil.copytree(base.folder, folder / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(copy)
    return copy


@pytest.mark.parametrize(
    ("kind", "metric"), [({"negative": True}, "triplet_accuracy"), ({"score": True}, "spearman")], ids=str
)
def test_triplets_and_scored_pairs_are_learnt(
    bert: Trained, tmp_path: Path, kind: dict[str, bool], metric: str
) -> None:
    options = EmbedOptions(EmbedSchema(), Pooling.CLS, normalize=False)
    settings = settings_for(bert.base, tmp_path, "e", options, lambda n, seed: pairs(n, seed, **kind), epochs=6)
    report = train(settings)
    assert report.plan.selection == metric
    assert report.best.metrics[metric] > 0.6
    metadata = read_metadata(settings.run.out)
    assert metadata is not None
    assert (metadata.task, metadata.pooling, metadata.normalize) == (Task.EMBED, Pooling.CLS, False)


def test_a_word_is_labelled_at_its_first_token_in_every_family() -> None:
    words = ["Anna", "Karenina", "was", "written", "in", "1877."]
    for family in ("bert", "roberta", "gpt2", "llama"):
        encoder: TextEncoder = make_encoder(family)
        (text,) = encoder.encode_tokens([" ".join(words)], max_length=None, truncate=True)
        starts = [sum(len(word) + 1 for word in words[:place]) for place in range(len(words))]
        for first, start, word in zip(first_tokens(words, text.offsets), starts, words, strict=True):
            assert first is not None, (family, word)
            place = text.offsets[first]
            assert place is not None
            assert place[0] == start, (family, word)


def test_words_that_are_cut_off_have_no_token() -> None:
    (text,) = make_encoder("bert").encode_tokens(["one two three four five"], max_length=5, truncate=True)
    assert first_tokens(["one", "two", "three", "four", "five"], text.offsets) == [1, 2, 3, None, None]


def test_a_window_has_the_answer_or_the_place_of_none() -> None:
    encoder = make_encoder("bert")
    context = f"{'the way is long and ' * 12}anna went to the old town of oslo last year"
    start = context.index("old town")
    (windows,) = encoder.encode_questions([("where to?", context)], max_length=40)
    assert len(windows) > 1
    found = 0
    for window in windows:
        first, last = target_of(window, [(start, "old town of oslo")])
        if first != window.null_index:
            begin, end = window.offsets[first], window.offsets[last]
            assert begin is not None and end is not None
            assert context[begin[0] : end[1]] == "old town of oslo"
            found += 1
    assert found >= 1
    assert target_of(windows[0], []) == (0, 0)


def test_prompts_that_fill_the_length_are_left_out_and_counted(llama: Trained, tmp_path: Path) -> None:
    def make(count: int, seed: int) -> list[dict[str, Any]]:
        rows = translations(count, seed)
        rows[0]["source"] = "one " * 80
        rows[1]["target"] = "uno " * 80
        return rows

    settings = settings_for(llama.base, tmp_path, "long", replace(TRANSLATE, eval_samples=0), make, epochs=1)
    plan = train(settings).plan
    assert (plan.num_skipped_rows, plan.num_truncated_rows) == (2, 2)
    with pytest.raises(TrainingDataInvalid, match="no prompt leaves room"):
        train(settings.changed(max_length=8, template="a long way to say {text} in another tongue =", overwrite=True))


def refused(llama: Trained, bert: Trained, tmp_path: Path) -> list[tuple[TrainSettings, type[Exception], str]]:
    bad_answer = write(tmp_path / "bad.jsonl", [{**row, "answers": [{"text": "paris", "answer_start": 0}]}
                                                for row in questions(8, 1)])  # fmt: skip
    chat = replace(TRANSLATE, is_chat=True)
    return [
        (bert.settings["answer"].changed(train=bad_answer), TrainingDataInvalid, r"bad\.jsonl:1: .*does not occur"),
        (bert.settings["embed"].changed(loss="focal"), InvalidRequest, "is not chosen for embeddings"),
        (
            bert.settings["answer"].changed(loss="weighted"),
            InvalidRequest,
            "does not suit a task whose targets are pos",
        ),
        (llama.settings["translate"].changed(loss="weighted"), InvalidRequest, "does not suit a task whose targets"),
        (llama.settings["translate"].changed(base=str(bert.base.folder)), BaseModelUnsupported, "is an encoder"),
        (llama.settings["translate"].changed(task=chat), InvalidRequest, "has no chat template"),
        (llama.settings["translate"].changed(train=bert.settings["tokens"].data.train), TrainingDataInvalid, "source"),
        (bert.settings["classify"].changed(schema=ClassifySchema(label="kind")), TrainingDataInvalid, "kind"),
    ]


def test_what_does_not_fit_the_task_is_refused_and_nothing_is_written(
    llama: Trained, bert: Trained, tmp_path: Path
) -> None:
    for settings, kind, says in refused(llama, bert, tmp_path):
        settings = settings.changed(out=tmp_path / "never" / "adapter")
        with pytest.raises(kind, match=says):
            train(settings)
        assert not list(tmp_path.glob("never/*")), says


@pytest.mark.parametrize(
    ("base", "name", "says"),
    [
        ("bert", "tokens", ("PER", "then", "B-")),
        ("bert", "answer", ("where to?", "(no answer)", "exact match")),
        ("llama", "translate", ("the base alone", "perplexity", "chrF")),
    ],
)
def test_a_report_stands_beside_the_adapter_with_examples(
    base: str, name: str, says: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    trained: Trained = request.getfixturevalue(base)
    out = trained.settings[name].run.out
    text = (out / "report.md").read_text()
    for part in says:
        assert part in text
    assert str(trained.base.folder.parent) not in text
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
