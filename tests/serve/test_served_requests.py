"""What requests ask for, through the whole engine, against a loop over the full forward pass."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.models.config import ModelConfig
from jaxcodec.models.lora import ICARUS_TARGETS, init_adapter
from jaxcodec.models.scheme import ICARUS
from jaxcodec.models.steps import forward
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.models.transformer import Model, init_model
from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Request, RequestOutput, SamplingParams, Structure

V, EOS = 304, 2
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=V,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=128,
    windows=(None, None),
    eos_ids=(EOS,),
)
PROMPT = [5, 9, 40, 9, 77]


@pytest.fixture(scope="module")
def base() -> Model:
    """A random model whose logits are far from uniform."""
    return jax.tree.map(lambda x: 4 * x, init_model(CONFIG, jax.random.key(1)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PretrainedTokenizer:
    """That of the fixtures, with a chat template."""
    made = tmp_path_factory.mktemp("tokenizer")
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "tokenizer", made, dirs_exist_ok=True)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (made / "chat_template.jinja").write_text(template)
    return PretrainedTokenizer(made)


def make_engine(base: Model, tokenizer: PretrainedTokenizer, **options: Any) -> Engine:
    shapes = Buckets(rows=(8,), tokens=(32,), pages=(32,))
    options = {"page_size": 4, "pages": 256, "max_batch": 8, "buckets": shapes} | options
    engine = Engine(base, tokenizer, step_tokens=32, decode_steps=4, **options)
    zero = init_adapter(base, jax.random.key(0), rank=2, alpha=4.0, targets=ICARUS_TARGETS)
    engine.add_model("zero", ICARUS, adapter=zero)
    return engine


@pytest.fixture(scope="module")
def engine(base: Model, tokenizer: PretrainedTokenizer) -> Engine:
    return make_engine(base, tokenizer)


def answer(engine: Engine, prompt: Any = PROMPT, **sampling: Any) -> RequestOutput:
    [output] = generate(engine, [Request("base", prompt, SamplingParams(**sampling))])
    assert output.error is None
    return output


def next_logits(base: Model, tokens: Sequence[int]) -> np.ndarray:
    """By the full forward pass, without a cache; float32 [V]."""
    padded = np.zeros((1, CONFIG.max_positions), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = forward(base, jnp.asarray(padded), jnp.asarray([len(tokens)]))
    return np.asarray(logits[0, len(tokens) - 1])


def choose(logits: np.ndarray, params: SamplingParams, response: list[int]) -> int:
    """A token, by the definitions of `SamplingParams`, one after the other."""
    logits, tokens = logits.astype(np.float64), [*PROMPT, *response]
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in set(tokens):
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in response:
        logits[token] -= params.frequency_penalty
    for token in set(response):
        logits[token] -= params.presence_penalty
    if len(response) < params.min_tokens:
        logits[[EOS, *params.stop_tokens]] = -np.inf
    if params.temperature == 0:
        return int(np.argmax(logits))
    logits /= params.temperature
    order = np.argsort(-logits, kind="stable")[: params.top_k]
    p = np.exp(logits[order] - logits[order[0]])
    p /= p.sum()
    kept = order[: int(np.searchsorted(np.cumsum(p), params.top_p)) + 1]
    kept = [t for t in kept if np.exp(logits[t] - logits[kept[0]]) >= params.min_p]
    key = jax.random.fold_in(jax.random.key(params.seed or 0), len(tokens))
    noisy = logits + np.asarray(jax.random.gumbel(key, (V,)))
    return int(max(kept, key=lambda t: noisy[t]))


CASES = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.8},
    "frequency": {"frequency_penalty": -2.0, "presence_penalty": 0.5},
    "bias": {"logit_bias": {17: 30.0, 18: 29.0}, "presence_penalty": 2.0},
    "temperature": {"temperature": 1.3, "seed": 3},
    "top_k": {"temperature": 2.0, "top_k": 3, "seed": 2**32 - 1},
    "top_p": {"temperature": 1.5, "top_p": 0.7, "seed": 5},
    "min_p": {"temperature": 3.0, "min_p": 0.2, "seed": 6, "repetition_penalty": 1.2},
    "all": {
        "temperature": 2.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "frequency_penalty": 0.4,
        "logit_bias": {40: 3.0}, "repetition_penalty": 0.9, "seed": 7,
    },
    "min_tokens": {"min_tokens": 9, "stop_tokens": (17,), "logit_bias": {17: 90.0}},
}  # fmt: skip


def params_of(name: str) -> SamplingParams:
    return SamplingParams(max_tokens=16, ignore_eos=name != "min_tokens", **CASES[name])


def test_answers_are_those_of_a_loop_over_the_forward_pass(engine, base) -> None:
    # all in one batch, beside each other; and "zero" is the base with an adapter
    requests = [
        Request(("base", "zero")[i % 2], PROMPT, params_of(name)) for i, name in enumerate(CASES)
    ]
    outputs = generate(engine, requests)
    assert len({output.tokens for output in outputs}) == len(CASES)
    for name, output in zip(CASES, outputs, strict=True):
        response: list[int] = []
        params = params_of(name)
        while len(response) < params.max_tokens:
            response.append(choose(next_logits(base, [*PROMPT, *response]), params, response))
            if response[-1] in params.stop_tokens:
                break
        assert output.tokens == tuple(response), name
    assert (outputs[-1].finish_reason, len(outputs[-1].tokens)) == ("stop", 10)  # min_tokens


def test_the_batch_and_preemption_change_no_answer(engine, base, tokenizer) -> None:
    structure = Structure.json_schema({"type": "array", "items": {"type": "integer"}})
    params = [*map(params_of, CASES), SamplingParams(structured=structure, temperature=1.0, seed=9)]
    requests = [Request("base", [*PROMPT, i], p) for i, p in enumerate(params)]
    alone = [generate(engine, [request])[0].tokens for request in requests]
    assert [o.tokens for o in generate(engine, requests)] == alone
    crowded = make_engine(base, tokenizer, pages=24)  # room for three or four
    assert [o.tokens for o in generate(crowded, requests)] == alone
    crowded.check()
    assert crowded.stats().preemptions > 0


def test_logprobs_are_those_of_the_forward_pass(engine, base) -> None:
    output = answer(engine, max_tokens=6, ignore_eos=True, temperature=2.0, seed=1, logprobs=3)
    assert output.logprobs is not None
    tokens = list(PROMPT)
    for token, logprobs in zip(output.tokens, output.logprobs, strict=True):
        expected = np.asarray(jax.nn.log_softmax(next_logits(base, tokens)))
        assert logprobs.logprob == pytest.approx(expected[token], abs=1e-3)
        ids, values = zip(*logprobs.top, strict=True)
        assert list(ids) == np.argsort(-expected)[:3].tolist()
        np.testing.assert_allclose(values, expected[list(ids)], atol=1e-3)
        tokens.append(token)
    chosen_alone = answer(engine, max_tokens=1, logprobs=0).logprobs
    assert [logprobs.top for logprobs in chosen_alone or ()] == [()]
    assert answer(engine, max_tokens=2).logprobs is None


def test_stop_texts_count_after_min_tokens(engine) -> None:
    free = answer(engine, max_tokens=16, ignore_eos=True, temperature=3.0, seed=4)
    piece = engine.tokenizer.decode(free.tokens[:3])[-2:]
    stopping = {"max_tokens": 16, "ignore_eos": True, "temperature": 3.0, "seed": 4}
    early = answer(engine, **stopping, stop=(piece,))
    assert early.finish_reason == "stop"
    assert early.text == free.text[: free.text.find(piece)]
    late = answer(engine, **stopping, stop=(piece,), min_tokens=len(early.tokens))
    assert len(late.tokens) > len(early.tokens)
    assert late.text.startswith(early.text + piece)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_structured_responses_are_complete_and_end(engine, temperature: float) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "kind": {"enum": ["cup", "coat"]}},
        "required": ["n", "kind"],
        "additionalProperties": False,
    }
    params = {"max_tokens": 80, "temperature": temperature}
    biased = {"logit_bias": {13: 2.0}}  # beside other things that touch logits
    requests = [
        Request("base", PROMPT, SamplingParams(**params, structured=Structure.regex("[0-9]{3}x"))),
        Request("base", PROMPT, SamplingParams(max_tokens=5)),
        *(
            Request("zero", [*PROMPT, i], SamplingParams(
                **params, **biased, seed=i, structured=Structure.json_schema(schema)))
            for i in range(4)
        ),
    ]  # fmt: skip
    digits, _, *objects = generate(engine, requests)
    assert re.fullmatch("[0-9]{3}x", digits.text)
    for output in objects:
        if output.finish_reason == "stop":
            value = json.loads(output.text)
            assert isinstance(value["n"], int)
            assert value["kind"] in ("cup", "coat")
        else:  # a number without an end
            assert output.finish_reason == "length"
    assert any(output.finish_reason == "stop" for output in objects)


def test_a_structure_that_is_none_is_refused(engine) -> None:
    params = SamplingParams(structured=Structure.regex("(a"))
    [output] = generate(engine, [Request("base", PROMPT, params)])
    assert "unclosed group" in str(output.error)
    assert not engine.busy


def test_a_chat_is_its_template(engine) -> None:
    messages = [{"role": "user", "content": "how many cups?"}]
    as_text = "<user>how many cups?<assistant>"
    chat = answer(engine, messages, max_tokens=5)
    assert (
        chat.tokens
        == answer(engine, engine.tokenizer.encode_completion(as_text), max_tokens=5).tokens
    )
