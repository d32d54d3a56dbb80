"""The harness gets from an engine what the plain forward pass gives, one request at a time.

A stand-in has the place of lm-eval, which is too large to be installed for every test: the real one
is run by `make test-eval`.
"""

import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.models.steps import forward
from jaxcodec.models.transformer import Model
from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.request import Request, SamplingParams

CONTEXT, PAIRS = 64, [("two cups", " and"), ("two cups", " or a coat"), ("", "x"), ("a ", "b")]


class Instance(NamedTuple):
    """A request of the harness."""

    args: tuple


class CacheHook:
    def __init__(self):
        self.kept = []

    def add_partial(self, *what: Any) -> None:
        self.kept.append(what)


class LM:
    """What the harness's base class does for us."""

    def __init__(self):
        self.cache_hook = CacheHook()


def instances(*args: tuple) -> list[Instance]:
    return [Instance(one) for one in args]


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    """`jaxcodec.serve.harness`, imported over the stand-in."""
    name = "jaxcodec.serve.harness"
    with pytest.MonkeyPatch.context() as patch:
        for package in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setattr(sys.modules["lm_eval.api.model"], "LM", LM, raising=False)
        patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(name)
        sys.modules.pop(name)


@pytest.fixture
def lm(harness, make_engine, tokenizer) -> Any:
    return harness.EngineLM(make_engine(tokenizer=tokenizer), "whole")


def expected(model: Model, context: Sequence[int], continuation: Sequence[int]):
    """(log probability, greedy) by the plain forward pass."""
    row = [*context, *continuation][:-1]
    tokens = jnp.zeros((1, CONTEXT), jnp.int32).at[0, : len(row)].set(jnp.asarray(row))
    logits = np.asarray(forward(model, tokens, jnp.asarray([len(row)]))[0], np.float64)
    logits = logits[len(context) - 1 : len(row)]
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    greedy = log_p.argmax(axis=-1).tolist() == list(continuation)
    return log_p[np.arange(len(log_p)), list(continuation)].sum(), greedy


def check(found: tuple[float, bool], wanted: tuple[float, bool]) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=1e-3)
    assert found[1] == wanted[1]


def test_continuations_are_scored_after_their_contexts(lm, module) -> None:
    found = lm.loglikelihood(instances(*PAIRS), disable_tqdm=True)
    tokens = [(b"two cups", b" and"), (b"two cups", b" or a coat"), (b"\0", b"x"), (b"a", b" b")]
    for answer, (context, continuation) in zip(found, tokens, strict=True):
        check(answer, expected(module, context, continuation))
    assert lm.cache_hook.kept == [
        ("loglikelihood", pair, answer) for pair, answer in zip(PAIRS, found, strict=True)
    ]


def test_the_greedy_response_is_known_as_such(harness, lm) -> None:
    [made] = generate(lm.engine, [Request("whole", [5, 6], SamplingParams(max_tokens=3))])
    first, *_, last = made.tokens
    pairs = [harness.Scored([5, 6], [*made.tokens]), harness.Scored([5, 6], [first, last + 1])]
    assert [greedy for _, greedy in lm._score(pairs, "", True)] == [True, False]


def test_the_model_that_was_named_answers(harness, lm, base) -> None:
    other = harness.EngineLM(lm.engine, "base")
    for answer, pair in zip(other.loglikelihood(instances(*PAIRS[:2]), True), PAIRS, strict=False):
        check(answer, expected(base, *(text.encode() for text in pair)))


def test_too_long_a_context_loses_its_beginning(lm, module) -> None:
    context, continuation = "0123456789" * 7, "abc"
    with pytest.warns(UserWarning, match="1 requests of the harness are too long for 64 tokens"):
        [found] = lm.loglikelihood(instances((context, continuation)), disable_tqdm=True)
    check(found, expected(module, context.encode()[-62:], continuation.encode()))
    with pytest.raises(ValueError, match="A continuation has 65 tokens"):
        lm.loglikelihood(instances(("a", "b" * 65)), disable_tqdm=True)
    with pytest.raises(ValueError, match="adds no token"):
        lm.loglikelihood(instances(("a", "")), disable_tqdm=True)


@pytest.mark.parametrize("length", [5, 64, 65, 150])
def test_every_token_of_a_text_is_scored_once(lm, module, length) -> None:
    text = (b"Emma ordered 3 cups and 3 coats. " * 5)[:length]
    [found] = lm.loglikelihood_rolling(instances((text.decode(),)), disable_tqdm=True)
    row, wanted = [0, *text], 0.0  # end of text stands at the beginning
    for first in range(1, len(row), CONTEXT):
        end = min(first + CONTEXT, len(row))
        context = row[max(0, end - 1 - CONTEXT) : first]  # of a last window: as much as there is
        wanted += expected(module, context, row[first:end])[0]
    assert found == pytest.approx(wanted, abs=1e-2)


def test_texts_are_generated_up_to_a_stop(lm) -> None:
    asked = SamplingParams(max_tokens=12, ignore_eos=False)
    [plain] = generate(lm.engine, [Request("whole", "two cups", asked)])
    stop = plain.text[3]
    options = [
        {"until": [], "max_gen_toks": 12},
        {"until": stop, "max_new_tokens": 12, "do_sample": False, "temperature": 0.7},
        {"until": ["", stop], "max_gen_toks": 12, "temperature": 0.0},
        {"max_gen_toks": 12, "do_sample": True, "temperature": 5.0, "seed": 3},
    ]
    found = lm.generate_until(instances(*((("two cups", o)) for o in options)), disable_tqdm=True)
    before = plain.text.split(stop)[0]
    assert found[:3] == [plain.text, before, before]
    assert found[3] != plain.text
    with pytest.raises(ValueError, match=r"no generation options \['num_beams'\]"):
        lm.generate_until(instances(("a", {"num_beams": 4})))
    with pytest.warns(UserWarning, match="beginnings"):
        lm.generate_until(instances(("a" * 60, {"max_gen_toks": 12})), disable_tqdm=True)


def test_a_text_that_already_begins_as_texts_begin_is_not_begun_twice(harness, make_engine) -> None:
    class Beginning:
        """Bytes after a 1, which is also the text of "<s>"."""

        eos_id, eos_ids = 0, (0,)

        def encode(self, text: str) -> list[int]:
            return [1, *self.encode_completion(text)]

        def encode_completion(self, text: str) -> list[int]:
            return [t for part in text.split("<s>") for t in (1, *part.encode())][1:]

        def decode(self, tokens: Sequence[int]) -> str:
            return bytes(tokens).decode(errors="replace")

    lm = harness.EngineLM(make_engine(tokenizer=Beginning()))
    plain, chat, empty = (lm._pair(c, "b") for c in ("a", "<s>a", ""))
    assert plain == chat == harness.Scored([1, 97], [98])
    assert empty == harness.Scored([1], [98])


def test_what_cannot_be_driven_is_refused(harness, make_engine, tokenizer) -> None:
    with pytest.raises(ValueError, match="give the engine a tokenizer"):
        harness.EngineLM(make_engine())
    with pytest.raises(ValueError, match="No model is served as 'nobody'; there are base, first"):
        harness.EngineLM(make_engine(tokenizer=tokenizer), "nobody")
    with pytest.raises(NotImplementedError, match="PretrainedTokenizer"):
        harness.EngineLM(make_engine(tokenizer=tokenizer)).apply_chat_template([])


def test_without_the_harness_it_says_what_to_install(monkeypatch) -> None:
    for package in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "jaxcodec.serve.harness", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"jaxcodec\[eval\]"):
        importlib.import_module("jaxcodec.serve.harness")
