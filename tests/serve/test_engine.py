"""The engine answers as plain generation does, whatever is batched, shared or pushed out."""

import random

import jax
import numpy as np
import pytest

from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import ALL_TARGETS, ICARUS_TARGETS, set_adapter, with_bank
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE
from jaxcodec.models.steps import generate as plain_generate
from jaxcodec.models.transformer import init_model, linear_shapes
from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Request, RequestOutput, SamplingParams
from jaxcodec.serve.served_models import BASE
from jaxcodec.serve.step_program import Layout
from jaxcodec.spec import CodebookSpec

NAMES = ("base", "first", "second", "own", "whole", "module", "adapted")
NEW = 10
# Plain generation compiles for the longest prompt of a batch: this one goes with every prompt.
FILLER = [1] * 50
GREEDY = SamplingParams(max_tokens=NEW, ignore_eos=True)


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, 256) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="session")
def plain(base, module, adapters):
    """Greedy answers without an engine: (name, prompt) -> NEW tokens."""
    bank = with_bank(base, AdapterBank(4, 4, ALL_TARGETS))
    for slot, name in enumerate(("first", "second", "writing"), start=1):
        bank = set_adapter(bank, adapters[name], slot)
    how = {
        "base": (base, CONVENTIONAL, None, None),
        "first": (bank, ICARUS, None, [1]),
        "second": (bank, ICARUS, None, [2]),
        "own": (bank, CONVENTIONAL, None, [3]),
        "whole": (module, CONVENTIONAL, None, None),
        "module": (module, PREFILL_SHARE, base, None),
        "adapted": (bank, PREFILL_SHARE, base, [3]),
    }

    def answer(name: str, prompt: list[int]) -> tuple[int, ...]:
        model, scheme, writer, slots = how[name]
        rows = slots and slots * 2
        return tuple(plain_generate(model, [prompt, FILLER], NEW, scheme, writer, rows)[0])

    return answer


def answers(engine: Engine, names, prompts, sampling=GREEDY) -> list[tuple[int, ...]]:
    """Tokens of each (name, prompt), served all at once; nothing is left over."""
    outputs = generate(
        engine, [Request(n, p, sampling) for n, p in zip(names, prompts, strict=True)]
    )
    assert all(o.error is None for o in outputs), [o.error for o in outputs]
    engine.check()
    assert engine.stats().pages.held == 0
    return [o.tokens for o in outputs]


def test_every_scheme_answers_as_plain_generation(engine, plain) -> None:
    prompts = random_prompts([1, 2, 5, 13, 4, 8, 31])
    together = answers(engine, NAMES, prompts)
    assert together == [plain(n, p) for n, p in zip(NAMES, prompts, strict=True)]
    assert len(set(together)) == len(NAMES)


def test_a_full_mixed_batch_equals_each_request_alone(make_engine) -> None:
    prompts = random_prompts([3, 9, 17, 6, 12, 5, 20] * 2, seed=1)
    names = NAMES * 2
    sampled = [
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=i, max_tokens=NEW)
        for i in range(14)
    ]
    requests = [Request(n, p, s) for n, p, s in zip(names, prompts, sampled, strict=True)]
    together = generate(make_engine(max_batch=8), requests)
    alone = [generate(make_engine(), [request])[0] for request in requests[:7]]
    assert [o.tokens for o in together[:7]] == [o.tokens for o in alone]
    assert all(o.finish_reason in ("stop", "length") for o in together)


def test_icarus_models_share_prompt_and_response(engine, plain) -> None:
    (prompt,) = random_prompts([9])
    (first,) = answers(engine, ["first"], [prompt])
    assert engine.stats().prefill_tokens == 8
    # 18 of 19 tokens are cached, 4 whole pages of them; the new prompt has 21
    context = [*prompt, *first, 7, 7]
    (second,) = answers(engine, ["second"], [context])
    stats = engine.stats()
    assert (stats.reused_tokens, stats.prefill_tokens) == (16, 8 + 20 - 16)
    assert second == plain("second", context)
    # and so does the base
    assert answers(engine, ["base"], [context]) == [plain("base", context)]
    assert engine.stats().prefill_tokens == stats.prefill_tokens


def test_prefill_share_shares_prompts_alone(engine, plain) -> None:
    (prompt,) = random_prompts([10])
    (first,) = answers(engine, ["module"], [prompt])
    context = [*prompt, *first, 7]
    (second,) = answers(engine, ["adapted"], [context])
    stats = engine.stats()
    # positions 0 to 8 are the base's: two whole pages
    assert (stats.reused_tokens, stats.prefill_tokens) == (8, 9 + 20 - 8)
    assert second == plain("adapted", context)
    # an icarus model finds the same prompt
    answers(engine, ["first"], [context])
    assert engine.stats().prefill_tokens == stats.prefill_tokens


def test_conventional_models_share_with_themselves_alone(engine, plain) -> None:
    (prompt,) = random_prompts([9])
    answers(engine, ["own", "whole", "base"], [prompt] * 3)
    assert engine.stats().prefill_tokens == 24
    assert engine.stats().reused_tokens == 0
    assert answers(engine, ["own"], [prompt]) == [plain("own", prompt)]
    assert engine.stats().prefill_tokens == 24


def test_private_caches_share_nothing(make_engine, plain) -> None:
    engine = make_engine(share_prefixes=False)
    (prompt,) = random_prompts([9])
    for name in ("first", "second", "module", "base"):
        assert answers(engine, [name], [prompt]) == [plain(name, prompt)]
    assert engine.stats().reused_tokens == 0
    assert engine.stats().pages.cached == 4 + 4 + 2 + 4


def test_a_tiny_pool_gives_the_same_answers(make_engine, plain) -> None:
    engine = make_engine(pages=12)
    prompts = random_prompts([14, 11, 9, 16, 7, 12, 10], seed=2)
    together = answers(engine, NAMES, prompts)
    assert together == [plain(n, p) for n, p in zip(NAMES, prompts, strict=True)]
    assert engine.stats().preemptions > 0
    assert engine.stats().pages.peak == 12


def test_a_prompt_longer_than_a_chunk(make_engine, plain) -> None:
    engine = make_engine(max_batch=2, step_tokens=8)
    (long, short) = random_prompts([40, 5])
    together = answers(engine, ["own", "first"], [long, short])
    assert together == [plain("own", long), plain("first", short)]


def test_the_context_ends_a_response(engine, plain) -> None:
    prompts = random_prompts([50, 64])
    sampling = SamplingParams(max_tokens=50, ignore_eos=True)
    outputs = generate(engine, [Request("first", p, sampling) for p in prompts])
    assert [(len(o.tokens), o.finish_reason) for o in outputs] == [(15, "length"), (1, "length")]
    assert outputs[0].tokens[:NEW] == plain("first", prompts[0])


def test_end_of_text_ends_a_response(make_engine, plain, tokenizer) -> None:
    (prompt,) = random_prompts([6])
    greedy = plain("base", prompt)
    tokenizer.eos_ids = (greedy[3],)
    engine = make_engine(tokenizer=tokenizer)
    expected = greedy[: greedy.index(greedy[3]) + 1]
    (output,) = generate(engine, [Request("base", prompt, SamplingParams(max_tokens=NEW))])
    assert (output.tokens, output.finish_reason) == (expected, "stop")


def test_text_streams_and_stops(make_engine, tokenizer, plain) -> None:
    engine = make_engine(tokenizer=tokenizer)
    text = tokenizer.decode(plain("first", tokenizer.encode("Once")))
    stop = text[len(text) // 2 :][:2]
    streamed: list[str] = []
    outputs = generate(
        engine,
        [
            Request("first", "Once", GREEDY),
            Request("first", "Once", SamplingParams(max_tokens=NEW, ignore_eos=True, stop=(stop,))),
        ],
        on_text=lambda request, piece: streamed.append(piece) if request.sampling.stop else None,
    )
    assert (outputs[0].text, outputs[0].finish_reason) == (text, "length")
    assert (outputs[1].text, outputs[1].finish_reason) == (text[: text.index(stop)], "stop")
    assert "".join(streamed) == outputs[1].text


def test_a_broken_row_fails_alone(make_engine, adapters, plain) -> None:
    engine = make_engine(pages=12)
    engine.add_model("broken", ICARUS, adapter=adapters["broken"])
    engine.add_model("writes nan", CONVENTIONAL, adapter=adapters["broken"])
    names = ["first", "broken", "second", "writes nan", "own"]
    prompts = random_prompts([9, 9, 5, 17, 6])
    outputs = generate(engine, [Request(n, p, GREEDY) for n, p in zip(names, prompts, strict=True)])
    for name, prompt, output in zip(names, prompts, outputs, strict=True):
        if name in ("broken", "writes nan"):
            assert output.finish_reason == "error"
            assert "not finite" in str(output.error)
        else:
            assert output.tokens == plain(name, prompt)
    engine.check()
    # whoever gets the broken row's pages next is not harmed by what is in them
    for seed in range(3):
        for name, prompt in zip(("own", "module"), random_prompts([31, 30], seed), strict=True):
            assert answers(engine, [name], [prompt]) == [plain(name, prompt)]


def test_the_same_seed_gives_the_same_answer_after_preemption(make_engine) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
    prompts = random_prompts([9, 10, 11])
    roomy = answers(make_engine(), ["first"] * 3, prompts, sampling)
    tight_engine = make_engine(pages=12)
    assert answers(tight_engine, ["first"] * 3, prompts, sampling) == roomy
    assert tight_engine.stats().preemptions > 0


def test_cancelling_frees_everything_at_once(make_engine, plain) -> None:
    engine = make_engine(max_batch=2)
    prompts = random_prompts([9, 12, 5])
    ids = [engine.submit(Request("first", p, GREEDY)) for p in prompts]
    events = [event for _ in range(3) for event in engine.step()]
    assert engine.stats().running == 2
    engine.cancel(ids[0])
    engine.cancel(ids[2])
    assert (engine.stats().running, engine.stats().waiting) == (1, 0)
    running, waiting, *later = engine.step()
    assert isinstance(running, RequestOutput)
    assert isinstance(waiting, RequestOutput)
    events += later
    assert (running.finish_reason, len(running.tokens)) == ("cancelled", 2)
    assert (waiting.finish_reason, waiting.tokens) == ("cancelled", ())
    engine.check()
    while engine.busy:
        events += engine.step()
    (end,) = [event for event in events if isinstance(event, RequestOutput)]
    assert (end.id, end.tokens) == (ids[1], plain("first", prompts[1]))
    engine.check()
    assert engine.stats().pages.held == 0
    with pytest.raises(ValueError, match="No request with the id"):
        engine.cancel(ids[0])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("nobody", [1, 2]), "No model is served as 'nobody'; there are base, first"),
        (Request("base", []), "at least one token"),
        (Request("base", [1] * 65), "has 65 tokens, the context holds 64"),
        (Request("base", [256]), "got 256"),
        (Request("base", [-1]), r"in \[0, 256\), the model's vocabulary, got -1"),
        (Request("base", [1, 2.5]), "whole numbers in .*, got 2.5"),
        (Request("base", "text"), "need an engine with a tokenizer"),
        (Request("base", [1], SamplingParams(stop=("x",))), "need an engine with a tokenizer"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_bad_requests_are_refused_and_others_served(engine, plain, request_, message) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    good = Request("first", [5, 6, 7], GREEDY)
    refused, output = generate(engine, [request_, good])
    assert refused.finish_reason == "error"
    assert output.tokens == plain("first", [5, 6, 7])


def test_a_prompt_larger_than_the_pool_is_refused(make_engine) -> None:
    engine = make_engine(pages=5)
    with pytest.raises(ValueError, match="has 21 tokens, the context holds 20"):
        engine.submit(Request("base", [1] * 21))


def test_an_id_in_use_is_refused(engine) -> None:
    engine.submit(Request("base", [1], GREEDY, id="a"))
    with pytest.raises(ValueError, match="'a' is being served"):
        engine.submit(Request("base", [1], GREEDY, id="a"))


def test_models_that_cannot_be_served_are_refused(engine, adapters, module) -> None:
    before = engine.models
    with pytest.raises(ValueError, match="k_proj and v_proj"):
        engine.add_model("new", ICARUS, adapter=adapters["writing"])
    with pytest.raises(ValueError, match="an adapter on the base, not a model"):
        engine.add_model("new", ICARUS, model=module)
    with pytest.raises(ValueError, match="name of its own, got 'first'"):
        engine.add_model("first", ICARUS, adapter=adapters["first"])
    with pytest.raises(ValueError, match="an adapter or a model, and not both"):
        engine.add_model("new", CONVENTIONAL)
    config = module.config.__class__(**{**vars(module.config), "num_layers": 1, "windows": (None,)})
    other = init_model(config, jax.random.key(0))
    with pytest.raises(ValueError, match="its num_layers is 1, not 2"):
        engine.add_model("new", CONVENTIONAL, model=other)
    assert engine.models == before


def test_without_adapters_the_base_runs_one_stream(base, plain, one_shape) -> None:
    engine = Engine(base, page_size=4, pages=64, max_batch=8, step_tokens=32, buckets=one_shape)
    assert engine._models.layouts(BASE) == [Layout(two_streams=False)]
    (prompt,) = random_prompts([6])
    assert answers(engine, ["base"], [prompt]) == [plain("base", prompt)]


def test_nothing_compiles_after_warm_up(base, adapters, one_shape) -> None:
    compilations = []

    def count(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    # a slot for one adapter, which two have to share
    bank = AdapterBank(2, 4, ICARUS_TARGETS)
    engine = Engine(
        base, page_size=4, pages=64, max_batch=8, step_tokens=32, bank=bank, buckets=one_shape
    )
    engine.add_model("first", ICARUS, adapter=adapters["first"])
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        engine.warm_up()
        assert compilations
        compilations.clear()
        sampled = SamplingParams(temperature=0.5, top_k=9, max_tokens=4, logprobs=2)
        penalized = SamplingParams(repetition_penalty=1.2, logit_bias={3: 1.0}, max_tokens=4)
        engine.add_model("second", ICARUS, adapter=adapters["second"])
        names, prompts = ["base", "first", "second"] * 6, random_prompts([3, 20, 33, 40, 1, 2] * 3)
        params = [GREEDY, sampled, penalized, sampled, GREEDY, GREEDY] * 3
        outputs = generate(engine, list(map(Request, names, prompts, params)))
        engine.remove_model("first")
        engine.add_model("first", ICARUS, adapter=adapters["second"])
        outputs += generate(engine, [Request("first", [5, 6], GREEDY)])
        assert all(o.error is None for o in outputs)
        assert engine.stats().adapter_loads == 2
        assert not compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_timings_are_in_order(engine) -> None:
    (output,) = generate(engine, [Request("first", [5, 6, 7], GREEDY)])
    t = output.timings
    assert t.submitted <= t.started <= t.first_token <= t.finished
    assert 0 < t.ttft < t.latency


def test_shared_pages_are_the_bases_bit_for_bit(make_engine) -> None:
    (prompt,) = random_prompts([9])
    caches = []
    for name in ("first", "second"):
        engine = make_engine()
        answers(engine, [name], [prompt])
        caches.append(jax.tree.map(np.asarray, engine._runner._cache))
    # the pages of the prompt: two, the first that a fresh pool gives
    np.testing.assert_array_equal(caches[0].k[:, :2], caches[1].k[:, :2])
    np.testing.assert_array_equal(caches[0].v[:, :2], caches[1].v[:, :2])


def test_a_quantized_base_serves_its_adapters(adapters, one_shape, base) -> None:
    spec = CodebookSpec.parse("m2v8g32")
    first_layer = [path for path, _ in linear_shapes(base.config) if path.startswith("layers.0.")]
    specs = tuple(sorted((path, spec) for path in first_layer))
    model = init_model(base.config, jax.random.key(7), specs=specs)
    engine = Engine(model, page_size=4, pages=64, max_batch=8, step_tokens=32, buckets=one_shape)
    engine.add_model("first", ICARUS, adapter=adapters["first"])
    bank = set_adapter(with_bank(model, AdapterBank(2, 4, ALL_TARGETS)), adapters["first"], 1)
    (prompt,) = random_prompts([9])
    served = answers(engine, ["first", "base"], [prompt] * 2)
    plain = [plain_generate(bank, [prompt], NEW, ICARUS, slots=[slot])[0] for slot in (1, 0)]
    assert served == [tuple(tokens) for tokens in plain]
