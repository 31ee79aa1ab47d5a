"""Chat templates of adapters: what they cannot do to the server."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lora_runtime.model.template_process import RenderFailed, TemplateProcess

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


def test_conversations_are_rendered_in_order(process: TemplateProcess) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ add_generation_prompt }}"
    texts = process.render(template, [USER, [{"role": "user", "content": "二"}]], {"bos_token": "<s>"})
    assert texts == ["<s>helloTrue", "<s>二True"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10**10 }}",
        "{{ ('a' * 2000000) }}",
        "{% if %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception(messages[0].content) }}",
    ],
)
def test_a_template_fails_alone(process: TemplateProcess, template: str) -> None:
    with pytest.raises(RenderFailed) as caught:
        process.render(template, [USER], {})
    assert "hello" not in caught.value.reason
    assert process.render("{{ messages[0].content }}", [USER], {}) == ["hello"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        pytest.param("{{ 9**(9**9) }}", marks=pytest.mark.slow),
        "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    ],
)
def test_a_template_that_would_not_end_is_stopped(process: TemplateProcess, template: str) -> None:
    started = time.monotonic()
    with pytest.raises(RenderFailed, match=r"was stopped|MemoryError"):
        process.render(template, [USER], {})
    assert time.monotonic() - started < 30
    assert process.render("{{ messages[0].content }}", [USER], {}) == ["hello"]


def test_what_a_template_says_of_a_conversation_is_passed_on(process: TemplateProcess) -> None:
    template = "{{ raise_exception('Roles must alternate') if messages|length > 1 }}ok"
    with pytest.raises(RenderFailed, match=r"^Roles must alternate$") as caught:
        process.render(template, [USER, USER * 2], {})
    assert caught.value.index == 1


def test_the_process_sees_no_environment(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    popen = subprocess.Popen

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(options["env"])
        return popen(*arguments, **options)

    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setattr(subprocess, "Popen", watched)
    process.close()
    assert process.render("a", [USER], {}) == ["a"]
    assert "SECRET" not in seen[0]


def test_a_process_that_died_is_replaced(process: TemplateProcess) -> None:
    assert process.render("a", [USER], {}) == ["a"]
    running: Any = process._running
    running.process.kill()
    running.process.wait()
    assert process.render("b", [USER], {}) == ["b"]
