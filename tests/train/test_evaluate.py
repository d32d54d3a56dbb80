"""Batched greedy answers are those of plain generation; loss and share right are what they say."""

import json

import jax
import numpy as np
import pytest

from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import ICARUS_TARGETS, init_adapter, set_adapter, with_bank
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE
from jaxcodec.models.steps import generate
from jaxcodec.models.transformer import init_model
from jaxcodec.train.data import batches_in_order, read_examples
from jaxcodec.train.evaluate import complete, evaluate, mean_loss
from jaxcodec.train.step import eval_step

PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8], [11, 12], [3] * 5]
NO_EOS = 127  # of these random models no answer holds it


@pytest.fixture(scope="session")
def adapted(model):
    """The model with a random adapter in slot 0."""
    adapter = init_adapter(model, jax.random.key(2), 4)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    return set_adapter(with_bank(model, AdapterBank(1, 4, ICARUS_TARGETS)), adapter, 0)


@pytest.mark.parametrize("scheme", [CONVENTIONAL, ICARUS, PREFILL_SHARE])
def test_answers_are_those_of_plain_generation(model, adapted, config, scheme):
    base = init_model(config, jax.random.key(3)) if scheme == PREFILL_SHARE else None
    slots = None if base else [0] * len(PROMPTS)
    answering = model if base else adapted
    expected = generate(answering, PROMPTS, 6, scheme, base, slots)
    assert not any(NO_EOS in answer for answer in expected)
    # two batches, the second with rows that only fill it
    assert complete(answering, PROMPTS, 6, NO_EOS, scheme, base, batch_size=3) == expected


def test_an_answer_ends_before_its_first_eos(model):
    plain = complete(model, PROMPTS, 8, NO_EOS)
    eos = plain[0][2]
    for ended, answer in zip(complete(model, PROMPTS, 8, eos), plain, strict=True):
        assert ended == (answer[: answer.index(eos)] if eos in answer else answer)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "Prompt 1 has no tokens"), ([[1] * 125], "125 tokens and 4 new ones exceed")],
)
def test_prompts_are_checked(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        complete(model, prompts, 4, 0)


def test_the_mean_loss_does_not_depend_on_the_batch_size(model, pairs_file, tokenizer):
    examples = read_examples(pairs_file, tokenizer, 8)
    whole = eval_step(model, None, examples.rows(np.arange(len(examples))), CONVENTIONAL)
    parts = mean_loss(model, examples, batch_size=7)
    assert float(parts.count) == float(whole.count) == 2 * len(examples)  # a digit and eos
    assert float(parts.mean) == pytest.approx(float(whole.mean), rel=1e-5)
    assert sum(len(batch.counts) for batch in batches_in_order(examples, 7)) == 21


def test_right_answers_are_counted_and_written(model, write_lines, tokenizer, tmp_path):
    prompts = ["ab", "cd", "e"]
    tokens = complete(model, [tokenizer.encode(p) for p in prompts], 3, 0)
    answers = [tokenizer.decode(t) for t in tokens]
    wanted = [answers[0], "wrong", f" {answers[2]}\n"]
    path = write_lines(
        *({"prompt": p, "completion": c} for p, c in zip(prompts, wanted, strict=True))
    )
    result = evaluate(path, tokenizer, model, max_new_tokens=3, out=tmp_path / "result.json")
    assert result["examples"] == 3
    assert result["right"] == pytest.approx(2 / 3)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    expected = mean_loss(model, read_examples(path, tokenizer, 64)).mean
    assert result["loss"] == pytest.approx(float(expected), rel=1e-5)
    seen = []
    evaluate(path, tokenizer, model, max_new_tokens=3, check=lambda p, c: not seen.append((p, c)))
    assert seen == list(zip(prompts, answers, strict=True))


def test_a_text_is_no_question(model, write_lines, tokenizer):
    with pytest.raises(ValueError, match="line 1 has a text: answers need a prompt"):
        evaluate(write_lines({"text": "a"}), tokenizer, model)


@pytest.mark.parametrize(("new", "batch", "name"), [(0, 4, "max_new_tokens"), (4, 0, "batch_size")])
def test_no_tokens_or_no_prompts_at_once_are_refused(model, new, batch, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        complete(model, PROMPTS, new, NO_EOS, batch_size=batch)
