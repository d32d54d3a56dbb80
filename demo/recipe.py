"""How the shipped models were made: one command, which can be stopped and goes on where it was.

`python -m jaxcodec.demo.recipe --work build/recipe --out demo/weights` writes

    OUT/base                  the dense base, which transformers loads too, and the tokenizer
    OUT/base-quantized        its linears as codebooks
    OUT/icarus-{agent}        PEFT adapters on the quantized base, for a shared KV cache
    OUT/conventional-{agent}  PEFT adapters on the quantized base, each with a cache of its own
    OUT/prefill-share-{agent} a decode module that reads prompts which the quantized base wrote
    OUT/recipe.json           every option, loss and held-out accuracy of the above

About fifteen minutes on one H100; on a CPU a day.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxcodec.checkpoints.files import write_json
from jaxcodec.demo.corpus import write_corpus
from jaxcodec.demo.tasks import AGENTS, check
from jaxcodec.demo.tokenizer import CONTEXT_LENGTH, VOCABULARY_SIZE, write_tokenizer
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.load import copy_companions, load_model, save_model
from jaxcodec.models.lora import (
    ALL_TARGETS,
    ICARUS_TARGETS,
    Adapter,
    init_adapter,
    load_adapter,
    save_adapter,
    set_adapter,
    with_bank,
)
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE, Scheme
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.models.transformer import Model, init_model
from jaxcodec.spec import CodebookSpec
from jaxcodec.train.data import Examples, read_examples
from jaxcodec.train.evaluate import evaluate, mean_loss
from jaxcodec.train.loop import TrainOptions, train
from jaxcodec.train.ptq import PRESETS, quantize_model
from jaxcodec.train.step import adapter_training, decode_module_training, full_training

LAYERS = 6
# A third of the base's text is exercises: agents learn to look things up from what it copies.
EXERCISE_SHARE = 0.35
# A story's longest turn is about 60 tokens; what goes on longer is wrong.
MAX_NEW_TOKENS = 80


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Options of every stage.

    Attributes:
      spec: how the linears of the base are stored.
      pretrain_steps: steps of the dense base, 64 windows of 512 tokens each.
      recover_steps: steps that train the quantized base's codebooks, scales and other floats.
      adapter_steps: steps of each adapter, 128 stories each.
      extract_steps: the same for `extract`, which has most to learn: to look things up.
      decode_module_steps: steps of the prefill-share decode module.
      decode_module_agent: the agent that it plays.
      rank: of the adapters.
    """

    spec: str = "m1v4g64"
    pretrain_steps: int = 5000
    recover_steps: int = 800
    adapter_steps: int = 800
    extract_steps: int = 2500
    decode_module_steps: int = 800
    decode_module_agent: str = "compute"
    rank: int = 8


def model_config() -> ModelConfig:
    """The base: 5.8 M parameters, Llama's shape."""
    return ModelConfig(
        model_type="llama",
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_positions=CONTEXT_LENGTH,
        windows=(None,) * LAYERS,
        norm_eps=1e-5,
        tie_embeddings=True,
        bos_id=0,
        eos_ids=(0,),
    )


def make(work: Path, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Run every stage that `work` does not hold yet; returns what recipe.json says."""
    corpus = work / "corpus"
    if not (corpus / "corpus.json").exists():
        write_corpus(corpus, exercise_share=EXERCISE_SHARE)
    write_tokenizer(corpus / "pretrain.jsonl", out / "base")
    tokenizer = PretrainedTokenizer(out / "base")
    report: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe),
        "corpus": json.loads((corpus / "corpus.json").read_text()),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    text = read_examples(corpus / "pretrain.jsonl", tokenizer, CONTEXT_LENGTH)
    heldout = read_examples(corpus / "heldout.jsonl", tokenizer, CONTEXT_LENGTH)
    dense = _pretrain(work, out, recipe, text, heldout)
    base, report["quantized"] = _quantize(work, out, recipe, dense, text, heldout)
    _specialise(work, out, recipe, base, tokenizer)
    report |= measure(out, corpus)
    write_json(out / "recipe.json", report)
    return report


def _pretrain(work: Path, out: Path, recipe: Recipe, text: Examples, heldout: Examples) -> Model:
    start = init_model(model_config(), jax.random.key(0), jnp.bfloat16)
    options = TrainOptions(
        steps=recipe.pretrain_steps,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=200,
        weight_decay=0.1,
        log_every=100,
        evaluate_every=1000,
        checkpoint_every=1000,
    )
    model = train(full_training(start), text, options, work / "pretrain", heldout)
    assert isinstance(model, Model)
    save_model(out / "base", model)
    return model


def _quantize(
    work: Path, out: Path, recipe: Recipe, dense: Model, text: Examples, heldout: Examples
) -> tuple[Model, dict[str, Any]]:
    """K-means, then training of everything but the codes."""
    spec = CodebookSpec.parse(recipe.spec)
    quantized, report = quantize_model(dense, spec, options=PRESETS["kmeans"])
    options = TrainOptions(
        steps=recipe.recover_steps,
        batch_size=64,
        learning_rate=3e-4,
        warmup_steps=100,
        log_every=100,
        evaluate_every=1000,
        checkpoint_every=1000,
    )
    model = train(full_training(quantized), text, options, work / "recover", heldout)
    assert isinstance(model, Model)
    save_model(out / "base-quantized", model)
    copy_companions(out / "base", out / "base-quantized")
    facts = {
        "spec": recipe.spec,
        "bits_per_weight": report.bits_per_weight,
        "loss_after_kmeans": _loss(quantized, heldout),
        "bytes": model.nbytes,
        "dense_bytes": dense.nbytes,
    }
    return model, facts


def _specialise(
    work: Path, out: Path, recipe: Recipe, base: Model, tokenizer: PretrainedTokenizer
) -> None:
    """Train and ship every specialist."""
    options = TrainOptions(
        steps=recipe.adapter_steps,
        batch_size=128,
        learning_rate=2e-3,
        warmup_steps=100,
        log_every=100,
        evaluate_every=1000,
        checkpoint_every=1000,
    )
    data = _stories(work / "corpus", tokenizer)
    for agent in AGENTS:
        examples, heldout = data[agent]
        steps = recipe.extract_steps if agent == "extract" else recipe.adapter_steps
        options = dataclasses.replace(options, steps=steps)
        for kind, scheme, targets in (
            ("icarus", ICARUS, ICARUS_TARGETS),
            ("conventional", CONVENTIONAL, ALL_TARGETS),
        ):
            start = init_adapter(base, jax.random.key(1), recipe.rank, 2.0 * recipe.rank, targets)
            name = f"{kind}-{agent}"
            adapter = train(
                adapter_training(base, start, scheme), examples, options, work / name, heldout
            )
            assert isinstance(adapter, Adapter)
            half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter)
            save_adapter(out / name, half, base_name="base-quantized")
        if agent == recipe.decode_module_agent:
            slower = dataclasses.replace(
                options, steps=recipe.decode_module_steps, learning_rate=5e-4
            )
            name = f"prefill-share-{agent}"
            module = train(
                decode_module_training(base, base), examples, slower, work / name, heldout
            )
            assert isinstance(module, Model)
            save_model(out / name, module)


def _stories(corpus: Path, tokenizer: PretrainedTokenizer) -> dict[str, tuple[Examples, Examples]]:
    """(train, heldout) of every agent, all of one length, so that all share compiled steps."""
    read = {
        (agent, split): read_examples(corpus / f"{agent}.{split}.jsonl", tokenizer, CONTEXT_LENGTH)
        for agent in AGENTS
        for split in ("train", "heldout")
    }
    longest = max(examples.trimmed().max_length for examples in read.values())
    fitted = {
        key: dataclasses.replace(examples, max_length=longest) for key, examples in read.items()
    }
    return {agent: (fitted[agent, "train"], fitted[agent, "heldout"]) for agent in AGENTS}


# A model with its adapter in slot 0, its scheme, and who writes its prompts if another does.
Candidate = tuple[Model, Scheme, Model | None]


def measure(weights: Path, corpus: Path, dtype: jnp.dtype | None = None) -> dict[str, Any]:
    """Held-out losses and accuracies of what lies in `weights`, read back as a user would.

    Args:
      weights: what `make` wrote.
      corpus: what `jaxcodec.demo.corpus` wrote.
      dtype: to compute in; None for bfloat16, as stored.
    """
    tokenizer = PretrainedTokenizer(weights / "base")
    dense, base = (load_model(weights / name, dtype) for name in ("base", "base-quantized"))
    heldout = read_examples(corpus / "heldout.jsonl", tokenizer, CONTEXT_LENGTH)
    results: dict[str, Any] = {
        "measured_on": f"{jax.devices()[0].device_kind}, {jnp.dtype(base.dtype).name}",
        "heldout_loss": {"dense": _loss(dense, heldout), "quantized": _loss(base, heldout)},
        "heldout_accuracy": {},
    }
    for agent in AGENTS:
        candidates = {"dense base": (dense, CONVENTIONAL, None), "base": (base, CONVENTIONAL, None)}
        candidates |= _specialists(weights, agent, base)
        file = corpus / f"{agent}.heldout.jsonl"
        results["heldout_accuracy"][agent] = _accuracies(file, agent, tokenizer, candidates)
    return results


def _specialists(weights: Path, agent: str, base: Model) -> dict[str, Candidate]:
    """Everybody who was trained to play `agent`."""
    found: dict[str, Candidate] = {}
    for kind, scheme in (("icarus", ICARUS), ("conventional", CONVENTIONAL)):
        adapter = load_adapter(weights / f"{kind}-{agent}", base)
        room = with_bank(base, AdapterBank(1, adapter.rank, adapter.targets))
        found[kind] = set_adapter(room, adapter, 0), scheme, None
    module = weights / f"prefill-share-{agent}"
    if module.exists():
        found["prefill_share"] = load_model(module, base.dtype), PREFILL_SHARE, base
    return found


def _loss(model: Model, examples: Examples) -> float:
    return float(mean_loss(model, examples).mean)


def _accuracies(
    file: Path, agent: str, tokenizer: PretrainedTokenizer, candidates: dict[str, Candidate]
) -> dict[str, dict[str, float]]:
    """Share of right answers and loss of everybody who can play `agent`."""
    results = {}
    for name, (model, scheme, writer) in candidates.items():
        result = evaluate(
            file, tokenizer, model, scheme, writer, max_new_tokens=MAX_NEW_TOKENS, check=check
        )
        results[name] = {key: result[key] for key in ("right", "loss", "examples")}
        print(f"{agent:10}{name:16}{result['right']:8.1%}  loss {result['loss']:.4f}", flush=True)
    return results


def main() -> None:
    """Runs `make` from the command line."""
    import tyro

    def run(work: Path, out: Path, recipe: Recipe = Recipe()) -> None:  # noqa: B008
        make(work, out, recipe)

    tyro.cli(run)


if __name__ == "__main__":
    main()
