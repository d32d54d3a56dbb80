"""Thousands of requests over eight models, with all that goes wrong in a day.

    JAX_PLATFORMS=cpu python -m tests.serve.soak --requests 10000

The shipped base serves six adapters in three slots, and a model of its own, from a pool that holds
a fraction of what runs. Requests are cancelled, miss their deadlines, do not fit, ask for poisoned
adapters whose logits are NaN; adapters are taken out and put back under way, or others are put in
under their names. Every response must be that of the same request alone, by the weights that had
the name when it came, or as much of it as there was time for.

With `--several-shapes` steps are compiled for several sizes, so that a row is computed in other
company than alone, and in another order: a few responses may differ then, and are counted.
"""

import argparse
import collections
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxcodec.checkpoints.files import write_json
from jaxcodec.demo.tasks import AGENTS, STOP, stories
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.load import load_model
from jaxcodec.models.lora import ALL_TARGETS, Adapter, load_adapter
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE, Scheme
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.models.transformer import Model
from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import QueueFull, Request, RequestOutput, SamplingParams, Structure

WEIGHTS = Path(__file__).parents[2] / "demo" / "weights"
POISONED = "poisoned"  # names that begin so have adapters so large that their products are infinite
ANSWER = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]}
PAGES = 40  # two or three of the longer contexts, for sixteen rows
STEP_S = 0.01  # what a step takes by the soak's clock
PATIENCE = 3000  # steps in which something must end
# The share of responses that a tie to the last bits of float32 may tip where shapes differ.
FEW = 1e-3
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class Clock:
    """A clock that goes when it is told to, so that deadlines are the same in every run."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


Adapters = dict[str, tuple[Scheme, Adapter]]


class Soak:
    """Requests in, trouble in, and what comes out compared.

    Args:
      engine: with a queue and a pool that are too small, and `clock`.
      requests: what is asked, again and again.
      expected: the responses to each of `requests`, and of their `versions`, when it runs alone.
      adapters: what can be taken out and put back, or swapped.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        requests: Sequence[Request],
        expected: dict[Request, list[RequestOutput]],
        adapters: Adapters,
        seed: int,
    ):
        self.engine, self.clock, self.expected = engine, clock, expected
        self.adapters = adapters
        self._weights = {name: name for name in engine.models}  # whose each name has now
        self.rng = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.unequal: list[str] = []
        self._requests = requests
        self._open: dict[str, Request] = {}
        self._left: dict[str, int] = {}  # responses to come
        self._streamed: dict[tuple[str, int], list[int]] = collections.defaultdict(list)

    def run(self, count: int) -> None:
        """Serve `count` requests to their ends."""
        rng, engine = self.rng, self.engine
        idle = 0
        while self.counts["submitted"] < count or engine.busy:
            burst = rng.choice([0, 0, 1, 2, 30])
            for _ in range(min(burst, count - self.counts["submitted"])):
                if not self._submit():
                    break
            ended = self.counts["ended"]
            for event in engine.step():
                if isinstance(event, RequestOutput):
                    self._end(event)
                else:
                    self._streamed[event.id, event.index].append(event.token)
            if self._open and rng.random() < 0.02:
                self._cancel(rng.choice(list(self._open)))
            if rng.random() < 0.02:
                self._reload()
            if rng.random() < 0.02:
                engine.check()
            self.clock.now += STEP_S
            idle = 0 if self.counts["ended"] > ended or not engine.busy else idle + 1
            assert idle < PATIENCE, "stalled"
        engine.check()
        engine._scheduler.check_idle()
        assert not self._open, "a request has no end"

    def _submit(self) -> bool:
        """Submit a request; False if the queue had no room."""
        rng, engine = self.rng, self.engine
        if rng.random() < 0.01:
            self.counts["submitted"] += 1
            try:
                engine.submit(Request("base", [1] * (engine.context + 1)))
            except ValueError:
                self.counts["oversize refused"] += 1
                return True
            raise AssertionError("an oversize prompt was taken")
        request = rng.choice(self._requests)
        priority = rng.choice([0, 0, 0, 0, 1, -1])
        deadline_s = rng.choice([0.05, 0.5, 5.0]) if rng.random() < 0.05 else None
        asked = dataclasses.replace(request, priority=priority, deadline_s=deadline_s)
        try:
            id = engine.submit(asked)
        except QueueFull:
            self.counts["queue full"] += 1
            return False
        self.counts["submitted"] += 1
        self._open[id] = dataclasses.replace(request, model=self._weights[request.model])
        self._left[id] = request.sampling.n
        return True

    def _cancel(self, id: str) -> None:
        try:
            self.engine.cancel(id)
        except ValueError:  # it was cancelled just now, and its end comes with the next step
            self.counts["cancelled twice"] += 1

    def _end(self, output: RequestOutput) -> None:
        request = self._open[output.id]
        self.counts["ended"] += 1
        self.counts[output.finish_reason] += 1
        streamed = self._streamed.pop((output.id, output.index), [])
        if request.model.startswith(POISONED):
            assert output.finish_reason in ("error", "cancelled", "deadline"), output
            assert not output.tokens
        else:
            assert output.finish_reason != "error", output.error
            alone = self.expected[request][output.index]
            tokens = alone.tokens[: len(output.tokens)]
            whole = output.finish_reason in ("stop", "length")
            same = output.tokens == tokens and tuple(streamed) == tokens
            if whole:
                same &= (output.text, output.finish_reason) == (alone.text, alone.finish_reason)
            if not same:
                self.unequal.append(f"{request.model} {request.sampling}: {output} not {alone}")
        self._left[output.id] -= 1
        if not self._left[output.id]:
            del self._open[output.id], self._left[output.id]

    def _reload(self) -> None:
        name = self.rng.choice(list(self.adapters))
        self.counts["reloads"] += 1
        if self.rng.random() < 0.5:
            now = self._weights[name]
            self._weights[name] = other(name, self.adapters) if now == name else name
            self.counts["reloads of other weights"] += 1
        scheme, adapter = self.adapters[self._weights[name]]
        self.engine.remove_model(name)
        self.engine.add_model(name, scheme, adapter=adapter)


def other(name: str, adapters: Adapters) -> str:
    """Whose weights are put in under a name: those of the next."""
    names = list(adapters)
    return names[(names.index(name) + 1) % len(names)]


def versions(requests: Sequence[Request], adapters: Adapters) -> list[Request]:
    """The requests, and what they are when other weights have their models' names."""
    swapped = [
        dataclasses.replace(request, model=other(request.model, adapters))
        for request in requests
        if request.model in adapters
    ]
    return [*requests, *swapped]


def answered_alone(engine: Engine, requests: Sequence[Request]) -> dict[Request, list]:
    """What each request gets when no other is there."""
    return {r: [] if r.model.startswith(POISONED) else generate(engine, [r]) for r in requests}


def shipped_models(base: Model) -> tuple[Adapters, dict[str, Model]]:
    """The adapters of the demo, its full model, and poisoned ones."""
    adapters: Adapters = {}
    for agent in AGENTS:
        for scheme, kind in ((ICARUS, "icarus"), (CONVENTIONAL, "conventional")):
            name = f"{kind}-{agent}"
            adapters[name] = scheme, load_adapter(WEIGHTS / name, base)
    for scheme, kind in ((ICARUS, "icarus"), (CONVENTIONAL, "conventional")):
        _, healthy = adapters[f"{kind}-compute"]
        broken = jax.tree.map(lambda x: jnp.full_like(x, 1e30), healthy)
        adapters[f"{POISONED}-{kind}"] = scheme, broken
    name = "prefill-share-compute"
    return adapters, {name: load_model(WEIGHTS / name, base.dtype)}


def shipped_requests(names: Sequence[str], count: int, seed: int) -> list[Request]:
    """Turns of the demo's stories for all models, sampled in every way."""
    rng = random.Random(seed)
    told = stories(seed, "heldout")
    texts = [
        story.prompt(agent)
        for _, story in zip(range(count // 8), told, strict=False)
        for agent in AGENTS
    ]
    ways = (
        {"stop": (STOP,)},
        {"stop": (STOP,)},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 4, "n": 2},
        {"repetition_penalty": 1.1, "logprobs": 2, "logit_bias": {5: 1.0}},
        {"structured": Structure.json_schema(ANSWER), "temperature": 1.0, "seed": 6},
        {"temperature": 1.5, "min_p": 0.05, "seed": 5, "min_tokens": 1, "ignore_eos": True},
    )
    return [
        Request(
            rng.choice(names),
            rng.choice(texts),
            SamplingParams(max_tokens=rng.choice([1, 8, 24, 40]), **rng.choice(ways)),
        )
        for _ in range(count)
    ]


def make_engine(base: Model, tokenizer, adapters: Adapters, full: dict[str, Model], **options):
    """An engine that serves them all."""
    options = {"buckets": Buckets(rows=(16,), tokens=(64,), pages=(PAGES,))} | options
    engine = Engine(
        base,
        tokenizer,
        page_size=8,
        pages=PAGES,
        max_batch=16,
        step_tokens=64,
        decode_steps=4,
        bank=AdapterBank(4, 8, ALL_TARGETS),
        **options,
    )
    for name, (scheme, adapter) in adapters.items():
        engine.add_model(name, scheme, adapter=adapter)
    for name, model in full.items():
        engine.add_model(name, PREFILL_SHARE, model=model)
    return engine


def main() -> None:
    """Run the soak and print what happened."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--distinct", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--several-shapes", action="store_true", help="of steps, as by default")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    base = load_model(WEIGHTS / "base", jnp.float32)
    tokenizer = PretrainedTokenizer(WEIGHTS / "base")
    adapters, full = shipped_models(base)
    start = time.perf_counter()
    alone = make_engine(base, tokenizer, adapters, full, share_prefixes=False)
    requests = shipped_requests(alone.models, options.distinct, options.seed)
    expected = answered_alone(alone, versions(requests, adapters))
    print(f"{len(expected)} requests alone: {time.perf_counter() - start:.0f} s", flush=True)
    clock = Clock()
    shapes = {"buckets": None} if options.several_shapes else {}
    engine = make_engine(
        base, tokenizer, adapters, full, max_waiting=200, host_pages=200, clock=clock, **shapes
    )
    start = time.perf_counter()
    engine.warm_up()
    print(f"Warm-up: {time.perf_counter() - start:.0f} s", flush=True)
    compilations: list[str] = []
    count: Callable = lambda event, *_, **__: event == COMPILED and compilations.append(event)
    jax.monitoring.register_event_duration_secs_listener(count)
    soak = Soak(engine, clock, requests, expected, adapters, options.seed)
    start = time.perf_counter()
    soak.run(options.requests)
    stats = engine.stats()
    report = {
        **soak.counts,
        "unequal": len(soak.unequal),
        "compilations": len(compilations),
        "models": len(engine.models),
        "seconds": round(time.perf_counter() - start),
        **{
            name: getattr(stats, name)
            for name in (
                "steps",
                "launches",
                "prompt_tokens",
                "reused_tokens",
                "prefill_tokens",
                "decode_tokens",
                "preemptions",
                "evictions",
                "adapter_loads",
                "offloaded",
                "restored",
            )
        },
    }
    print(json.dumps(report, indent=1))
    if options.out is not None:
        command = f"python -m tests.serve.soak --requests {options.requests} --seed {options.seed}"
        command += " --several-shapes" if options.several_shapes else ""
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        write_json(options.out, {"command": command, **about, "records": [report]})
    print("\n".join(soak.unequal[:5]))
    few = FEW * soak.counts["ended"] if options.several_shapes else 0
    assert len(soak.unequal) <= few, "a response differs from that of the request alone"
    assert not compilations


if __name__ == "__main__":
    main()
