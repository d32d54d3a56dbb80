from itertools import islice

import pytest
from transformers import AutoTokenizer

from jaxcodec.demo.exercises import exercises
from jaxcodec.demo.tasks import AGENTS, STOP, stories
from jaxcodec.demo.tokenizer import END, PAD, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(islice(exercises(0), 500), vocabulary_size=600)


@pytest.fixture(scope="module")
def contexts():
    told = islice(stories(0, "heldout"), 30)
    return [(s.prompt(agent), s.completion(agent)) for s in told for agent in AGENTS]


def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.encode("1234+56").tokens == ["1", "2", "3", "4", "+", "5", "6"]
    assert not [t for t in tokenizer.get_vocab() if len(t) > 1 and any(map(str.isdigit, t))]


def test_any_text_survives_the_round_trip(tokenizer):
    text = " def f(x):\n\treturn 'é日本' # 3.14\n\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_turns_have_the_same_tokens_alone_and_within_the_context(tokenizer, contexts):
    for prompt, completion in contexts:
        apart = tokenizer.encode(prompt).ids + tokenizer.encode(completion).ids
        assert tokenizer.encode(prompt + completion).ids == apart


def test_stop_is_one_token_and_ends_every_turn(tokenizer, contexts):
    (stop,) = tokenizer.encode(STOP).ids
    for prompt, completion in contexts:
        assert tokenizer.encode(prompt).ids[-1] == stop
        assert tokenizer.encode(completion).ids.index(stop) == len(tokenizer.encode(completion)) - 1


def test_transformers_loads_the_same_tokenizer(tokenizer, contexts, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (END, END, PAD)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)
    for prompt, _ in contexts:
        assert loaded.encode(prompt) == tokenizer.encode(prompt).ids
        assert loaded.decode(loaded.encode(prompt)) == prompt


def test_too_little_text_for_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="pass more text"):
        train_tokenizer(["7 + 5 = 12"], vocabulary_size=600)
