"""Plans, run on the device: the cache, the state of rows, and every launch that changes them.

This module alone touches the device. It sends work and waits for none of it.

Letters: R rows of running sequences, B rows of a launch, T tokens a row of a prefill, P pages a
row, W words of V bits.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.models.cache import KVCache, pages_for
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.transformer import Model
from jaxcodec.serve.answers import Answer, TokenArrays
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.compilation import Job, Programs
from jaxcodec.serve.host_pages import HostPages
from jaxcodec.serve.pages import pages_that_fit
from jaxcodec.serve.plan import Plan, Prefill, Sequence
from jaxcodec.serve.request import SamplingParams
from jaxcodec.serve.rows import WIDTH, PrefillNumbers, PrefillRow, RowTable, pad_prefill
from jaxcodec.serve.sampling import WORD, SamplingBatch, SamplingTable, Variant, enter
from jaxcodec.serve.served_models import BASE, ServedModels
from jaxcodec.serve.step_program import Made, RowState, decode, prefill, score
from jaxcodec.serve.structured import Grammars


class LaunchedRow(NamedTuple):
    """What one row of a launch made.

    Attributes:
      answer: whose row it was.
      planned: most tokens that it could make.
      tokens: those that it made.
      broken: the logits after them are not finite.
      logprobs: of the tokens, if the answer asks for them.
    """

    answer: Answer
    planned: int
    tokens: list[int]
    broken: bool
    logprobs: TokenArrays | None


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch on its way, of `decode` or `score`."""

    rows: list[tuple[Answer, int]]
    made: Made

    def send(self) -> "Launch":
        """Start copying what it makes to the host."""
        self.made.numbers.copy_to_host_async()
        if self._has_logprobs:
            for array in self._logprob_arrays:
                array.copy_to_host_async()
        return self

    def fetch(self) -> Iterator[LaunchedRow]:
        """What it made, row by row; waits for it."""
        numbers = np.asarray(self.made.numbers).tolist()
        arrays = [np.asarray(a) for a in self._logprob_arrays] if self._has_logprobs else None
        for b, (answer, planned) in enumerate(self.rows):
            *tokens, count, broken = numbers[b]
            logprobs = None
            if arrays is not None and answer.request.sampling.logprobs is not None:
                logprobs = TokenArrays(*(a[b, :count] for a in arrays))
            yield LaunchedRow(answer, planned, tokens[:count], bool(broken), logprobs)

    @property
    def _has_logprobs(self) -> bool:
        return self.made.logprob is not None and any(
            answer.request.sampling.logprobs is not None for answer, _ in self.rows
        )

    @property
    def _logprob_arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        made = self.made
        assert made.logprob is not None
        assert made.top_ids is not None
        assert made.top_logprobs is not None
        return made.logprob, made.top_ids, made.top_logprobs


class Runner:
    """Runs plans, each after all that were run before it.

    Args:
      config: of all models.
      models: whose weights run.
      grammars: of structured responses.
      buckets: shapes that launches are padded to.
      cache: of keys and values, empty.
      state: of R rows.
      decode_steps: most tokens a row that one launch makes.
    """

    def __init__(
        self,
        config: ModelConfig,
        models: ServedModels,
        grammars: Grammars,
        buckets: Buckets,
        cache: KVCache,
        max_batch: int,
        decode_steps: int,
    ):
        self.launches = 0
        self._config = config
        self._models = models
        self._grammars = grammars
        self._buckets = buckets
        self._max_batch = max_batch
        self._decode_steps = decode_steps
        self._programs = Programs()
        self._begin(cache)

    def run(self, plan: Plan, answers: Mapping[Sequence, Answer]) -> list[Launch]:
        """Launch all that a plan says; returns the launches whose results are on their way."""
        self._cache = self._host.copy(self._cache, plan.copies)
        for adapter, slot in plan.loads:
            self._models.load(adapter, slot)
        for sequence in plan.admitted:
            self._enter(answers[sequence])
        is_scored = lambda chunk: answers[chunk.sequence].given and not chunk.by_prompt_writer
        written = itertools.filterfalse(is_scored, plan.prefills)
        for weights, adapted, rows in self._prefill_groups(written, answers):
            self._prefill(weights, adapted, rows)
        # Nobody else reads what these write, so it matters only that their prompts are there.
        scored = self._score_groups(filter(is_scored, plan.prefills), answers)
        launches = [self._score(*group) for group in scored]
        by_weights: dict[str, list[tuple[Answer, int]]] = collections.defaultdict(list)
        for sequence, count in plan.decodes:
            answer = answers[sequence]
            by_weights[answer.model.weights].append((answer, count))
        return launches + [self._decode(weights, rows) for weights, rows in by_weights.items()]

    def restart(self) -> None:
        """Begin anew with nothing in the cache; what is on its way is nobody's any more.

        A launch that failed has taken its donated arrays with it, and what came of others is not
        to be trusted either.
        """
        self._models.restart()
        old = self._cache
        for array in jax.tree.leaves((old, self._state)):  # there is no room for old and new
            if not array.is_deleted():
                array.delete()
        cache = KVCache.zeros(self._config, old.num_pages, old.page_size, old.k.dtype)
        self._begin(cache)

    def warm_up(self) -> None:
        """Compile every launch that the models served now can ask for."""
        self._programs.compile(self._jobs())
        self._models.load_nothing()
        self._cache = self._host.warm_up(self._cache)
        params = SamplingParams(repetition_penalty=2.0)
        sampling = enter(self._state.sampling, self._rows.padding, params, [0], [0])
        self._state = dataclasses.replace(self._state, sampling=sampling)

    def _begin(self, cache: KVCache) -> None:
        self._cache = cache
        self._state = RowState.zeros(self._max_batch, self._config.vocab_size)
        self._rows = RowTable(self._max_batch, self._buckets.pages[-1], cache.num_pages)
        self._sampling = SamplingTable(self._max_batch)
        self._host = HostPages()

    def _enter(self, answer: Answer) -> None:
        """Tell the tables, and the device where it must know, who is in a row."""
        sequence, params = answer.sequence, answer.request.sampling
        row, tokens, prompt_length = sequence.row, sequence.tokens, sequence.prompt_length
        answer.entered()
        self._rows.enter(row, tokens[-1], len(tokens) - 1, sequence.slot, _encoder_slot(answer))
        self._sampling.enter(row, params, answer.seed, answer.eos_ids, prompt_length)
        if params.has_state:
            prompt, response = tokens[:prompt_length], tokens[prompt_length:]
            sampling = enter(self._state.sampling, row, params, prompt, response)
            self._state = dataclasses.replace(self._state, sampling=sampling)

    # Prefill

    def _prefill_groups(
        self, chunks: Iterable[Prefill], answers: Mapping[Sequence, Answer]
    ) -> Iterator[tuple[str, bool, list[PrefillRow]]]:
        """Chunks that one launch takes, in order: (whose weights, whether adapted, rows).

        A later chunk may read what an earlier one writes, in the same launch too: each layer writes
        all rows before it reads any.
        """
        group: list[PrefillRow] = []
        of, adapted = BASE, False
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            model = answers[sequence].model
            weights, own = self._models.writer(model, chunk.by_prompt_writer)
            pages = sequence.pages[: pages_for(end, self._cache.page_size)]
            slot = sequence.slot if own else 0
            row = PrefillRow(sequence.tokens[chunk.start : end], chunk.start, pages, slot)
            if group and (weights != of or self._prefill_shape([*group, row]) is None):
                yield of, adapted, group
                group, adapted = [], False
            group.append(row)
            of, adapted = weights, adapted or own
        if group:
            yield of, adapted, group

    def _prefill_shape(self, rows: list[PrefillRow]) -> tuple[int, int, int] | None:
        longest, widest = max(len(r.tokens) for r in rows), max(len(r.pages) for r in rows)
        return self._buckets.prefill(len(rows), longest, widest)

    def _prefill(self, weights: str, adapted: bool, rows: list[PrefillRow]) -> None:
        shape = self._prefill_shape(rows)
        assert shape is not None
        model = self._models.weights(weights)
        self._cache = self._programs.run(
            prefill,
            shape,
            model.leaves,
            self._cache,
            pad_prefill(rows, *shape, self._cache.num_pages),
            tree=model.tree,
            adapted=adapted,
        )
        self.launches += 1

    # Score

    def _score_groups(
        self, chunks: Iterable[Prefill], answers: Mapping[Sequence, Answer]
    ) -> Iterator[tuple[list[Answer], list[PrefillRow], list[list[int]]]]:
        """Chunks of given responses that one launch takes: (whose, rows, tokens after each)."""
        groups: dict[str, list[list[tuple[Answer, PrefillRow, list[int]]]]] = {}
        for chunk in chunks:
            sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
            pages = sequence.pages[: pages_for(end, self._cache.page_size)]
            row = PrefillRow(sequence.tokens[start:end], start, pages, sequence.slot)
            answer = answers[sequence]
            of_weights = groups.setdefault(answer.model.weights, [[]])
            if self._prefill_shape([row, *(r for _, r, _ in of_weights[-1])]) is None:
                of_weights.append([])
            of_weights[-1].append((answer, row, sequence.tokens[start + 1 : end + 1]))
        for group in itertools.chain.from_iterable(groups.values()):
            whose, rows, following = zip(*group, strict=True)
            yield list(whose), list(rows), list(following)

    def _score(
        self, whose: list[Answer], rows: list[PrefillRow], following: list[list[int]]
    ) -> Launch:
        shape = self._prefill_shape(rows)
        assert shape is not None
        targets, encoder_slots = np.zeros(shape[:2], np.int32), np.zeros(shape[0], np.int32)
        for b, (answer, tokens) in enumerate(zip(whose, following, strict=True)):
            targets[b, : len(tokens)] = tokens
            encoder_slots[b] = _encoder_slot(answer)
        model = self._models.weights(whose[0].model.weights)
        made, self._cache = self._programs.run(
            score,
            shape,
            model.leaves,
            self._cache,
            pad_prefill(rows, *shape, self._cache.num_pages),
            targets,
            encoder_slots,
            tree=model.tree,
            layout=self._models.layout(answer.model for answer in whose),
        )
        self.launches += 1
        return Launch([(answer, 0) for answer in whose], made).send()

    # Decode

    def _decode(self, weights: str, rows: list[tuple[Answer, int]]) -> Launch:
        sequences = [answer.sequence for answer, _ in rows]
        for sequence in sequences:
            if sequence.moved:
                self._rows.set_pages(sequence.row, sequence.pages)
                sequence.moved = False
        variant = max(answer.variant for answer, _ in rows)
        shape = self._buckets.decode(len(rows), max(len(s.pages) for s in sequences))
        numbers = self._rows.launch([s.row for s in sequences], [n for _, n in rows], *shape)
        model = self._models.weights(weights)
        made, self._cache, self._state = self._programs.run(
            decode,
            (*shape, variant),
            model.leaves,
            self._cache,
            self._state,
            numbers,
            self._sampling.batch(numbers[:, 0], self._masks(variant, rows, shape[0])),
            tree=model.tree,
            layout=self._models.layout(answer.model for answer, _ in rows),
            variant=variant,
            steps=self._decode_steps,
        )
        self.launches += 1
        return Launch(rows, made).send()

    def _masks(self, variant: Variant, rows: list[tuple[Answer, int]], B: int) -> np.ndarray | None:
        """Which tokens the structures of rows allow, uint32 [B, W]."""
        if variant < Variant.MASKED:
            return None
        return self._grammars.masks([answer.progress for answer, _ in rows], B)

    # Warm-up

    def _jobs(self) -> Iterator[Job]:
        arrays = self._cache, self._state
        ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        for weights, adapted in self._models.writers:
            model = self._models.weights(weights)
            static = {"tree": model.tree, "adapted": adapted}
            for B, T, P in self._buckets.prefill_shapes(self._cache.page_size):
                batch = PrefillNumbers(ints(B, T), ints(B, 3 + P))
                yield Job(prefill, (B, T, P), (model.leaves, self._cache, batch), static)
        for weights in self._models.all_weights:
            model = self._models.weights(weights)
            for layout in self._models.layouts(weights):
                for B, P in self._buckets.decode_shapes():
                    for variant, sampling in self._sampling_batches(B):
                        static = {"tree": model.tree, "layout": layout}
                        static |= {"variant": variant, "steps": self._decode_steps}
                        arguments = (model.leaves, *arrays, ints(B, WIDTH + P), sampling)
                        yield Job(decode, (B, P, variant), arguments, static)

    def _sampling_batches(self, B: int) -> Iterator[tuple[Variant, SamplingBatch]]:
        """A batch of B rows of padding for every variant of sampling that can come."""
        padding = np.full(B, self._rows.padding)
        masks = np.zeros((B, -(-self._config.vocab_size // WORD)), np.uint32)
        for variant in Variant:
            if variant < Variant.MASKED:
                yield variant, self._sampling.batch(padding)
            elif self._grammars.possible:
                yield variant, self._sampling.batch(padding, masks)


def _encoder_slot(answer: Answer) -> int:
    """The adapter that writes the cache of its response; 0 where the base or a model does."""
    return answer.sequence.slot if answer.model.adapted_writer else 0


def cache_pages(base: Model, page_size: int) -> int:
    """Pages of `page_size` tokens in what the base has left of its device's memory."""
    page = jax.eval_shape(lambda: KVCache.zeros(base.config, 1, page_size, base.dtype))
    page_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(page))
    return pages_that_fit(page_bytes, jax.local_devices()[0].memory_stats())
