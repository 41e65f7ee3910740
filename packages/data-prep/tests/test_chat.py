# SPDX-License-Identifier: Apache-2.0
"""Chat templates: the same text as transformers, clear errors, and attacks that the sandbox stops."""

import json
from enum import Enum
from pathlib import Path

import pytest

from modellink.data_prep import Tokenizer, encode_chat, render_chat
from modellink.data_prep.templates.sandbox import render_template
from modellink.kernels.errors import ModelLinkError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好 <b>&</b>"},
        {"role": "assistant", "content": "Hi", "tool_calls": None}, {"role": "user", "content": "1 < 2?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add 'two' numbers, größer", "parameters": {}}}]
TEMPLATES = {
    "whitespace": "{% for m in messages %}\n    {% if m.role == 'user' %}\n  U: {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
    "bos and eos": "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{{ unk_token }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{{ tools[0] | tojson }}{% endif %}{{ messages | tojson }}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{% endfor %}{{ x }}",
    "generation is a scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "absent keys": "{% for m in messages %}{{ m.tool_calls is defined }}{{ documents is none }}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}",
    "macro": "{% macro say(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "methods": "{% for m in messages %}{{ m.content.strip().split('\\n')[-1].upper() }}{{ m.items() | list }}{% endfor %}",
}


@pytest.fixture
def with_template(tmp_path, byte_folder):
    """A copy of the byte-level tokenizer with another template."""
    def make(template: str) -> Path:
        for path in byte_folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        config = json.loads((byte_folder / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<|endoftext|>"}))
        (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path
    return make


def test_chatml_text_and_ids(byte_tokenizer):
    text = render_chat(byte_tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = encode_chat(byte_tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert byte_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids.count(1) == 2 and ids.count(2) == 1


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True, "tools": TOOLS}], ids=["plain", "tools"])
def test_same_text_as_transformers(with_template, name, options):
    transformers = pytest.importorskip("transformers")
    folder = with_template(TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, **options)
    assert render_chat(Tokenizer.from_folder(folder), CHAT, **options) == expected


def test_variables_reach_the_template(byte_tokenizer):
    assert render_template("{{ enable_thinking }}{{ bos_token }}", enable_thinking=False, bos_token="x") == "Falsex"
    assert render_chat(byte_tokenizer, CHAT, template="default", anything=1)


def test_thoughts_are_known_under_their_other_names(with_template):
    tokenizer = Tokenizer.from_folder(with_template("{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}"))
    assert render_chat(tokenizer, [{"role": "assistant", "reasoning": "hm"}]) == "hm|hm"


def test_nothing_but_plain_data_is_given():
    class Text(str, Enum):  # noqa: UP042 - the older form, whose str() is not its value
        A = "a"

    class Evil:
        pass

    assert render_template("{{ x }}", x=Text.A) == "a"
    with pytest.raises(ModelLinkError, match="x holds a Evil"):
        render_template("{{ x }}", x=[Evil()])


def test_a_template_may_refuse(with_template):
    tokenizer = Tokenizer.from_folder(with_template("a\n{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(ModelLinkError, match="refuses these messages: roles must alternate") as caught:
        render_chat(tokenizer, CHAT)
    assert "line 2" in str(caught.value.where)


@pytest.mark.parametrize(("template", "message"), [
    ("{% if %}", "not valid Jinja"), ("{{ messages[9].content + 'x' }}", "UndefinedError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"), ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError")])
def test_broken_templates_are_named(template, message):
    with pytest.raises(ModelLinkError, match=message):
        render_template(template, messages=CHAT)


def test_no_template_no_messages(piece_folder, tmp_path, byte_tokenizer):
    (tmp_path / "tokenizer.json").write_bytes((piece_folder / "tokenizer.json").read_bytes())
    with pytest.raises(ModelLinkError, match="has no chat template"):
        render_chat(Tokenizer.from_folder(tmp_path), CHAT)
    with pytest.raises(ModelLinkError, match="conversation is empty"):
        render_chat(byte_tokenizer, [])
    with pytest.raises(ModelLinkError, match="message 1 is a str"):
        render_chat(byte_tokenizer, ["hello"])


ATTACKS = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "function of ours": "{{ strftime_now.__globals__['json'] }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('true') }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "attr through map": "{{ ['']|map(attribute='__class__')|list }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "change": "{{ messages.append(1) }}",
    "change a message": "{{ messages[0].update({'role': 'x'}) }}",
    "change a message's key": "{% set messages[0]['role'] = 'x' %}",
    "environment": "{{ self._TemplateReference__context.environment.globals }}",
    "loader": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "huge range": "{% for i in range(10000000) %}x{% endfor %}",
    "endless text": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_stopped(name):
    """Each either fails or yields nothing: `_`-names of the sandbox are undefined, and undefined is printed as no text."""
    messages = [dict(message) for message in CHAT]
    try:
        text = render_template(ATTACKS[name], messages=messages)
    except ModelLinkError:
        text = ""
    assert text in ("", "[Undefined]")
    assert messages == CHAT
