"""The command line of serving: prompts from a JSONL file to many models at once.

    python -m jaxcodec.serve --model BASE --icarus sums=DIR dates=DIR \\
        --prompts prompts.jsonl --out answers.jsonl

A line of the file is {"model": "sums", "prompt": "..."}; see `jaxcodec.serve.jsonl`.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxcodec.models.load import load_model
from jaxcodec.models.lora import load_adapter
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE, Scheme
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.serve.batch_loop import stream
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.jsonl import read_requests, write_outputs
from jaxcodec.serve.request import Request, RequestOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Serve the prompts of a JSONL file.

    Attributes:
      model: directory of the base model, dense or quantized, with its tokenizer.
      prompts: JSONL of {"prompt", "model", "id", and fields of SamplingParams}.
      out: JSONL of the answers, in the order of the prompts.
      icarus: NAME=DIRECTORY of adapters that share the base's cache, prompts and responses.
      prefill_share: NAME=DIRECTORY of models or adapters that share the base's prompts.
      conventional: NAME=DIRECTORY of models or adapters that share nothing.
      name: under which the base itself is served, and what lines without a model ask for.
      page_size: tokens in a page of the cache.
      pages: pages in the cache.
      max_batch: most requests that run at once.
      max_prefill_tokens: most prompt tokens computed between two decode steps.
      share_prefixes: without, each model keeps its own cache, for comparison.
      warm_up: compile every step before the first request.
    """

    model: Path
    prompts: Path
    out: Path
    icarus: tuple[str, ...] = ()
    prefill_share: tuple[str, ...] = ()
    conventional: tuple[str, ...] = ()
    name: str = "base"
    page_size: int = 16
    pages: int = 1024
    max_batch: int = 16
    max_prefill_tokens: int = 512
    share_prefixes: bool = True
    warm_up: bool = False


def serve(options: Options) -> list[RequestOutput]:
    """Answer every line of the prompts; a line that cannot be answered says why.

    Raises:
      FileNotFoundError, ValueError: the prompts, a model, an adapter or the tokenizer cannot be
        read, or do not fit.
    """
    if options.out.is_dir():  # before the work, not after it
        raise ValueError(f"--out must be a file, {options.out} is a directory.")
    lines = read_requests(options.prompts, options.name)
    engine = make_engine(options)
    if options.warm_up:
        engine.warm_up()
    outputs: dict[int, RequestOutput] = {}
    requests: list[tuple[int, Request]] = []
    for number, content in lines:
        if isinstance(content, Request):
            requests.append((number, content))
        else:
            outputs[number] = RequestOutput(
                f"line-{number}", "", "", (), "error", error=str(content)
            )
    start = time.perf_counter()
    outputs |= _answer(engine, requests)
    _report(engine, list(outputs.items()), time.perf_counter() - start)
    in_order = sorted(outputs.items())
    write_outputs(options.out, in_order)
    return [output for _, output in in_order]


def make_engine(options: Options) -> Engine:
    """The engine with every model that the options name.

    Raises:
      FileNotFoundError, ValueError: as `serve`.
    """
    base = load_model(options.model)
    engine = Engine(
        base,
        PretrainedTokenizer(options.model),
        name=options.name,
        page_size=options.page_size,
        pages=options.pages,
        max_batch=options.max_batch,
        max_prefill_tokens=options.max_prefill_tokens,
        share_prefixes=options.share_prefixes,
    )
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
                engine.add_model(name, scheme, adapter=load_adapter(directory, base))
            else:
                engine.add_model(name, scheme, model=load_model(directory, base.dtype))
    return engine


def _answer(engine: Engine, requests: list[tuple[int, Request]]) -> dict[int, RequestOutput]:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    outputs: dict[int, RequestOutput] = {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("requests"))
    with Progress(*columns) as progress:
        task = progress.add_task("serving", total=len(requests))
        for i, event in stream(engine, [request for _, request in requests]):
            if isinstance(event, RequestOutput):
                outputs[requests[i][0]] = event
                progress.advance(task)
    return outputs


def _report(engine: Engine, outputs: list[tuple[int, RequestOutput]], seconds: float) -> None:
    """What was served, and what it cost, as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for number, output in sorted(outputs):
        if output.error is not None:
            error = output.error.removeprefix(f"line {number}: ")
            console.print(f"[red]line {number}[/red]: {escape(error)}")
    stats = engine.stats()
    rate = stats.decode_tokens / max(seconds, 1e-9)
    table = Table("", "", title="served", show_header=False)
    for name, value in (
        ("requests", f"{len(outputs)}"),
        ("failed", f"{sum(o.finish_reason == 'error' for _, o in outputs)}"),
        ("prompt tokens", f"{stats.prompt_tokens:,}"),
        ("  reused", f"{stats.reused_tokens:,}"),
        ("prefill tokens computed", f"{stats.prefill_tokens:,}"),
        ("tokens generated", f"{stats.decode_tokens:,}"),
        ("tokens/s", f"{rate:,.1f}"),
        ("peak pages", f"{stats.pages.peak:,} of {stats.pages.total:,}"),
        ("preemptions", f"{stats.preemptions:,}"),
        ("seconds", f"{seconds:.2f}"),
    ):
        table.add_row(name, value)
    console.print(table)


def main() -> None:
    """Run the command line; the exit status is 1 if a request failed, 2 if none could be tried."""
    import tyro

    options = tyro.cli(Options, prog="python -m jaxcodec.serve")
    try:
        outputs = serve(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(int(any(output.finish_reason == "error" for output in outputs)))


if __name__ == "__main__":
    main()
