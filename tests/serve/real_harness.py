"""The real lm-eval harness drives the shipped models on tasks of local files: `make test-eval`.

It is not part of `make test`, which does not install the harness.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxcodec.demo.tasks import write_examples
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.load import load_model
from jaxcodec.models.lora import load_adapter, set_adapter, with_bank
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS
from jaxcodec.models.steps import forward
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.harness import EngineLM
from jaxcodec.serve.request import Request, SamplingParams

# Libraries beneath the harness warn of themselves.
pytestmark = pytest.mark.filterwarnings("default")

WEIGHTS = Path(str(files("jaxcodec.demo") / "weights"))
COUNT, CHOICES, CONTEXT = 8, 4, 512
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[0].strip()}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 48}
metric_list: [{metric: exact_match}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> None:
    """Not here: these models are large enough for their programs to be worth optimizing."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Stories, each with its own completion first and those of the stories after it."""
    folder = tmp_path_factory.mktemp("tasks")
    write_examples(folder, "heldout", count=COUNT, seed=3)
    lines = (folder / "compute.heldout.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    docs = []
    for i, record in enumerate(records):
        others = [records[(i + k) % COUNT]["completion"] for k in range(CHOICES)]
        docs.append({"prompt": record["prompt"], "choices": others})
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        head = f"task: local_{name}\n{source}test_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    base = load_model(WEIGHTS / "base-quantized", jnp.float32)
    few = Buckets(rows=(16,), tokens=(64, 512), pages=(32,))  # little to compile
    tokenizer = PretrainedTokenizer(WEIGHTS / "base-quantized")
    engine = Engine(base, tokenizer, pages=512, buckets=few)
    adapter = load_adapter(WEIGHTS / "icarus-compute", base)
    engine.add_model("compute", ICARUS, adapter=adapter)
    return engine


@pytest.fixture(scope="module")
def logprobs(engine: Engine) -> Any:
    """(model, context, continuation) -> [continuation tokens, V] by the plain forward pass."""
    base = load_model(WEIGHTS / "base-quantized", jnp.float32)
    adapter = load_adapter(WEIGHTS / "icarus-compute", base)
    bank = AdapterBank(1, adapter.rank, adapter.targets)
    compute = set_adapter(with_bank(base, bank), adapter, 0)

    def forward_alone(name: str, context: list[int], continuation: list[int]) -> np.ndarray:
        row = [*context, *continuation][:-1]
        tokens = jnp.zeros((1, CONTEXT), jnp.int32).at[0, : len(row)].set(jnp.asarray(row))
        slots = jnp.zeros(1, jnp.int32)
        model, scheme, options = {
            "base": (base, CONVENTIONAL, {}),
            "compute": (compute, ICARUS, {"slots": slots}),
        }[name]
        logits = forward(model, tokens, jnp.asarray([len(row)]), scheme, **options)
        logits = np.asarray(logits[0, len(context) - 1 : len(row)], np.float64)
        return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))

    return forward_alone


def run(engine: Engine, model: str, task: str, tasks: TaskManager) -> tuple[dict, list[dict]]:
    """(results, samples) of a task."""
    found = simple_evaluate(
        EngineLM(engine, model),
        tasks=[f"local_{task}"],
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][f"local_{task}"], key=lambda sample: sample["doc_id"])
    return found["results"][f"local_{task}"], samples


@pytest.mark.parametrize("model", ["base", "compute"])
def test_choices_are_scored_as_by_the_forward_pass(engine, tasks, logprobs, model) -> None:
    before = engine.stats()
    results, samples = run(engine, model, "choices", tasks)
    after, right = engine.stats(), 0
    encode = PretrainedTokenizer(WEIGHTS / "base-quantized").encode
    for sample in samples:
        prompt, choices, scores = sample["doc"]["prompt"], sample["doc"]["choices"], []
        for choice, [answer] in zip(choices, sample["resps"], strict=True):
            context = encode(prompt.rstrip())
            continuation = encode(prompt + choice)[len(context) :]
            log_p = logprobs(model, context, continuation)
            scores.append(log_p[np.arange(len(log_p)), continuation].sum())
            found, greedy = (float(answer[0]), answer[1] in (True, "True"))
            assert found == pytest.approx(scores[-1], abs=1e-2)
            assert greedy == (log_p.argmax(axis=-1).tolist() == continuation)
        right += int(np.argmax(scores)) == 0
    assert results["acc,none"] == pytest.approx(right / COUNT)
    # all but the first choice of a story find its whole pages
    reused = after.reused_tokens - before.reused_tokens
    assert reused > 0.6 * (after.prompt_tokens - before.prompt_tokens)


def test_answers_are_those_of_the_engine(engine, tasks) -> None:
    results, samples = run(engine, "compute", "answers", tasks)
    sampling = SamplingParams(max_tokens=48, stop=("\n",))
    requests = [Request("compute", sample["doc"]["prompt"], sampling) for sample in samples]
    texts = [output.text for output in generate(engine, requests)]
    assert [sample["resps"][0][0] for sample in samples] == texts
    right = sum(
        text == sample["doc"]["choices"][0].strip()
        for text, sample in zip(texts, samples, strict=True)
    )
    assert results["exact_match,none"] == pytest.approx(right / COUNT)
    assert right > 0


def test_texts_are_scored_in_the_windows_of_the_harness(engine, tasks, logprobs) -> None:
    _, samples = run(engine, "base", "texts", tasks)
    tokenizer = PretrainedTokenizer(WEIGHTS / "base-quantized")
    for sample in samples[:3]:
        row = tokenizer.encode_completion(sample["doc"]["prompt"])
        log_p = logprobs("base", [tokenizer.eos_id], row)
        wanted = log_p[np.arange(len(row)), row].sum()
        assert float(sample["resps"][0][0]) == pytest.approx(wanted, abs=1e-2)
    lm = EngineLM(engine)
    for length in (1, CONTEXT, CONTEXT + 1, 3 * CONTEXT + 7):
        row = np.arange(1, length + 1).tolist()
        theirs = get_rolling_token_windows(row, tokenizer.eos_id, CONTEXT, context_len=1)
        ours = [(window.context, window.continuation) for window in lm._windows(row)]
        assert ours == [make_disjoint_window(pair) for pair in theirs]
