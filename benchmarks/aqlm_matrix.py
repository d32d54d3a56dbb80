"""One matrix by our quantizer and by AQLM's own: tr(dW^T H dW) and the time it takes.

    git clone https://github.com/Vahe1994/AQLM build/aqlm
    python -m benchmarks.aqlm_matrix --aqlm build/aqlm --out build/aqlm_matrix.json

The reference is Vahe1994/AQLM, `aq_engine.AQEngine`, as its `main.py` runs it on a layer: PyTorch,
X^T X in float64, its own learning rate and k-means. It is imported from the user's folder, and is
left out where there is none. Both get the same W, the same H, one scale an output feature (all
that AQLM has), as many rounds of as many Adam steps and of one beam search as the other, and the
same beam; neither may stop early. Then ours runs as its `default` preset is, and the reference,
once, until a round of as many steps gains less than the tolerance of its README's commands. H is
damped in none of them.

The first time in equal rounds counts all compilation and warming up, `seconds` is the least of the
same work again. Ours also counts the search that follows the rounding of codebooks and scales to
bfloat16.

Letters: W [K, N], K input and N output features, H [K, K].
"""

import argparse
import dataclasses
import importlib
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.head import head
from jaxcodec.checkpoints.files import write_json
from jaxcodec.quantize.additive import PRESETS, AdditiveOptions, quantize_additive
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import dequantize

Row = dict[str, Any]
# Both in equal rounds, then ours by its default preset and the reference until its tolerance.
EQUAL, AQLM = "jaxcodec", "aqlm"
DEFAULT, AQLM_TO_THE_END = "jaxcodec, default preset", "aqlm, until its tolerance"
# Of the reference's main.py: --lr, --init_max_iter, --max_epochs.
REFERENCE_LEARNING_RATE = 1e-4
REFERENCE_ITERATIONS = 100
REFERENCE_ROUNDS = 1000
# --relative_mse_tolerance in the commands of its README.
REFERENCE_TOLERANCE = 0.01
# Inputs: this many tokens for each feature, so that H has full rank.
TOKENS_PER_FEATURE = 4
# Directions that the inputs share, and channels far larger than the rest: in trained models both
# are what makes H unlike the identity (LLM.int8(), arXiv 2208.07339, section 4).
SHARED_DIRECTIONS = 32
OUTLIER_SHARE, OUTLIER_SCALE = 1 / 512, 20.0
# Student's t with few degrees of freedom: weights with heavier tails than normal ones.
DEGREES_OF_FREEDOM = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Quantize a matrix with both.

    Attributes:
      out: JSON file of the results, written after every format.
      aqlm: a checkout of Vahe1994/AQLM; None for ours alone.
      size: K and N.
      formats: such as m2v8b8; the scale's group is K.
      rounds: of Adam steps and a beam search.
      steps: of Adam in a round.
      learning_rate: of ours in rounds of so many steps; the reference has its own.
      beam: hypotheses.
      repeats: times that each runs; the first one compiles.
      seed: of matrix, inputs and both quantizers.
    """

    out: Path
    aqlm: Path | None = None
    size: tuple[int, int] = (4096, 4096)
    formats: tuple[str, ...] = ("m2v8b8", "m1v4b8")
    rounds: int = 4
    steps: int = 100
    learning_rate: float = 1e-3
    beam: int = 1
    repeats: int = 2
    seed: int = 0


def matrix(K: int, N: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """W f32 [K, N] and H = X^T X / tokens, f32 [K, K], of correlated inputs with outliers."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    W = rng.standard_t(DEGREES_OF_FREEDOM, (K, N)) / K**0.5
    W *= np.exp(0.3 * normal(N))  # columns of different norms
    tokens, directions = TOKENS_PER_FEATURE * K, min(SHARED_DIRECTIONS, K)
    X = normal(tokens, K)
    X += normal(tokens, directions) @ normal(directions, K) / np.float32(directions**0.5)
    X[:, rng.permutation(K) < max(K * OUTLIER_SHARE, 1)] *= OUTLIER_SCALE
    return W.astype(np.float32), X.T @ X / np.float32(tokens)


def relative_objective(W: np.ndarray, H: np.ndarray, W_: np.ndarray) -> float:
    """tr(dW^T H dW) / tr(W^T H W) with dW = W - W_, in float64."""
    W, H, W_ = (x.astype(np.float64) for x in (W, H, W_))
    dW = W - W_
    return float(np.sum(dW * (H @ dW)) / np.sum(W * (H @ W)))


def ours(
    W: np.ndarray,
    H: np.ndarray,
    spec: CodebookSpec,
    quantizer: str,
    how: AdditiveOptions,
    options: Options,
) -> Row:
    """Errors after the rounds and as stored in bfloat16, and seconds."""
    how = dataclasses.replace(how, damping=0.0)  # as the reference: H is the same for both
    seconds, w, found = [], None, ()
    W_device, H_device = jnp.asarray(W), jnp.asarray(H)
    for _ in range(options.repeats):
        start = time.perf_counter()
        w, found = quantize_additive(W_device, H_device, spec, jax.random.key(options.seed), how)
        jax.block_until_ready(w)
        seconds.append(time.perf_counter() - start)
    assert w is not None
    searched = [stage for stage in found if stage.name == "beam_search"]
    W_ = np.asarray(dequantize(w, jnp.float32))
    return {
        "quantizer": quantizer,
        "error": searched[-1].error,
        "rounds_made": len(searched),
        "stored_error": relative_objective(W, H, W_),
        "stages": [dataclasses.asdict(stage) for stage in found],
        **_times(seconds),
    }


def reference(
    aqlm: Path,
    W: np.ndarray,
    H: np.ndarray,
    spec: CodebookSpec,
    options: Options,
    *,
    to_the_end: bool = False,
) -> Row:
    """The same of AQLM's engine; it stores codebooks and scales in float16.

    With `to_the_end` it runs once, as many rounds as its tolerance asks for.

    Raises:
      ImportError: the folder holds no AQLM, or PyTorch is missing.
    """
    # Its progress bars cannot be turned off by an argument.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if str(aqlm) not in sys.path:
        sys.path.insert(0, str(aqlm))
    torch, engine_module = (importlib.import_module(name) for name in ("torch", "aq_engine"))
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    (K, N), seconds = W.shape, []
    layer = torch.nn.Linear(K, N, bias=False, device=device)
    layer.weight.data = torch.tensor(W.T.copy(), device=device)
    found, searches = None, 0

    class Engine(engine_module.AQEngine):
        def beam_search_update_codes_(self, *arguments, **keywords):
            nonlocal searches
            searches += 1
            return super().beam_search_update_codes_(*arguments, **keywords)

    for _ in range(1 if to_the_end else options.repeats):
        wait()
        start, searches = time.perf_counter(), 0
        engine = Engine(layer)
        engine.XTX.copy_(torch.tensor(H, device=device))
        how = _arguments(spec, options, device, to_the_end=to_the_end)
        found = engine.quantize(args=how, verbose=False)
        wait()
        seconds.append(time.perf_counter() - start)
    assert found is not None
    with torch.no_grad():
        error = relative_objective(W, H, found().cpu().numpy().T)
        for name in ("codebooks", "scales"):
            values = getattr(found, name)
            values.copy_(values.half().float())
        stored_error = relative_objective(W, H, found().cpu().numpy().T)
    return {
        "quantizer": AQLM_TO_THE_END if to_the_end else AQLM,
        "error": error,
        "rounds_made": searches,
        "stored_error": stored_error,
        "torch": torch.__version__,
        "torch_jit": os.environ.get("AQ_USE_JIT", "1"),
        **_times(seconds),
    }


def measure(options: Options, name: str) -> list[Row]:
    """Rows of one format: ours twice, and the reference twice if it is there."""
    K, N = options.size
    spec = CodebookSpec.parse(f"{name}g{K}")
    W, H = matrix(K, N, options.seed)
    what = {"spec": str(spec), "K": K, "N": N}
    equal = AdditiveOptions(
        rounds=options.rounds,
        steps=options.steps,
        learning_rate=options.learning_rate,
        beam=options.beam,
        tolerance=0.0,
    )
    rows = [
        what | ours(W, H, spec, quantizer, how, options)
        for quantizer, how in ((EQUAL, equal), (DEFAULT, PRESETS["default"]))
    ]
    if options.aqlm is not None:
        rows += [
            what | reference(options.aqlm, W, H, spec, options, to_the_end=to_the_end)
            for to_the_end in (False, True)
        ]
    return rows


def summary(rows: list[Row]) -> str:
    """A line for each run; ratios are to the reference's in equal rounds, empty without it."""
    lines = [
        f"{'spec':<12}{'quantizer':<26}{'rounds':>6}{'error':>10}{'ratio':>7}"
        f"{'stored':>10}{'ratio':>7}{'seconds':>9}{'ratio':>7}{'first':>8}"
    ]
    references = {row["spec"]: row for row in rows if row["quantizer"] == AQLM}
    for row in rows:
        reference = references.get(row["spec"])
        line = f"{row['spec']:<12}{row['quantizer']:<26}{row['rounds_made']:>6}"
        for what, width, digits in (("error", 10, 6), ("stored_error", 10, 6), ("seconds", 9, 2)):
            ratio = "" if reference is None else f"{row[what] / reference[what]:.3f}"
            line += f"{row[what]:>{width}.{digits}f}{ratio:>7}"
        lines.append(line + f"{row['first_seconds']:>8.2f}")
    return "\n".join(lines)


def _arguments(
    spec: CodebookSpec, options: Options, device: Any, *, to_the_end: bool = False
) -> argparse.Namespace:
    """What AQLM's command line would say; scale_nbits = 0 is one scale an output feature."""
    return argparse.Namespace(
        devices=[device],
        out_group_size=1,
        in_group_size=spec.vector_length,
        num_codebooks=spec.num_codebooks,
        nbits_per_codebook=spec.bits,
        codebook_value_nbits=16,
        codebook_value_num_groups=1,
        scale_nbits=0,
        init_max_iter=REFERENCE_ITERATIONS,
        init_max_points_per_centroid=None,
        lr=REFERENCE_LEARNING_RATE,
        max_epochs=REFERENCE_ROUNDS if to_the_end else options.rounds,
        steps_per_epoch=options.steps,
        relative_mse_tolerance=REFERENCE_TOLERANCE if to_the_end else None,
        print_frequency=options.rounds * options.steps,
        beam_size=options.beam,
    )


def _times(seconds: list[float]) -> Row:
    return {"first_seconds": round(seconds[0], 3), "seconds": round(min(seconds), 3)}


def main() -> None:
    """Run the command line; the file is written after every format."""
    options = tyro.cli(Options, prog="python -m benchmarks.aqlm_matrix")
    content: dict[str, Any] = {
        **head("aqlm_matrix"),
        "options": {
            k: str(v) for k, v in dataclasses.asdict(options).items() if k not in ("out", "aqlm")
        },
        "rows": [],
    }
    for name in options.formats:
        content["rows"] += measure(options, name)
        print(summary(content["rows"]), flush=True)
        write_json(options.out, content)


if __name__ == "__main__":
    main()
