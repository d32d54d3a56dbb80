"""EleutherAI's lm-eval harness drives an engine: `pip install 'jaxcodec[eval]'`.

    from lm_eval import simple_evaluate

    simple_evaluate(EngineLM(engine, "compute"), tasks=["arc_easy"])

All requests of a task go to the engine at once: it batches them, and computes the context that
several choices share once. The harness's conventions are kept: continuations are the tokens of
context + continuation after those of the context, white space at the end of a context belongs to
the continuation, and what is too long loses its beginning.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.serve.batch_loop import stream
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Request, RequestOutput, SamplingParams

try:
    from lm_eval.api.model import LM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "EleutherAI's lm-eval harness is missing: pip install 'jaxcodec[eval]'."
    ) from error

# The harness's own default, and its names for the same thing, the first of which counts.
MAX_GEN_TOKS = 256
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING_KEYS = {"top_p", "top_k", "min_p", "repetition_penalty", "seed"}


@dataclasses.dataclass(frozen=True)
class Scored:
    """A context and a continuation as tokens, neither of them empty."""

    context: list[int]
    continuation: list[int]


class EngineLM(LM):
    """One model of an engine, as the harness asks for it: `Instance.args` in, answers out.

    Args:
      engine: with a tokenizer; nobody else may step it meanwhile.
      model: the name of a model that it serves, base or specialised.

    Raises:
      ValueError: the engine has no tokenizer, or no such model.
    """

    def __init__(self, engine: Engine, model: str = "base"):
        super().__init__()
        if engine.tokenizer is None:
            raise ValueError("The harness asks in text: give the engine a tokenizer.")
        if model not in engine.models:
            raise ValueError(
                f"No model is served as {model!r}; there are {', '.join(engine.models)}."
            )
        self.engine, self.model, self._tokenizer = engine, model, engine.tokenizer
        # What the model expects before a text; what ends a text stands in for it.
        self._start = self._tokenizer.encode("")
        self._prefix = self._start or [self._tokenizer.eos_id]

    @property
    def max_length(self) -> int:
        """Most tokens that are computed for one request."""
        return self.engine.context

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log probability of the continuation in nats, whether it is the greedy one) of each pair.

        Args:
          requests: `args` are (context, continuation); an empty context is the beginning of a text.

        Raises:
          ValueError: a continuation that adds no token to its context, or is beyond the context.
          RuntimeError: the engine could not score one.
        """
        pairs = [self._pair(*request.args) for request in requests]
        found = self._score(self._within_context(pairs), "Scoring", disable_tqdm)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log probability of each whole text in nats, every token of it predicted once.

        A text beyond the model's context is cut into windows: each begins with the last token of
        the one before it, but the last one is as long as the others and only its new tokens count.

        Args:
          requests: `args` are (text,).
        """
        texts = [self._tokenizer.encode_completion(request.args[0]) for request in requests]
        windows = [list(self._windows(tokens)) for tokens in texts]
        every = [window for of_text in windows for window in of_text]
        scores = iter(self._score(every, "Scoring windows", disable_tqdm))
        found = [sum(next(scores)[0] for _ in of_text) for of_text in windows]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to one of its stop texts, which is left out.

        Args:
          requests: `args` are (context, options); the options are `until`, `max_gen_toks`,
            `do_sample`, `temperature`, and what `SamplingParams` calls by the same names.

        Raises:
          ValueError: an option that there is not.
          RuntimeError: the engine could not answer one.
        """
        asked, shortened = [], 0
        for i, request in enumerate(requests):
            context, options = request.args
            sampling = self._sampling(options, i)
            prompt = self._encode(context) or self._prefix
            room = max(1, self.max_length - sampling.max_tokens)
            shortened += len(prompt) > room
            asked.append(Request(self.model, prompt[-room:], sampling))
        _warn_of_shortened(shortened, self.max_length)
        found = [output.text for output in self._run(asked, "Generating", disable_tqdm)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return found

    # Chats

    @property
    def tokenizer_name(self) -> str:
        """For the names of the harness's caches."""
        return str(self._pretrained.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` uses, for the harness's records."""
        return self._pretrained.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text of a prompt."""
        return self._pretrained.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    @property
    def _pretrained(self) -> Any:
        if not isinstance(self._tokenizer, PretrainedTokenizer):
            raise NotImplementedError("Chats need an engine with a PretrainedTokenizer.")
        return self._tokenizer.pretrained

    # Tokens

    def _encode(self, text: str) -> list[int]:
        """Tokens of a text; a chat's text may begin with what a tokenizer puts before any text."""
        tokens, count = self._tokenizer.encode(text), len(self._start)
        return tokens[count:] if count and tokens[: 2 * count] == self._start * 2 else tokens

    def _pair(self, context: str, continuation: str) -> Scored:
        if not context:
            pair = Scored(self._prefix, self._tokenizer.encode_completion(continuation))
        else:
            kept = context.rstrip()
            before = self._encode(kept) or self._prefix
            whole = self._encode(context + continuation)
            pair = Scored(before, whole[len(self._encode(kept)) :])
        if not pair.continuation:
            raise ValueError(
                f"The continuation {continuation!r:.80} adds no token to its context "
                f"...{context[-40:]!r}, so there is nothing to score."
            )
        return pair

    def _within_context(self, pairs: Sequence[Scored]) -> list[Scored]:
        """The pairs, with contexts that lose their beginnings where the whole is too long."""
        kept, shortened = [], 0
        for pair in pairs:
            room = self.max_length + 1 - len(pair.continuation)  # its last token is not computed
            if room < 1:
                raise ValueError(
                    f"A continuation has {len(pair.continuation)} tokens, the context holds "
                    f"{self.max_length}."
                )
            shortened += len(pair.context) > room
            kept.append(dataclasses.replace(pair, context=pair.context[-room:]))
        _warn_of_shortened(shortened, self.max_length)
        return kept

    def _windows(self, tokens: list[int]) -> Iterator[Scored]:
        """A text as windows, in which each token is scored once."""
        text, length = [*self._prefix[-1:], *tokens], self.max_length
        for first in range(1, len(text), length):
            end = min(first + length, len(text))
            yield Scored(text[max(0, end - 1 - length) : first], text[first:end])

    def _sampling(self, options: Mapping[str, Any], number: int) -> SamplingParams:
        """What a request's options mean; several samples of one context differ in their numbers."""
        unknown = {*options} - {"until", "do_sample", "temperature", *LENGTH_KEYS, *SAMPLING_KEYS}
        if unknown:
            raise ValueError(f"The engine knows no generation options {sorted(unknown)}.")
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        lengths = [int(options[key]) for key in LENGTH_KEYS if options.get(key) is not None]
        is_greedy = options.get("do_sample") is False
        own: dict[str, Any] = {"seed": number} | {k: options[k] for k in SAMPLING_KEYS & {*options}}
        return SamplingParams(
            temperature=0.0 if is_greedy else float(options.get("temperature") or 0.0),
            max_tokens=(lengths or [MAX_GEN_TOKS])[0],
            stop=tuple(text for text in until if text),
            **own,
        )

    # The engine

    def _score(self, pairs: Sequence[Scored], label: str, quiet: bool) -> list[tuple[float, bool]]:
        sampling = SamplingParams(logprobs=1)
        requests = [
            Request(self.model, pair.context, sampling, continuation=pair.continuation)
            for pair in pairs
        ]
        return [_likelihood(output) for output in self._run(requests, label, quiet)]

    def _run(self, requests: Sequence[Request], label: str, quiet: bool) -> list[RequestOutput]:
        """Have them answered, in any order, and return the outputs in theirs."""
        from rich.console import Console
        from rich.progress import Progress

        outputs: dict[int, RequestOutput] = {}
        with Progress(console=Console(stderr=True), disable=quiet) as bar:
            task = bar.add_task(label, total=len(requests))
            for i, event in stream(self.engine, requests):
                if isinstance(event, RequestOutput):
                    outputs[i] = event
                    bar.advance(task)
        for i, output in sorted(outputs.items()):
            if output.finish_reason not in ("stop", "length"):
                raise RuntimeError(
                    f"Request {i} of the harness ended as {output.finish_reason}: {output.error}"
                )
        return [outputs[i] for i in range(len(requests))]


def _likelihood(output: RequestOutput) -> tuple[float, bool]:
    """The log probability of a scored continuation, and whether each token is the likeliest."""
    assert output.logprobs is not None
    is_greedy = all(
        token == scores.top[0][0]
        for token, scores in zip(output.tokens, output.logprobs, strict=True)
    )
    return sum(scores.logprob for scores in output.logprobs), is_greedy


def _warn_of_shortened(count: int, length: int) -> None:
    if count:
        warnings.warn(
            f"{count} requests of the harness are too long for {length} tokens, the engine's "
            "context: the beginnings of their contexts are left out.",
            stacklevel=3,
        )
