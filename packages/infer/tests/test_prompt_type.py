"""The template around a conversation: the ids a model reads in chat are those it was trained with, for every prompt type."""

from __future__ import annotations

import json
import re

import pytest
import tokenizers

from modellink.data_prep import IndexedDataset, PreprocessOptions, Tokenizer, preprocess, template_names
from modellink.infer import load
from modellink.infer.template import HF_CHAT_TEMPLATE, Chat, encode_prompt
from modellink.kernels.errors import ModelLinkError

SAID = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße 🦊 {content}"},
        {"role": "assistant", "content": "The dog."}, {"role": "user", "content": "Say <|im_end|> \n"},
        {"role": "assistant", "content": "Yes."}]
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def speaks_all(llama, tmp_path_factory):
    """A tokenizer with the control tokens of every template."""
    folder = tmp_path_factory.mktemp("tokens")
    engine = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
    from importlib import resources
    written = resources.files("modellink.data_prep.templates").joinpath("templates.json").read_text(encoding="utf-8")
    engine.add_special_tokens(sorted({*re.findall(r'"token": "(.+?)"', written), *re.findall(r"<\|?[a-z_]+\|?>", written)}))
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text((llama / "chat_template.jinja").read_text())
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("prompt_type", [*template_names(), HF_CHAT_TEMPLATE])
def test_chat_reads_what_training_read(speaks_all, tmp_path, prompt_type):
    (tmp_path / "set.jsonl").write_text(json.dumps({"messages": SAID}))
    form = {"hf_chat_template": True} if prompt_type == HF_CHAT_TEMPLATE else {"prompt_type": prompt_type}
    tags = {"role_tag": "role", "content_tag": "content", **{f"{role}_tag": role for role in ("user", "assistant", "system")}}
    summary = preprocess(PreprocessOptions(
        input=(str(tmp_path / "set.jsonl"),), output_prefix=tmp_path / "set", tokenizer_name_or_path=speaks_all.folder,
        handler_name="SharegptStyleInstructionHandler", map_keys=json.dumps({"messages": "messages", "tags": tags}), **form),
        show=False)
    trained, labels = (IndexedDataset(summary.outputs[f"packed_{name}"])[0].tolist() for name in ("input_ids", "labels"))
    for turn in (2, 4):
        asked, _ = encode_prompt(speaks_all, Chat(SAID[:turn]), prompt_type)
        assert asked == trained[:len(asked)] and len(asked) > 5
        assert labels[len(asked)] == trained[len(asked)]  # the next token is the first of the answer, and learned


def test_stop_words_of_a_template_end_an_answer(speaks_all):
    _, ends = encode_prompt(speaks_all, Chat(HELLO), "chatml")
    assert set(ends) == {speaks_all.token_to_id("<|im_end|>"), speaks_all.token_to_id("<|im_start|>")}


def test_a_chat_goes_through_the_named_template(llama, engine, command, monkeypatch):
    text = "Human: Hello\nAssistant:"
    expected = engine.generate(text, max_new_tokens=12)[0]
    assert engine.generate(HELLO, max_new_tokens=12, prompt_type="default") == [expected]
    assert expected != engine.generate(HELLO, max_new_tokens=12)[0]
    found = command("generate", "--load", llama, "--prompt-type", "default", "--prompt", "Hello", "--max-new-tokens", 12,
                    "--device", "cpu")
    assert found.out == expected.text + "\n"
    lines = iter(["Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    found = command("chat", "--load", llama, "--prompt-type", "default", "--temperature", 0, "--max-new-tokens", 12,
                    "--device", "cpu")
    assert expected.text in found.out


def test_stop_ids_of_a_template_work_in_a_generation(engine):
    (request,) = engine.requests(HELLO, prompt_type="chatml")
    start = engine.tokenizer.token_to_id("<|im_start|>")
    assert start in request.stop_ids
    assert start not in engine.requests(HELLO, prompt_type="chatml", ignore_eos=True)[0].stop_ids
    assert start not in engine.requests("Hello", prompt_type="chatml")[0].stop_ids


def test_a_checkpoint_says_what_it_was_trained_with(llama, engine, tmp_path):
    from modellink.ckpt_convert import convert
    convert(llama, tmp_path / "mcore", to="megatron-core")
    (manifest,) = (tmp_path / "mcore").rglob("modellink.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"prompt_type": "default"}))
    expected = engine.generate("Human: Hello\nAssistant:", max_new_tokens=12)
    assert load(tmp_path / "mcore", device="cpu").generate(HELLO, max_new_tokens=12) == expected
    own = load(tmp_path / "mcore", device="cpu", prompt_type=HF_CHAT_TEMPLATE)
    assert own.generate(HELLO, max_new_tokens=12) == engine.generate(HELLO, max_new_tokens=12)


@pytest.mark.parametrize(("args", "message"), [
    (("--prompt-type", "qwem"), "no template 'qwem'"), (("--prompt-type", "glm4", "--hf-chat-template"), "contradict"),
    (("--prompt-type", "chatglm3"), "has no token '[gMASK]'")])
def test_a_wrong_prompt_type_is_refused(command, llama, args, message):
    found = command("chat", "--load", llama, *args)
    assert (found.status, found.out) == (2, "") and message in found.err


def test_a_conversation_that_asks_nothing_is_refused(engine):
    with pytest.raises(ModelLinkError, match="does not end with something to answer"):
        engine.generate([*HELLO, {"role": "assistant", "content": "Hi"}], prompt_type="default")
