"""Reading JSONL: errors name the place; every token is predicted once; the order can be resumed."""

import numpy as np
import pytest

from jaxcodec.train.data import (
    batches_in_order,
    read_examples,
    read_jsonl,
    shuffled_batches,
)
from jaxcodec.train.loss import target_mask

PAIR = {"prompt": "ab", "completion": "cd"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"data.jsonl, line 2 is not JSON"),
        (b'{"text": "\xff"}', r"line 2 is not JSON"),
        (b"", r"line 2 is not JSON"),
        (b"[1]", r"line 2 holds a list"),
        ({"prompt": "a"}, r"line 2 has the keys \['prompt'\]"),
        ({"prompt": "a", "completion": "b", "id": "c"}, r"'completion', 'id', 'prompt'"),
        ({"text": 3}, r"line 2: 'text' is a int"),
    ],
)
def test_a_bad_line_is_named(write_lines, line, message):
    with pytest.raises(ValueError, match=message):
        read_jsonl(write_lines(PAIR, line, PAIR))


def test_an_empty_file_is_refused(write_lines):
    with pytest.raises(ValueError, match="is empty"):
        read_jsonl(write_lines())


def test_a_pair_beyond_max_length_is_refused_with_its_lengths(write_lines, tokenizer):
    path = write_lines(PAIR, {"prompt": "abc", "completion": "de"})
    assert len(read_examples(path, tokenizer, 6)) == 2
    with pytest.raises(ValueError, match=r"line 2: 3 prompt and 2 completion tokens with eos"):
        read_examples(path, tokenizer, 5)


def test_an_empty_prompt_is_refused(write_lines, tokenizer):
    with pytest.raises(ValueError, match="line 1: the prompt has no tokens"):
        read_examples(write_lines({"prompt": "", "completion": "a"}), tokenizer, 8)


def test_a_pair_is_prompt_completion_eos(write_lines, tokenizer):
    examples = read_examples(write_lines(PAIR), tokenizer, 8)
    batch = examples.rows(np.array([0, -1]))
    assert batch.tokens.tolist() == [[*b"abcd", 0, 0, 0, 0], [0] * 8]
    assert batch.counts.tolist() == [5, 0]
    assert batch.prompt_lengths.tolist()[0] == 2


@pytest.mark.parametrize("max_length", [2, 3, 5, 64])
def test_every_token_of_the_texts_but_the_first_is_predicted_once(
    write_lines, tokenizer, max_length
):
    path = write_lines({"text": "hello"}, {"text": "you"}, {"text": "there"})
    examples = read_examples(path, tokenizer, max_length)
    predicted = []
    for batch in batches_in_order(examples, 4):
        predicted += batch.tokens[:, 1:][np.asarray(target_mask(batch))].tolist()
    assert predicted == [*b"hello\0you\0there\0"][1:]


def test_texts_and_pairs_mix_and_packing_makes_texts_of_pairs(write_lines, tokenizer):
    path = write_lines(PAIR, {"text": "xyz"}, PAIR)
    mixed = read_examples(path, tokenizer, 16)
    assert mixed.counts.tolist() == [5, 5, 4]
    assert mixed.prompt_lengths.tolist() == [2, 2, 1]
    packed = read_examples(path, tokenizer, 16, pack=True)
    assert packed.tokens.tolist() == [*b"abcd\0xyz\0abcd\0"]
    assert packed.prompt_lengths.tolist() == [1] * len(packed)


def test_an_epoch_holds_every_example_once_and_the_next_has_another_order(write_lines, tokenizer):
    texts = [{"prompt": chr(65 + i), "completion": "x"} for i in range(24)]
    batches = shuffled_batches(read_examples(write_lines(*texts), tokenizer, 8), 4, seed=1)
    first, second = ([next(batches).tokens[:, 0].tolist() for _ in range(6)] for _ in range(2))
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(65, 89))
    assert first != second


def test_a_restored_position_gives_the_same_batches(write_lines, tokenizer):
    path = write_lines(*({"prompt": chr(65 + i), "completion": "x"} for i in range(10)))
    examples = read_examples(path, tokenizer, 8)
    batches = shuffled_batches(examples, 4, seed=0)
    for _ in range(3):
        next(batches)
    position = batches.get_state()
    expected = [next(batches).tokens.tolist() for _ in range(5)]
    again = shuffled_batches(examples, 4, seed=0)
    again.set_state(position)
    assert [next(again).tokens.tolist() for _ in range(5)] == expected


def test_the_digest_changes_with_content_and_length(write_lines, tokenizer):
    path = write_lines(PAIR)
    digests = {read_examples(path, tokenizer, n).digest() for n in (8, 9)}
    digests.add(read_examples(write_lines(PAIR, PAIR), tokenizer, 8).digest())
    assert len(digests) == 3
