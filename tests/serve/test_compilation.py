"""What can be asked for is compiled ahead, and once."""

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.compilation import Job, Programs
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Request, SamplingParams
from jaxcodec.serve.rows import Columns
from jaxcodec.serve.step_program import Made, decode

BUDGET = Columns._fields.index("budget")


class NotedPrograms(Programs):
    """Notes which programs are asked for, and runs none: every token is 7."""

    def __init__(self):
        super().__init__()
        self.asked: set[tuple] = set()

    def run(self, program: Any, shape: Any, leaves: Any, cache: Any, *rest: Any, **static) -> Any:
        """As `Programs.run`."""
        self.asked.add(key(program, shape, static))
        if program is not decode:
            return cache
        state, numbers, _ = rest
        made = np.full((len(numbers), static["steps"] + 2), 7, np.int32)
        made[:, -2], made[:, -1] = numbers[:, BUDGET], 0
        return Made(jnp.asarray(made), None, None, None), cache, state


def key(program: Any, shape: Any, static: dict) -> tuple:
    return (program, shape, *static.values())


def requests_of_all_kinds(engine: Engine, count: int) -> list[Request]:
    rng = random.Random(0)
    ways = ({}, {"temperature": 1.0}, {"repetition_penalty": 1.2}, {"stop_tokens": (9,)})
    draw = lambda count: [rng.randrange(1, 4) for _ in range(count)]  # prefixes in common
    return [
        Request(
            rng.choice(engine.models),
            draw(rng.choice([1, 2, 5, 17, 40, 60])),
            SamplingParams(max_tokens=rng.choice([1, 3, 12]), ignore_eos=True, **rng.choice(ways)),
        )
        for _ in range(count)
    ]


def test_whatever_is_asked_for_was_foreseen(make_engine) -> None:
    engine = make_engine(buckets=None, pages=24, host_pages=8, decode_steps=3)
    foreseen = {key(job.program, job.shape, job.static) for job in engine._runner._jobs()}
    programs = engine._runner._programs = NotedPrograms()
    requests = requests_of_all_kinds(engine, 400)
    for few in (1, 2, 3, 5, 400):  # so that launches of few rows come too
        outputs = generate(engine, requests[:few])
        assert {output.finish_reason for output in outputs} == {"length"}
    assert programs.asked <= foreseen
    assert len(programs.asked) > len(foreseen) / 3


def test_a_program_is_compiled_once_and_then_called() -> None:
    traced = []

    def double(x: jax.Array, by: int) -> jax.Array:
        traced.append(x.shape)
        return by * x

    program = jax.jit(double, static_argnames="by")
    jobs = [
        Job(program, n, (jax.ShapeDtypeStruct((n,), jnp.float32),), {"by": by})
        for n, by in ((2, 3), (2, 3), (2, 4), (5, 3))
    ]
    programs = Programs()
    assert programs.compile(jobs) == 3
    assert programs.compile(jobs) == 0
    for n, by in ((2, 3), (2, 4), (5, 3)):
        y = programs.run(program, n, jnp.ones(n), by=by)
        np.testing.assert_array_equal(y, by * np.ones(n))
    assert traced == [(2,), (2,), (5,)]
    # what nobody foresaw is compiled when it comes
    np.testing.assert_array_equal(programs.run(program, 7, jnp.ones(7), by=2), 2 * np.ones(7))
    assert traced[3:] == [(7,)]
