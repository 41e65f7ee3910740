# SPDX-License-Identifier: Apache-2.0
"""Chat templates: for every prompt type, the token ids in a chat are those of the training data."""

from __future__ import annotations

import json
import re

import pytest
import tokenizers

from modellink.data_prep import IndexedDataset, PreprocessOptions, Tokenizer, preprocess, template_names
from modellink.infer import load
from modellink.infer.template import Chat, encode_chat_prompt
from modellink.kernels.constants import HF_CHAT_TEMPLATE
from modellink.kernels.errors import ModelLinkError

CONVERSATION = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße 🦊 {content}"},
                {"role": "assistant", "content": "The dog."},
                {"role": "user", "content": "Say <|im_end|> \n"}, {"role": "assistant", "content": "Yes."}]
GREETING = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer(llama, tmp_path_factory):
    """A tokenizer with the control tokens of all templates."""
    folder = tmp_path_factory.mktemp("tokens")
    engine = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
    from importlib import resources
    templates = resources.files("modellink.data_prep.templates").joinpath("templates.json")
    written = templates.read_text(encoding="utf-8")
    engine.add_special_tokens(sorted({*re.findall(r'"token": "(.+?)"', written),
                                      *re.findall(r"<\|?[a-z_]+\|?>", written)}))
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>",
                                                              "bos_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text((llama / "chat_template.jinja").read_text())
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("prompt_type", [*template_names(), HF_CHAT_TEMPLATE])
def test_token_ids_equal_those_of_training_data(tokenizer, tmp_path, prompt_type):
    (tmp_path / "set.jsonl").write_text(json.dumps({"messages": CONVERSATION}))
    form = {"hf_chat_template": True} if prompt_type == HF_CHAT_TEMPLATE else {"prompt_type": prompt_type}
    tags = {"role_tag": "role", "content_tag": "content",
            **{f"{role}_tag": role for role in ("user", "assistant", "system")}}
    summary = preprocess(PreprocessOptions(
        input=(str(tmp_path / "set.jsonl"),), output_prefix=tmp_path / "set",
        tokenizer_name_or_path=tokenizer.folder, handler_name="SharegptStyleInstructionHandler",
        map_keys=json.dumps({"messages": "messages", "tags": tags}), **form), show=False)
    trained, labels = (IndexedDataset(summary.outputs[f"packed_{name}"])[0].tolist()
                       for name in ("input_ids", "labels"))
    for turn in (2, 4):
        prompt_ids, _ = encode_chat_prompt(tokenizer, Chat(CONVERSATION[:turn]), prompt_type)
        assert prompt_ids == trained[:len(prompt_ids)] and len(prompt_ids) > 5
        # the first token of the answer, which is trained on
        assert labels[len(prompt_ids)] == trained[len(prompt_ids)]


def test_stop_words_of_a_template(tokenizer):
    _, ends = encode_chat_prompt(tokenizer, Chat(GREETING), "chatml")
    assert set(ends) == {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|im_start|>")}


def test_a_chat_uses_the_named_template(llama, engine, command, monkeypatch):
    text = "Human: Hello\nAssistant:"
    expected = engine.generate(text, max_new_tokens=12)[0]
    assert engine.generate(GREETING, max_new_tokens=12, prompt_type="default") == [expected]
    assert expected != engine.generate(GREETING, max_new_tokens=12)[0]
    found = command("generate", "--load", llama, "--prompt-type", "default", "--prompt", "Hello",
                    "--max-new-tokens", 12, "--device", "cpu")
    assert found.out == expected.text + "\n"
    lines = iter(["Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    found = command("chat", "--load", llama, "--prompt-type", "default", "--temperature", 0,
                    "--max-new-tokens", 12, "--device", "cpu")
    assert expected.text in found.out


def test_stop_words_of_a_template_are_stop_ids_of_the_request(engine):
    (request,) = engine.requests(GREETING, prompt_type="chatml")
    start = engine.tokenizer.token_to_id("<|im_start|>")
    assert start in request.stop_ids
    assert start not in engine.requests(GREETING, prompt_type="chatml", ignore_eos=True)[0].stop_ids
    assert start not in engine.requests("Hello", prompt_type="chatml")[0].stop_ids


def test_the_template_recorded_in_a_checkpoint_is_used(llama, engine, tmp_path):
    from modellink.ckpt_convert import convert
    convert(llama, tmp_path / "mcore", to="megatron-core")
    (manifest,) = (tmp_path / "mcore").rglob("modellink.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"prompt_type": "default"}))
    expected = engine.generate("Human: Hello\nAssistant:", max_new_tokens=12)
    assert load(tmp_path / "mcore", device="cpu").generate(GREETING, max_new_tokens=12) == expected
    own = load(tmp_path / "mcore", device="cpu", prompt_type=HF_CHAT_TEMPLATE)
    assert own.generate(GREETING, max_new_tokens=12) == engine.generate(GREETING, max_new_tokens=12)


@pytest.mark.parametrize(("args", "message"), [
    (("--prompt-type", "qwem"), "unknown template 'qwem'"),
    (("--prompt-type", "glm4", "--hf-chat-template"), "contradict"),
    (("--prompt-type", "chatglm3"), "has no token '[gMASK]'")])
def test_a_wrong_prompt_type_is_refused(command, llama, args, message):
    found = command("chat", "--load", llama, *args)
    assert (found.status, found.out) == (2, "") and message in found.err


def test_a_conversation_that_ends_with_an_answer_is_refused(engine):
    with pytest.raises(ModelLinkError, match="not one that the model can answer"):
        engine.generate([*GREETING, {"role": "assistant", "content": "Hi"}], prompt_type="default")
