"""A tokenizer is read whole, or refused with a reason."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcodec.models.tokenizer import PretrainedTokenizer

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "tokenizer"
TEXT = "Grüße, 世界! The end."


@pytest.fixture(scope="module")
def tokenizer() -> PretrainedTokenizer:
    return PretrainedTokenizer(TOKENIZER)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory whose tokenizer may be damaged."""
    shutil.copytree(TOKENIZER, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_text_survives_the_tokens(tokenizer: PretrainedTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eos_ids == (tokenizer.eos_id,) == (2,)


def test_decoding_is_that_of_transformers(tokenizer: PretrainedTokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(300) for _ in range(rng.randrange(12))]
        assert tokenizer.decode(tokens) == tokenizer.pretrained.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_text_is_that_of_the_tokens_bytes(copy: Path) -> None:
    definition = json.loads((copy / "tokenizer.json").read_text())
    ids = {token["id"] for token in definition["added_tokens"]}
    number = 1 + max(ids.union(definition["model"]["vocab"].values()))
    added = definition["added_tokens"][0] | {
        "id": number,
        "content": "an added ¡é世",
        "special": False,
    }
    definition["added_tokens"].append(added)
    (copy / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = PretrainedTokenizer(copy)
    assert tokenizer.token_bytes is not None
    assert tokenizer.decode([number]) == "an added ¡é世"
    rng = random.Random(1)
    for _ in range(500):
        tokens = [rng.randrange(number + 3) for _ in range(rng.randrange(12))]
        joined = b"".join(tokenizer.token_bytes.get(token, b"") for token in tokens)
        assert joined.decode(errors="replace") == tokenizer.decode(tokens)


def test_tokens_that_depend_on_others_have_no_bytes(copy: Path) -> None:
    definition = json.loads((copy / "tokenizer.json").read_text())
    definition["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    (copy / "tokenizer.json").write_text(json.dumps(definition))
    assert PretrainedTokenizer(copy).token_bytes is None


def test_a_completion_goes_on_where_the_prompt_stops(tokenizer: PretrainedTokenizer) -> None:
    tokens = [*tokenizer.encode("hello "), *tokenizer.encode_completion("world")]
    assert tokenizer.eos_id not in tokens[1:]
    assert tokenizer.decode([*tokens, tokenizer.eos_id]) == "hello world"


def test_a_lone_surrogate_is_refused(tokenizer: PretrainedTokenizer) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_completion):
        with pytest.raises(ValueError, match="not Unicode text"):
            encode("a \ud800 b")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
        PretrainedTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_tokenizer_is_refused(copy: Path, name: str, content: str) -> None:
    (copy / name).write_text(content)
    with pytest.raises(ValueError, match="holds no tokenizer that can be read|end-of-text token"):
        PretrainedTokenizer(copy)


def test_a_tokenizer_without_end_of_text_is_refused(copy: Path) -> None:
    file = copy / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no end-of-text token.*set eos_token"):
        PretrainedTokenizer(copy)


def test_reading_one_writes_nothing_to_the_terminal() -> None:
    script = (
        "import sys; from jaxcodec.models.tokenizer import PretrainedTokenizer; "
        "PretrainedTokenizer(sys.argv[1])"
    )
    command = [sys.executable, "-c", script, str(TOKENIZER)]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# As ChatML has it, with tools before the conversation.
TEMPLATE = """{{ bos_token }}{% if tools %}tools: {{ tools | tojson }}
{% endif %}{% for message in messages %}{% if message.role == "nobody" %}\
{{ raise_exception("no such role") }}{% endif %}<|{{ message.role }}|>{{ message.content }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]


@pytest.fixture
def chat(copy: Path) -> PretrainedTokenizer:
    """A tokenizer with a chat template."""
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return PretrainedTokenizer(copy)


def test_a_chat_goes_through_the_template(chat: PretrainedTokenizer) -> None:
    expected = "<s><|user|>hi\n<|assistant|>yes?\n<|assistant|>"
    assert chat.encode_chat(MESSAGES) == chat.encode_completion(expected)
    assert chat.encode_chat(MESSAGES) == chat.pretrained.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    weather = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    tools = f"<s>tools: {json.dumps([weather])}\n"
    with_tools = chat.encode_completion(tools + expected.removeprefix("<s>"))
    assert chat.encode_chat(MESSAGES, [weather]) == with_tools


def test_what_the_template_does_not_take_is_said(
    chat: PretrainedTokenizer, tokenizer: PretrainedTokenizer
) -> None:
    with pytest.raises(ValueError, match="does not take these messages: no such role"):
        chat.encode_chat([{"role": "nobody", "content": ""}])
    with pytest.raises(ValueError, match="not Unicode text"):
        chat.encode_chat([{"role": "user", "content": "\ud800"}])
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.encode_chat(MESSAGES)
