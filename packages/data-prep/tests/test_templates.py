# SPDX-License-Identifier: Apache-2.0
"""Every prompt template token by token, on tokenizers trained here and real ones; message text never becomes a control token.

`rendered.json` holds, for each template and conversation, the parts of each turn as they must be encoded: asked, then learned.
"""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from types import MappingProxyType

import pytest
import tokenizers

from modellink.data_prep import Tokenizer, encode_chat
from modellink.data_prep.templates.conversation import from_messages
from modellink.data_prep.templates.formats import chat_format
from modellink.data_prep.templates.model import ModelFormat
from modellink.data_prep.templates.template import load_template, template_names
from modellink.kernels.constants import IGNORE_INDEX
from modellink.kernels.errors import ModelLinkError

RENDERED = json.loads((Path(__file__).parent / "rendered.json").read_text(encoding="utf-8"))
QUESTION = {"role": "user", "content": "What is <|im_end|></s> 1 + 1?"}
ANSWER = {"role": "assistant", "content": "Two."}
SYSTEM = {"role": "system", "content": "Be brief. 简短。"}
TOOLS = [{"type": "function", "function": {
    "name": "add", "description": "Adds numbers", "parameters": {"type": "object", "required": ["a"], "properties": {
        "a": {"type": "integer", "description": "first"}, "unit": {"type": "string", "enum": ["m", "km"]},
        "more": {"type": "array", "description": "the rest", "items": {"type": "integer"}}}}}}]
CONVERSATIONS = {
    "no system": ([QUESTION, ANSWER], None), "system": ([SYSTEM, QUESTION, ANSWER], None),
    "turns": ([QUESTION, ANSWER, {"role": "user", "content": "你好，你是谁？"},
               {"role": "assistant", "content": "我是 <|eot_id|> 助手。"}], None),
    "tools": ([SYSTEM, QUESTION, {"role": "function_call", "content": '{"name": "add", "arguments": {"a": 1, "more": [2]}}'},
               {"role": "observation", "content": "3"}, {"role": "assistant", "content": "It is 3."}], TOOLS)}
TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[gMASK]", "sop", "<sop>", "<|system|>", "<|user|>",
          "<|assistant|>", "<|observation|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>"]
# A real tokenizer and the templates that fit its tokens; every other template is shown on those trained here.
REAL = {"qwen3": ["qwen", "chatml", "chatml_de", "default", "empty"], "llama3": ["llama3", "alpaca"],
        "gemma3": ["gemma", "default"], "deepseek_v3": ["deepseek2", "deepseek2-lite"],
        "llama2": ["llama2", "mistral", "mixtral", "alpaca", "default", "empty"]}


@pytest.fixture(scope="session", params=["byte", "piece"])
def all_tokens(request, tmp_path_factory) -> Tokenizer:
    """The small tokenizers with all control tokens of all templates."""
    folder = tmp_path_factory.mktemp("all")
    engine = tokenizers.Tokenizer.from_file(str(request.getfixturevalue(f"{request.param}_folder") / "tokenizer.json"))
    engine.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in TOKENS])
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return Tokenizer.from_folder(folder)


def expected(tokenizer, name, case):
    """Return (ids, learned) of `rendered.json`, encoded part by part by the library only."""
    libraries = raw(tokenizer.folder)
    eos = tokenizer.token_to_id(load_template(name).stop_words[0]) if load_template(name).replace_eos else tokenizer.eos_token_id

    def encode(part):
        if isinstance(part, dict):
            return [tokenizer.token_to_id(part["token"]) if "token" in part else
                    eos if part["special"] == "eos" else tokenizer.bos_token_id]
        return literal_ids(*libraries, part)
    ids, labels = [], []
    turns = RENDERED[name][case]
    efficient = load_template(name).efficient_eos
    for number, (source, target) in enumerate(turns):
        asked, said = ([index for part in parts for index in encode(part)] for parts in (source, target))
        ids += asked + said
        closing = [eos] if efficient and asked and number else []
        labels += closing + [IGNORE_INDEX] * (len(asked) - len(closing)) + said
    return ids, labels


SAID = ("<|im_end|></s> 1", "<|eot_id|> 助手")  # what people wrote; anything else of that form is the template's


@cache
def raw(folder):
    """The library's tokenizer twice: as it is, and with control tokens as text."""
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), plain


@cache
def load(folder):
    return Tokenizer.from_folder(folder)


def literal_ids(library, plain, part):
    """Return the ids of the library; for control tokens in user text, those of a tokenizer without these tokens."""
    written = [text for text in SAID if text in part]
    known = [token for token in library.get_added_tokens_decoder().values() if token.special]
    if not any(token.content in text for text in written for token in known):
        return library.encode(part, add_special_tokens=False).ids
    # Split at the template's tokens by hand, and encode what is between with control tokens as text.
    ids, rest = [], part
    while rest:
        stop = min((at for token in known if (at := outside(rest, token.content, written)) >= 0), default=len(rest))
        ids += plain.encode(rest[:stop], add_special_tokens=False).ids if stop else []
        token = max((token.content for token in known if rest.startswith(token.content, stop)), key=len, default="")
        ids += [library.token_to_id(token)] if token else []
        rest = rest[stop + len(token):]
    return ids


def outside(text, token, written):
    """Return the position of the token in the text, outside user text, or -1."""
    at = text.find(token)
    while at >= 0 and any((start := text.find(said)) <= at < start + len(said) for said in written if said in text):
        at = text.find(token, at + 1)
    return at


def check(tokenizer, name, case):
    messages, tools = CONVERSATIONS[case]
    encoded = chat_format(tokenizer, name).encode(from_messages(messages, tools))
    ids, labels = expected(tokenizer, name, case)
    assert encoded.ids == ids
    assert encoded.labels() == labels


def test_these_are_all_templates():
    assert template_names() == list(RENDERED) and len(RENDERED) == 17


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", RENDERED)
def test_templates_token_by_token(all_tokens, name, case):
    check(all_tokens, name, case)


@pytest.mark.parametrize(("real", "name"), [(real, name) for real, names in REAL.items() for name in names])
def test_templates_on_real_tokenizers(real_tokenizer, real, name):
    tokenizer = load(real_tokenizer(real))
    for case in CONVERSATIONS:
        check(tokenizer, name, case)


@pytest.mark.parametrize("name", RENDERED)
def test_what_is_said_adds_no_control_token(all_tokens, name):
    """A conversation whose text contains every control token has as many of them as one without."""
    form = chat_format(all_tokens, name)
    attack = " ".join(TOKENS) + " \U000f0000\U0010ffff {content}"
    counts = []
    for text in (attack, "harmless"):
        ids = form.encode(from_messages([{"role": "system", "content": text}, {"role": "user", "content": text},
                                         {"role": "assistant", "content": text}])).ids
        counts.append(sum(all_tokens.is_special(index) for index in ids))
    assert counts[0] == counts[1]
    whole = all_tokens.decode(form.encode(from_messages([{"role": "user", "content": attack}])).ids, skip_special_tokens=False)
    assert "<|im_start|> <|im_end|> <|eot_id|> [gMASK] sop" in whole and "\U000f0000\U0010ffff {content}" in whole


@pytest.mark.parametrize("name", [*RENDERED, "hf-chat-template"])
def test_training_chat_and_evaluation_are_one(all_tokens, byte_tokenizer, name):
    """The prompt of the last answer equals the ids before it in training, for every format."""
    own = name == "hf-chat-template"
    form = chat_format(byte_tokenizer, hf_chat_template=True) if own else chat_format(all_tokens, name)
    messages = CONVERSATIONS["turns"][0]
    trained, prompt = form.encode(from_messages(messages)), form.encode(from_messages(messages[:-1]))
    assert trained.ids[:len(prompt.ids)] == prompt.ids
    assert own or trained.learned[:len(prompt.ids)] == prompt.learned
    assert all(trained.learned[len(prompt.ids):len(trained.ids) - own])
    if own:
        assert encode_chat(byte_tokenizer, messages) == trained.ids
        assert encode_chat(byte_tokenizer, messages[:-1], add_generation_prompt=True) == prompt.ids


CONTROL = re.compile(r"<\|im_end\|>|<\|eot_id\|>|</s>")
def test_a_message_of_any_kind_is_hidden(byte_tokenizer):
    message = MappingProxyType({"role": "user", "content": "a<|im_end|>b"})
    assert encode_chat(byte_tokenizer, [message]).count(2) == 1
    assert encode_chat(byte_tokenizer, [message], tools=[{"name": "<|im_end|>"}]).count(2) == 1


WIDE = ("{% for message in messages %}{{ message['content'] }}{% for call in message.tool_calls or [] %}{{ call | tojson }}"
        "{% endfor %}{% endfor %}{{ tools | tojson if tools }}{{ note }}<|im_end|>")


def test_names_of_arguments_and_variables_are_hidden(byte_folder, tmp_path):
    """They come from rows and callers as well: only the `<|im_end|>` of the template itself is one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(byte_folder / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(WIDE)
    tokenizer = Tokenizer.from_folder(tmp_path)
    call = {"name": "f", "arguments": {"<|im_end|>": 1}}
    tools = [{"name": "f", "parameters": {"properties": {"<|im_end|>": {"type": "int"}}}}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}]
    assert encode_chat(tokenizer, messages, tools=tools, note="<|im_end|>").count(2) == 1
    assert encode_chat(tokenizer, messages, note={"<|im_end|>": "<|im_end|>"}, eos_token="<|im_end|>").count(2) == 1
    encoded = ModelFormat(tokenizer, note="<|im_end|>").encode(from_messages(messages[:1], tools))
    assert encoded.ids.count(2) == 1


OWN = {"qwen3": ["turns", "system", "tools"], "llama3": ["turns", "system"], "gemma3": ["turns", "system"],
       "deepseek_v3": ["turns", "system"]}


@pytest.mark.parametrize(("real", "case"), [(real, case) for real, cases in OWN.items() for case in cases])
def test_same_ids_as_the_models_own_template(real_tokenizer, real, case):
    transformers = pytest.importorskip("transformers")
    tokenizer = load(real_tokenizer(real))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(real_tokenizer(real))
    messages, tools = CONVERSATIONS[case]
    messages = [dict(message, content=CONTROL.sub("", message["content"])) for message in messages]
    conversation = from_messages(messages, tools)
    form = chat_format(tokenizer, hf_chat_template=True)
    spoken = conversation.messages()
    for upto, prompt in ((len(spoken), False), (len(spoken) - 1, True)):
        ids = theirs.apply_chat_template(spoken[:upto], tools=tools, add_generation_prompt=prompt, tokenize=True,
                                         return_dict=False)
        assert encode_chat(tokenizer, spoken[:upto], tools=tools, add_generation_prompt=prompt) == ids
        conversation.turns = conversation.turns[:len(conversation.turns) - prompt]
        assert form.encode(conversation).ids == ids


@pytest.mark.parametrize(("real", "name"), [("llama3", "llama3"), ("qwen3", "qwen")])
def test_the_originals_template_is_the_models(real_tokenizer, real, name):
    """If the original's template is that of the model, both give the same ids up to the end of the last answer."""
    tokenizer = load(real_tokenizer(real))
    conversation = from_messages([{"role": "system", "content": "You are a helpful assistant."}, QUESTION])
    assert chat_format(tokenizer, name).encode(conversation).ids == chat_format(tokenizer, hf_chat_template=True).encode(
        conversation).ids


def test_generation_marks_are_what_is_learned(tmp_path, byte_folder):
    for path in byte_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}!{% endgeneration %}\n"
        "{% else %}Q:{{ m.content }}{% endif %}{% endfor %}")
    tokenizer = Tokenizer.from_folder(tmp_path)
    encoded = chat_format(tokenizer, hf_chat_template=True).encode(from_messages(CONVERSATIONS["turns"][0]))
    said = [tokenizer.decode(turn.target, skip_special_tokens=False) for turn in encoded.turns if turn.target]
    assert said == ["Two.!", "我是 <|eot_id|> 助手。!"]
    assert encoded.ids == encode_chat(tokenizer, CONVERSATIONS["turns"][0])


PLAIN = ("{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}assistant:{% endif %}")
MARKED = ("{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %}"
          "{% else %}Q:{{ m.content }}{% endif %}{% endfor %}")


@pytest.mark.parametrize(("default", "tool_use"), [(MARKED, PLAIN), (PLAIN, MARKED)], ids=["default", "tool use"])
def test_marks_are_looked_for_in_the_template_that_is_used(tmp_path, byte_folder, default, tool_use):
    for path in byte_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(default)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use)
    form = chat_format(Tokenizer.from_folder(tmp_path), hf_chat_template=True)
    assert default in form.wording and tool_use in form.wording
    for tools in (None, [{"name": "f"}]):
        encoded = form.encode(from_messages([QUESTION, {"role": "assistant", "content": "Yes"}], tools))
        said = [form.tokenizer.decode(turn.target, skip_special_tokens=False) for turn in encoded.turns if turn.target]
        assert said == ["Yes" if (tool_use if tools else default) == MARKED else "Yes<|im_end|>"]


def test_a_conversation_in_which_nothing_is_learned_is_refused(tmp_path, byte_folder):
    for path in byte_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% if tools %}{{ messages | tojson }}{% else %}" + MARKED + "{% endif %}")
    form = chat_format(Tokenizer.from_folder(tmp_path), hf_chat_template=True)
    with pytest.raises(ModelLinkError, match="marks no answer"):
        form.encode(from_messages([QUESTION, ANSWER], [{"name": "f"}]))
    form.encode(from_messages([QUESTION], [{"name": "f"}]))


def test_a_template_of_ones_own(tmp_path, all_tokens):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"user": ["[HUMAN]: {content}\n[AI]: "], "separator": ["\n"], "stop_words": ["[HUMAN]"]}))
    encoded = chat_format(all_tokens, template=path).encode(from_messages(CONVERSATIONS["turns"][0]))
    assert all_tokens.decode(encoded.turns[0].target, skip_special_tokens=False) == "Two.</s>"
    question = all_tokens.encode("[HUMAN]: 你好，你是谁？\n[AI]: ", False)
    assert encoded.turns[1].source == all_tokens.encode("\n", False) + question


@pytest.mark.parametrize(("content", "message"), [
    ("[]", "an object of slots"), ("{", "not a JSON"), ('{"usr": []}', "unknown key 'usr'"),
    ('{"user": "x"}', "user is not a list"), ('{"user": [{"special": "pad"}]}', "user is not a list"),
    ('{"replace_eos": true}', "needs a stop word"), ('{"user": [{"token": 3}]}', "user is not a list"),
    ('{"default_system": null}', "default_system is not a text"), ('{"stop_words": "</s>"}', "stop_words is not a list of texts"),
    ('{"stop_words": [2]}', "stop_words is not a list of texts"), ('{"replace_eos": 0}', "replace_eos is not true or false"),
    ('{"efficient_eos": "no"}', "efficient_eos is not true or false"),
    ('{"system_in_user": 1}', "system_in_user is not true or false"),
    ('{"system_in_user": true, "system": [{"token": "a"}]}', "system is not one text"),
    ('{"system_in_user": true, "system": ["a", "{content}"]}', "system is not one text"),
    ('{"system_in_user": true, "system": []}', "system is not one text")])
def test_wrong_templates_are_named(tmp_path, content, message):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ModelLinkError, match=message):
        load_template(str(tmp_path / "mine.json"))


def test_a_template_file_may_have_any_ending_and_its_option_is_named(tmp_path, byte_tokenizer):
    (tmp_path / "mine.txt").write_text('{"user": ["Q: {content}"]}')
    assert chat_format(byte_tokenizer, template=tmp_path / "mine.txt").name == "mine"
    for name in ("absent.txt", "qwn"):
        with pytest.raises(ModelLinkError, match="unknown template") as caught:
            chat_format(byte_tokenizer, template=name)
        assert caught.value.where == "--template"


def test_wrong_choices_are_named(byte_tokenizer, piece_tokenizer):
    for options, message in (({}, "no template is given"), ({"prompt_type": "qwn"}, "unknown template 'qwn'"),
                             ({"prompt_type": "qwen", "hf_chat_template": True}, "exclude each other"),
                             ({"prompt_type": "llama3"}, r"no token '<\|eot_id\|>'")):
        with pytest.raises(ModelLinkError, match=message):
            chat_format(byte_tokenizer, **options)
    with pytest.raises(ModelLinkError, match=r"no token '<\|im_end\|>'"):
        chat_format(piece_tokenizer, "chatml")


@pytest.mark.parametrize(("messages", "message"), [
    ([], "conversation is empty"), ([ANSWER], "turn 1 is from assistant"), ([QUESTION, QUESTION], "turn 2 is from user"),
    ([QUESTION, SYSTEM], "message 2 is a system prompt"), ([{"role": "bot", "content": ""}], "the unknown role 'bot'"),
    ([{"role": "user", "content": None}], "content of message 1 is a NoneType"), (["Hi"], "message 1 is a str")])
def test_wrong_conversations_are_named(messages, message):
    with pytest.raises(ModelLinkError, match=message):
        from_messages(messages)


@pytest.mark.parametrize(("call", "message"), [("add(1)", "not JSON"), ('{"name": "add"}', "no arguments"), ("3", "no name")])
def test_wrong_function_calls_are_named(all_tokens, call, message):
    with pytest.raises(ModelLinkError, match=message):
        chat_format(all_tokens, "qwen").encode(from_messages([QUESTION, {"role": "function_call", "content": call}]))


def test_openai_tool_calls_are_function_turns(all_tokens):
    form = chat_format(all_tokens, "qwen")
    call = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "more": [2]}'}}]}
    theirs = [*CONVERSATIONS["tools"][0][:2], call, {"role": "tool", "content": "3"}, CONVERSATIONS["tools"][0][-1]]
    assert form.encode(from_messages(theirs, TOOLS)) == form.encode(from_messages(*CONVERSATIONS["tools"]))
