"""Continuations that are given get the log probabilities of the plain forward pass."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import Adapter, set_adapter, with_bank
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE
from jaxcodec.models.steps import forward
from jaxcodec.models.transformer import Model
from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Event, Request, RequestOutput, SamplingParams, Structure

CONTEXT = 64
SCORED = SamplingParams(logprobs=1)
# Float32 sums in another order move these log probabilities by some 2e-4, more or less by the CPU;
# another model or a prompt without its first token moves half of them by 0.5 and more.
ROUNDING = 1e-3
RNG = np.random.default_rng(0)
PROMPT, CONTINUATION = RNG.integers(1, 256, 11).tolist(), RNG.integers(0, 256, 9).tolist()
MODELS = ("base", "first", "own", "whole", "module")

Reference = Callable[[str, list[int], list[int]], np.ndarray]


@pytest.fixture(scope="module")
def reference(base: Model, module: Model, adapters: dict[str, Adapter]) -> Reference:
    """(model, prompt, continuation) -> log probabilities [tokens, V] by the plain forward pass."""

    @functools.cache
    def adapted(name: str) -> Model:
        adapter = adapters[name]
        bank = AdapterBank(1, adapter.rank, adapter.targets)
        return set_adapter(with_bank(base, bank), adapter, 0)

    def logprobs(name: str, prompt: list[int], continuation: list[int]) -> np.ndarray:
        row = [*prompt, *continuation][:-1]  # nobody asks for what follows the last
        none = jnp.zeros(1, jnp.int32)
        tokens = jnp.zeros((1, CONTEXT), jnp.int32).at[0, : len(row)].set(jnp.asarray(row))
        written = {"base": base, "prompt_lengths": jnp.asarray([len(prompt)])}
        model, scheme, options = {
            "base": lambda: (base, CONVENTIONAL, {}),
            "first": lambda: (adapted("first"), ICARUS, {"slots": none}),
            "own": lambda: (adapted("writing"), CONVENTIONAL, {"slots": none}),
            "whole": lambda: (module, CONVENTIONAL, {}),
            "module": lambda: (module, PREFILL_SHARE, written),
        }[name]()
        logits = forward(model, tokens, jnp.asarray([len(row)]), scheme, **options)
        logits = np.asarray(logits[0, len(prompt) - 1 : len(row)], np.float64)
        return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))

    return logprobs


def scoring(model: str, prompt: list[int] = PROMPT, continuation: list[int] = CONTINUATION):
    return Request(model, prompt, SCORED, continuation=continuation)


def check(output: RequestOutput, expected: np.ndarray, continuation: list[int]) -> None:
    assert output.error is None
    assert output.finish_reason == "length"
    assert list(output.tokens) == continuation
    assert output.logprobs is not None
    found = [token.logprob for token in output.logprobs]
    np.testing.assert_allclose(found, expected[np.arange(len(found)), continuation], atol=ROUNDING)
    best = [token.top[0][0] for token in output.logprobs]
    assert best == expected.argmax(axis=-1).tolist()


def test_every_model_scores_as_its_forward_pass_in_one_batch(engine: Engine, reference) -> None:
    outputs = generate(engine, [scoring(name) for name in MODELS])
    for name, output in zip(MODELS, outputs, strict=True):
        check(output, reference(name, PROMPT, CONTINUATION), CONTINUATION)
    engine.check()


def test_what_was_generated_is_scored_as_it_was_generated(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=7, logprobs=1, ignore_eos=True, temperature=1.0, seed=1)
    made = generate(engine, [Request(name, PROMPT, sampling) for name in ("first", "module")])
    again = generate(engine, [scoring(m.model, PROMPT, list(m.tokens)) for m in made])
    for before, after in zip(made, again, strict=True):
        assert before.logprobs is not None
        assert after.logprobs is not None
        np.testing.assert_allclose(
            [t.logprob for t in after.logprobs], [t.logprob for t in before.logprobs], atol=ROUNDING
        )


def test_choices_share_their_context_and_nothing_of_theirs_is_shared(
    engine: Engine, reference
) -> None:
    choices = [[c, *CONTINUATION] for c in range(5)]
    outputs = generate(engine, [scoring("first", PROMPT, choice) for choice in choices])
    for output, choice in zip(outputs, choices, strict=True):
        check(output, reference("first", PROMPT, choice), choice)
    assert [output.cached_tokens for output in outputs] == [0, 8, 8, 8, 8]  # whole pages of 4
    # a continuation that was scored is a prompt like any other afterwards
    [longer] = generate(engine, [scoring("first", PROMPT + choices[0], [7])])
    check(longer, reference("first", PROMPT + choices[0], [7]), [7])
    assert longer.cached_tokens == 8


@pytest.mark.parametrize("prompt", [1, 20])
@pytest.mark.parametrize("name", ["first", "module"])
def test_the_whole_context_is_scored_in_chunks(engine: Engine, reference, name, prompt) -> None:
    tokens = RNG.integers(0, 256, CONTEXT + 1).tolist()
    given = tokens[prompt:]
    # 64 tokens to write, at most 32 a step
    output, other = generate(engine, [scoring(name, tokens[:prompt], given), scoring("base")])
    check(output, reference(name, tokens[:prompt], given), given)
    check(other, reference("base", PROMPT, CONTINUATION), CONTINUATION)


def test_who_was_pushed_out_half_scored_is_scored_from_the_first_token_on(
    engine: Engine, reference
) -> None:
    tokens = RNG.integers(0, 256, CONTEXT + 1).tolist()
    given = tokens[3:]
    urgent = Request("base", PROMPT, SamplingParams(max_tokens=20, ignore_eos=True))
    for request in [urgent] * 7:  # and one row is left
        engine.submit(request)
    engine.submit(dataclasses.replace(scoring("first", tokens[:3], given), id="long", priority=1))
    engine.step()
    engine.step()
    engine.submit(urgent)
    ends = [e for e in steps(engine) if isinstance(e, RequestOutput)]
    assert engine.stats().preemptions == 1
    assert len(ends) == 9
    [end] = [end for end in ends if end.id == "long"]
    check(end, reference("first", tokens[:3], given), given)
    engine.check()


def test_a_fault_between_two_chunks_changes_nothing(engine: Engine, reference, monkeypatch) -> None:
    tokens = RNG.integers(0, 256, CONTEXT).tolist()
    given = tokens[3:]
    engine.submit(scoring("first", tokens[:3], given))
    engine.step()
    with monkeypatch.context() as faulty:
        fault = RuntimeError("a fault")
        faulty.setattr(engine._runner, "run", lambda *_: (_ for _ in ()).throw(fault))
        with pytest.raises(RuntimeError, match="a fault"):
            engine.step()
    [end] = [e for e in steps(engine) if isinstance(e, RequestOutput)]
    check(end, reference("first", tokens[:3], given), given)


def test_a_model_that_is_broken_says_so(make_engine, adapters) -> None:
    engine = make_engine()
    engine.add_model("broken", ICARUS, adapter=adapters["broken"])
    broken, good = generate(engine, [scoring("broken"), scoring("first")])
    assert broken.finish_reason == "error"
    assert "not finite" in str(broken.error)
    assert good.finish_reason == "length"


@pytest.mark.parametrize(
    ("continuation", "sampling", "message"),
    [
        ([5], SamplingParams(), "needs logprobs"),
        ([5], SamplingParams(logprobs=0, n=2), "neither n > 1"),
        ([5], SamplingParams(logprobs=0, structured=Structure.regex("a")), "nor a structure"),
        (5, SCORED, "must be a text or a list of tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(continuation, sampling, message) -> None:
    with pytest.raises(ValueError, match=message):
        Request("base", PROMPT, sampling, continuation=continuation)


@pytest.mark.parametrize(
    ("continuation", "message"),
    [
        ([], "at least one token to be scored"),
        ([256], "Continuation tokens must be whole numbers"),
        ([1] * 55, "has 11 tokens and the continuation 55, the context holds 64"),
        ("text", "need an engine with a tokenizer"),
    ],
)
def test_the_engine_knows_what_it_can_score(engine: Engine, continuation, message) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit(scoring("base", PROMPT, continuation))


def test_a_continuation_may_be_a_text(make_engine, tokenizer) -> None:
    engine = make_engine(tokenizer=tokenizer)
    [text, tokens] = generate(
        engine, [scoring("base", "a + b", " = c"), scoring("base", [*b"a + b"], [*b" = c"])]
    )
    assert text.tokens == tokens.tokens == tuple(b" = c")
    assert text.logprobs == tokens.logprobs


def steps(engine: Engine) -> Iterator[Event]:
    while engine.busy:
        yield from engine.step()
