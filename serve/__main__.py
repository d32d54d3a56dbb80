"""The command line of serving: prompts from a JSONL file to many models at once.

    python -m jaxcodec.serve --model BASE --icarus sums=DIR dates=DIR \\
        --prompts prompts.jsonl --out answers.jsonl

A line of the file is {"model": "sums", "prompt": "..."}; see `jaxcodec.serve.jsonl`.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

from jaxcodec.models.load import load_model
from jaxcodec.models.lora import Adapter, load_adapter
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE, Scheme
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.models.transformer import Model
from jaxcodec.serve.batch_loop import stream
from jaxcodec.serve.compilation import use_compilation_cache
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.jsonl import read_requests, write_outputs
from jaxcodec.serve.request import Request, RequestOutput
from jaxcodec.serve.served_models import DEFAULT_BANK, bank_for
from jaxcodec.serve.timeline import Timeline, write_chrome_trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Serve the prompts of a JSONL file.

    Attributes:
      model: directory of the base model, dense or quantized, with its tokenizer.
      prompts: JSONL of {"prompt", "model", "id", and fields of SamplingParams}.
      out: JSONL of the answers, in the order of the prompts; also of a run that was stopped.
      icarus: NAME=DIRECTORY of adapters that share the base's cache, prompts and responses.
      prefill_share: NAME=DIRECTORY of models or adapters that share the base's prompts.
      conventional: NAME=DIRECTORY of models or adapters that share nothing.
      name: under which the base itself is served, and what lines without a model ask for.
      page_size: tokens in a page of the cache.
      pages: pages in the cache; as many as the device has memory for, if not given.
      host_pages: pages to keep in host memory when the cache has no room for them.
      max_batch: most responses that run at once.
      step_tokens: most tokens computed in one step; a longer prompt takes several.
      decode_steps: most tokens that one launch adds to a response, when nothing waits.
      max_waiting: most responses in the engine's queue; the other lines wait outside.
      share_prefixes: without, each model keeps its own cache, for comparison.
      warm_up: compile every step before the first request.
      compilation_cache: directory to keep compiled steps in, for the next time.
      trace: file for a Chrome trace of all requests, which ui.perfetto.dev opens.
    """

    model: Path
    prompts: Path
    out: Path
    icarus: tuple[str, ...] = ()
    prefill_share: tuple[str, ...] = ()
    conventional: tuple[str, ...] = ()
    name: str = "base"
    page_size: int = 16
    pages: int | None = None
    host_pages: int = 0
    max_batch: int = 16
    step_tokens: int = 512
    decode_steps: int = 8
    max_waiting: int = 1024
    share_prefixes: bool = True
    warm_up: bool = False
    compilation_cache: Path | None = None
    trace: Path | None = None


def serve(options: Options) -> list[RequestOutput]:
    """Answer every line of the prompts; a line that cannot be answered says why.

    Whatever stops it, what has been answered is written.

    Raises:
      FileNotFoundError, ValueError: the prompts, a model, an adapter or the tokenizer cannot be
        read, or do not fit.
    """
    for name, path in (("--out", options.out), ("--trace", options.trace)):
        if path is not None and path.is_dir():  # before the work, not after it
            raise ValueError(f"{name} must be a file, {path} is a directory.")
    lines = read_requests(options.prompts, options.name)
    if options.compilation_cache is not None:
        use_compilation_cache(options.compilation_cache)
    timeline = None if options.trace is None else Timeline()
    engine = make_engine(options, timeline)
    if options.warm_up:
        engine.warm_up()
    outputs: list[tuple[int, RequestOutput]] = []
    try:
        with contextlib.closing(_answer(engine, lines)) as answers:
            outputs.extend(answers)
    finally:
        outputs.sort(key=lambda numbered: (numbered[0], numbered[1].index))
        write_outputs(options.out, outputs)
        if options.trace is not None and timeline is not None:
            write_chrome_trace(options.trace, timeline)
    _print_errors(outputs)
    return [output for _, output in outputs]


def make_engine(options: Options, timeline: Timeline | None = None) -> Engine:
    """The engine with every model that the options name.

    Raises:
      FileNotFoundError, ValueError: as `serve`.
    """
    base = load_model(options.model)
    models = list(_read_models(options, base))  # before the cache takes the memory that is left
    adapters = [model for _, _, model in models if isinstance(model, Adapter)]
    engine = Engine(
        base,
        PretrainedTokenizer(options.model),
        name=options.name,
        page_size=options.page_size,
        pages=options.pages,
        host_pages=options.host_pages,
        max_batch=options.max_batch,
        step_tokens=options.step_tokens,
        decode_steps=options.decode_steps,
        max_waiting=options.max_waiting,
        bank=bank_for(adapters) if adapters else DEFAULT_BANK,
        share_prefixes=options.share_prefixes,
        timeline=timeline,
    )
    for name, scheme, model in models:
        if isinstance(model, Adapter):
            engine.add_model(name, scheme, adapter=model)
        else:
            engine.add_model(name, scheme, model=model)
    return engine


def _read_models(options: Options, base: Model) -> Iterator[tuple[str, Scheme, Adapter | Model]]:
    models: tuple[tuple[Scheme, Sequence[str]], ...] = (
        (ICARUS, options.icarus),
        (PREFILL_SHARE, options.prefill_share),
        (CONVENTIONAL, options.conventional),
    )
    for scheme, named in models:
        for text in named:
            name, separator, directory = text.partition("=")
            if not (name and separator and directory):
                raise ValueError(f"Expected NAME=DIRECTORY, got {text!r}.")
            if (Path(directory) / "adapter_config.json").is_file():
                yield name, scheme, load_adapter(directory, base)
            else:
                yield name, scheme, load_model(directory, base.dtype)


def _answer(
    engine: Engine, lines: list[tuple[int, Request | ValueError]]
) -> Generator[tuple[int, RequestOutput]]:
    """(line number, output) of every response to every line, as they end."""
    from rich.console import Console

    from jaxcodec.serve.live_table import live_table

    requests = []
    for number, content in lines:
        if isinstance(content, Request):
            requests.append((number, content))
        else:
            yield number, RequestOutput(f"line-{number}", "", "", (), "error", error=str(content))
    events = stream(engine, [request for _, request in requests])
    with live_table(engine.stats, Console()) as draw, contextlib.closing(events):
        for i, event in events:
            draw()
            if isinstance(event, RequestOutput):
                yield requests[i][0], event


def _print_errors(outputs: Iterable[tuple[int, RequestOutput]]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    for number, output in outputs:
        if output.error is not None:
            error = output.error.removeprefix(f"line {number}: ")
            console.print(f"[red]line {number}[/red]: {escape(error)}")


def main() -> None:
    """Run the command line.

    The exit status is 1 if a request failed, 2 if none could be tried, 130 if it was interrupted.
    """
    import tyro

    from jaxcodec.command_line import refuse_repeated_options

    try:
        refuse_repeated_options(sys.argv[1:])
        outputs = serve(tyro.cli(Options, prog="python -m jaxcodec.serve"))
    except (OSError, ValueError, MemoryError) as error:
        print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(int(any(output.finish_reason == "error" for output in outputs)))


if __name__ == "__main__":
    main()
