"""LoRA adapters on disk as PEFT stores them.

    adapter_config.json          r, lora_alpha, target_modules and some thirty fields more
    adapter_model.safetensors    base_model.model.<module>.lora_{A,B}.weight [R, K], [N, R]

Letters: K input and N output features of a module, R rank.
Source: https://huggingface.co/docs/peft, "PEFT checkpoint format".
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcodec.checkpoints.files import read_json, replacement, write_json
from jaxcodec.checkpoints.safetensors import read_tensor_file, write_tensor_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields of adapter_config.json that say how an adapter was made, not what it computes. Any other
# field that is not read below must be off (null, false, zero, empty, "none"): what this does not
# know could change the result.
INFORMATIVE = {
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora"}
# Initialisations that leave the base weights as they are; PiSSA, OLoRA and their like do not.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")


@dataclasses.dataclass(frozen=True)
class LoraCheckpoint:
    """A LoRA as it lies on disk: y = x W^T + (alpha / rank) * x A^T B^T.

    Attributes:
      weights: (A [R, K], B [N, R]) by module, such as `model.layers.0.self_attn.q_proj`.
      rank: R.
      alpha: numerator of the scale (already times sqrt(R) for a rank-stabilised LoRA).
      base_model: name or path of the base model, if it is known.
    """

    weights: Mapping[str, tuple[np.ndarray, np.ndarray]]
    rank: int
    alpha: float
    base_model: str | None = None

    def check(self, name: str = "adapter") -> "LoraCheckpoint":
        """Refuse weights that are not finite floats of shapes [R, K] and [N, R]; return self.

        Raises:
          ValueError: names the module and what was expected.
        """
        if self.rank < 1 or not math.isfinite(self.alpha):
            raise ValueError(
                f"{name}: r must be positive and alpha finite, got {self.rank}, {self.alpha}."
            )
        if not self.weights:
            raise ValueError(f"{name} holds no LoRA weights.")
        for module, (a_rk, b_nr) in self.weights.items():
            for half, axis, tensor in (("lora_A", 0, a_rk), ("lora_B", 1, b_nr)):
                if tensor.ndim != 2 or tensor.shape[axis] != self.rank:
                    expected = f"[{self.rank}, K]" if axis == 0 else f"[N, {self.rank}]"
                    raise ValueError(
                        f"{name}: {half} of {module} must be {expected} for r = {self.rank}, "
                        f"got {list(tensor.shape)}."
                    )
                if not np.all(np.isfinite(tensor.astype(np.float32))):
                    raise ValueError(f"{name}: {half} of {module} holds NaN or infinity.")
        return self


def read_adapter(directory: str | Path) -> LoraCheckpoint:
    """Read a PEFT LoRA strictly: every tensor and every option is understood, or refused.

    Raises:
      FileNotFoundError: adapter_config.json or adapter_model.safetensors is missing.
      ValueError: a key that is not a LoRA half, half of a pair, a shape that contradicts r, an
        option that would change the result and is not supported, or modules that do not match
        target_modules; all are named.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    _refuse_unsupported(config, directory / CONFIG)
    path = directory / WEIGHTS
    weights = _pairs(read_tensor_file(path), path)
    _check_targets(config["target_modules"], list(weights), directory)
    rank, alpha = config["r"], float(config["lora_alpha"])
    if config.get("use_rslora"):
        # Rank-stabilised LoRA (arXiv 2312.03732) scales by alpha / sqrt(r).
        alpha *= math.sqrt(rank)
    return LoraCheckpoint(weights, rank, alpha, config.get("base_model_name_or_path")).check(
        str(directory)
    )


def write_adapter(directory: str | Path, adapter: LoraCheckpoint) -> None:
    """Write `adapter` so that `read_adapter` and PEFT load it; whole or not at all."""
    adapter.check()
    directory = Path(directory)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in adapter.weights}),
    }
    tensors = {}
    for module, (a_rk, b_nr) in adapter.weights.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a_rk
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_nr
    with replacement(directory / WEIGHTS, directory / CONFIG) as [weights_path, config_path]:
        write_tensor_file(weights_path, tensors)
        write_json(config_path, config)


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, got {config.get('peft_type')!r}.")
    if missing := sorted({"r", "lora_alpha", "target_modules"} - config.keys()):
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    rank, alpha = config["r"], config["lora_alpha"]
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ValueError(f"{path}: r and lora_alpha must be numbers, got {rank!r} and {alpha!r}.")
    start = config.get("init_lora_weights")
    if start not in PLAIN_INITIALISATIONS:
        raise ValueError(
            f"{path}: init_lora_weights = {start!r} changes the base weights; convert the adapter "
            "to a plain LoRA with PEFT first."
        )
    for field in sorted(config.keys() - READ - INFORMATIVE):
        if config[field] and config[field] != "none":
            raise ValueError(
                f"{path}: {field} = {config[field]!r} is not supported; expected it to be off."
            )


def _pairs(
    tensors: Mapping[str, np.ndarray], path: Path
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    halves: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{path}: unexpected key {key}; expected {PREFIX}<module>.lora_A.weight or "
                "lora_B.weight."
            )
        module, half = match.groups()
        halves.setdefault(module, {})[half] = tensor
    for module, pair in halves.items():
        for half in "AB":
            if half not in pair:
                raise ValueError(f"{path}: {module} lacks lora_{half}.weight, half of its pair.")
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def _check_targets(targets: Any, modules: list[str], directory: Path) -> None:
    """Refuse modules that `target_modules` does not name, and names that no module has."""
    if targets == "all-linear":
        return
    if isinstance(targets, str):
        try:
            matches = {targets: [m for m in modules if re.fullmatch(targets, m)]}
        except re.error as error:
            raise ValueError(
                f"{directory}: target_modules {targets!r} is no regular expression: {error}."
            ) from None
    elif isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        matches = {t: [m for m in modules if m == t or m.endswith(f".{t}")] for t in targets}
    else:
        raise ValueError(
            f"{directory}: target_modules must be a list of names or one regular expression, "
            f"got {targets!r}."
        )
    named = {module for found in matches.values() for module in found}
    if extra := [module for module in modules if module not in named]:
        raise ValueError(
            f"{directory}: {WEIGHTS} changes {', '.join(extra)}, which target_modules "
            f"{targets!r} does not name."
        )
    if unused := [target for target, found in matches.items() if not found]:
        raise ValueError(
            f"{directory}: target_modules names {', '.join(unused)}, for which {WEIGHTS} has no "
            "weights."
        )
