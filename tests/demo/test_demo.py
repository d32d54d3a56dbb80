"""The demo on a tiny random model: what it measures, leaves and refuses."""

import dataclasses
import io
import json
import sys
from itertools import islice

import jax
import pytest
from rich.console import Console

from jaxcodec.demo.__main__ import Options, main, run_demo
from jaxcodec.demo.agents import AGENT_NAMES, ARRANGEMENTS, PAGE_SIZE, Turn, next_turn
from jaxcodec.demo.exercises import exercises
from jaxcodec.demo.report import BaseNumbers, RunNumbers
from jaxcodec.demo.screen import Screen, render
from jaxcodec.demo.tasks import stories, tag
from jaxcodec.demo.tokenizer import CONTEXT_LENGTH, save_tokenizer, train_tokenizer
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.load import save_model
from jaxcodec.models.lora import ALL_TARGETS, ICARUS_TARGETS, init_adapter, save_adapter
from jaxcodec.models.transformer import init_model
from jaxcodec.quantize.additive import AdditiveOptions
from jaxcodec.spec import CodebookSpec
from jaxcodec.train.ptq import PRESETS, quantize_model

VOCABULARY = 600
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_positions=CONTEXT_LENGTH,
    windows=(None,),
    eos_ids=(0,),
)
STORIES = 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained models in the layout of the shipped ones."""
    root = tmp_path_factory.mktemp("weights")
    dense = init_model(CONFIG, jax.random.key(0))
    spec = CodebookSpec.parse("m1v4g32")
    options = dataclasses.replace(PRESETS["kmeans"], matrix=AdditiveOptions(1, 0, rounds=0))
    base, _ = quantize_model(dense, spec, options=options, quiet=True)
    save_model(root / "base", dense)
    save_model(root / "base-quantized", base)
    tokenizer = train_tokenizer(islice(exercises(0), 500), VOCABULARY)
    save_tokenizer(tokenizer, root / "base-quantized")
    for seed, agent in enumerate(AGENT_NAMES):
        for kind, targets in (("icarus", ICARUS_TARGETS), ("conventional", ALL_TARGETS)):
            # Other keys: adapters of the same content would share even a cache of their own.
            adapter = init_adapter(base, jax.random.key(seed), 2, 4.0, targets)
            save_adapter(root / f"{kind}-{agent}", adapter)
    save_model(root / "prefill-share-compute", base)
    return root


@pytest.fixture(scope="module")
def demo(weights):
    """(report, JSON, printed text) of one whole demo."""
    out = weights.parent / "demo" / "demo.json"
    printed = io.StringIO()
    options = Options(weights=weights, out=out, stories=STORIES)
    report = run_demo(options, Console(file=printed, width=100))
    return report, json.loads(out.read_text()), printed.getvalue()


def test_shared_caches_compute_fewer_prefill_tokens_and_hold_fewer_pages(demo):
    shared, private, prompts = demo[0].runs
    for run in (shared, prompts):
        assert run.prefill_tokens_computed < private.prefill_tokens_computed
        assert run.prefill_tokens_reused > 0
        assert run.peak_pages < private.peak_pages
    assert private.prefill_tokens_reused == 0


def test_every_prompt_token_but_the_last_is_computed_or_reused(demo):
    for run in demo[0].runs:
        fed_to_decode = run.stories * len(AGENT_NAMES)
        prefilled = run.prefill_tokens_computed + run.prefill_tokens_reused
        assert prefilled == run.prompt_tokens - fed_to_decode


def test_json_holds_every_number(demo, weights):
    report, content, _ = demo
    assert [run["name"] for run in content["runs"]] == [a.name for a in ARRANGEMENTS]
    for run, measured in zip(content["runs"], report.runs, strict=True):
        fields = {field.name for field in dataclasses.fields(RunNumbers)}
        assert set(run) == fields | {"tokens_per_second"}
        assert run["right"] == dict.fromkeys(AGENT_NAMES, 0)
        assert (run["stories"], run["stories_right"], run["page_size"]) == (STORIES, 0, PAGE_SIZE)
        assert run["tokens_per_second"] == measured.tokens_per_second > 0
    assert content["base"] == dataclasses.asdict(BaseNumbers.read(weights))
    assert set(content["versions"]) == {"jaxcodec", "jax", "python"}
    assert content["seconds"] >= sum(run.seconds for run in report.runs)


def test_bits_count_codes_scales_and_codebooks(weights):
    base = BaseNumbers.read(weights)
    weights_count = base.dense_linear_bytes // 4
    assert base.bits_per_weight == pytest.approx(8 * base.linear_bytes / weights_count)
    # One byte for 4 weights, a float32 scale for 32, and 256 x 4 float32 for each of 7 linears.
    assert base.linear_bytes == weights_count // 4 + 4 * weights_count // 32 + 7 * 256 * 4 * 4


def test_every_turn_and_every_number_is_printed(demo):
    _, _, printed = demo
    for story in range(1, STORIES + 1):
        for agent in AGENT_NAMES:
            assert printed.count(f"story {story:<2} {agent:<7} │") == len(ARRANGEMENTS)
    assert next(stories(0, "heldout")).question in printed
    for quantity in ("prefill tokens computed", "peak pages", "tokens/s", "bits per weight"):
        assert quantity in printed
    assert "\x1b" not in printed


def test_next_agent_reads_what_was_really_said():
    turn = Turn(1, "extract", "context\n" + tag("extract"), "a wrong line", False)
    following = next_turn(turn)
    assert following.context == "context\n### extract\na wrong line\n### compute\n"
    assert (following.agent, following.text, following.right) == ("compute", "", None)
    assert next_turn(dataclasses.replace(turn, agent="format")) is None


def test_terminal_shows_growing_text_and_then_the_verdict():
    printed = io.StringIO()
    screen = Screen(Console(file=printed, force_terminal=True, width=100))
    turn = Turn(3, "extract", "", "Anna lamps")
    with screen.live():
        screen.show(turn)
    ended = dataclasses.replace(turn, text="Anna [lamps] 7", right=True)
    screen.show(ended)
    assert "Anna lamps" in printed.getvalue()
    assert render(ended).plain == "story 3  extract │ Anna [lamps] 7 ✓"
    assert "✗" in render(dataclasses.replace(ended, right=False)).plain


def test_missing_weights_end_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--weights", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "give their folder as --weights" in capsys.readouterr().err


def test_demo_without_stories_is_refused(weights, tmp_path):
    options = Options(weights=weights, out=tmp_path / "demo.json", stories=0)
    with pytest.raises(ValueError, match="one story or more"):
        run_demo(options, Console(file=io.StringIO()))
