"""What a checkpoint's config.json says of a decoder-only Transformer, as one frozen value.

Llama 3.x, Qwen2/2.5, Qwen3 and Mistral are one architecture with these switches; nothing beyond
this file knows them by name.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
# Values that Hugging Face takes when config.json leaves the key out (classes of the same names).
ROPE_THETA = 10_000.0
NORM_EPS = 1e-6
MISTRAL_WINDOW = 4096
QWEN3_HEAD_DIM = 128


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching of rotary frequencies; lengths in tokens.

    Source: the Llama 3.1 release (`rope_type` "llama3"): wavelengths above original / low_freq
    are divided by `factor`, below original / high_freq kept, in between interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder-only Transformer.

    Attributes:
      windows: per layer, how many positions back a token sees (itself included); None for all.
      attention_bias: q, k and v projections add a bias (Qwen2).
      qk_norm: RMS norm over each head of q and k before the rotary embedding (Qwen3).
      max_positions: longest sequence the model was made for, in tokens.
      eos_ids: tokens that end a response; empty when config.json names none.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    windows: tuple[int | None, ...]
    rope_theta: float = ROPE_THETA
    rope_scaling: Llama3Rope | None = None
    norm_eps: float = NORM_EPS
    tie_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ValueError(
                f"Unknown architecture: model_type {self.model_type!r}; "
                f"known are {', '.join(MODEL_TYPES)}."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is not a multiple of "
                f"num_kv_heads = {self.num_kv_heads}."
            )
        for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
            if type(token) is not int or token < 0:
                raise ValueError(f"bos and eos must be token ids, got {token!r}.")
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows names {len(self.windows)} layers, the model has {self.num_layers}."
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Read a Hugging Face config.json, in the spelling of transformers 4 or 5.

        Raises:
          ValueError: an unknown architecture, a missing key, or an option that is not supported
            and would change the result (activation, biases, kind of rope scaling).
        """
        model_type = hf.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"Unknown architecture: model_type {model_type!r}; "
                f"known are {', '.join(MODEL_TYPES)}."
            )
        _refuse_unsupported(hf)
        heads = _required(hf, "num_attention_heads")
        hidden = _required(hf, "hidden_size")
        layers = _required(hf, "num_hidden_layers")
        head_dim = hf.get("head_dim") or (
            QWEN3_HEAD_DIM if model_type == "qwen3" else hidden // heads
        )
        theta, scaling = _rope(hf)
        eos = hf.get("eos_token_id")
        return cls(
            model_type=model_type,
            vocab_size=_required(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_required(hf, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_positions=_required(hf, "max_position_embeddings"),
            windows=_windows(hf, layers),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=hf.get("rms_norm_eps", NORM_EPS),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            attention_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            bos_id=hf.get("bos_token_id"),
            eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )

    def to_hf(self) -> dict[str, Any]:
        """config.json for these sizes, in the spelling that transformers 4 and 5 both read."""
        hf: dict[str, Any] = {
            "architectures": [MODEL_TYPES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else _scaling_to_hf(self),
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids),
        }
        if not self.eos_ids:
            hf["eos_token_id"] = None
        return hf | _windows_to_hf(self)


def _required(hf: Mapping[str, Any], key: str) -> int:
    if hf.get(key) is None:
        raise ValueError(f"config.json lacks {key!r}, which {hf['model_type']} needs.")
    if type(hf[key]) is not int or hf[key] < 1:
        raise ValueError(f"config.json: {key} must be a whole number above 0, got {hf[key]!r}.")
    return hf[key]


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported; expected 'silu'.")
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ValueError(f"{key} is not supported for model_type {hf['model_type']!r}.")


def _rope(hf: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    """Base and scaling from `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling`."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or ROPE_THETA)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported; known are default and llama3.")
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in needed if key not in rope]:
        raise ValueError(f"config.json: llama3 rope scaling lacks {', '.join(missing)}.")
    return theta, Llama3Rope(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_positions=rope["original_max_position_embeddings"],
    )


def _scaling_to_hf(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    assert scaling is not None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _windows(hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Which layers slide, by the rule of each architecture."""
    if hf["model_type"] == "mistral":
        return (hf.get("sliding_window", MISTRAL_WINDOW),) * layers
    if not hf.get("use_sliding_window") or hf.get("sliding_window") is None:
        return (None,) * layers
    window = hf["sliding_window"]
    kinds = hf.get("layer_types")
    if kinds is None:
        first = _required(hf, "max_window_layers")
        return tuple(window if i >= first else None for i in range(layers))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    sizes = {w for w in config.windows if w is not None}
    if len(sizes) > 1:
        raise ValueError(f"config.json holds one sliding window, the layers have {sorted(sizes)}.")
    window = sizes.pop() if sizes else None
    if config.model_type == "mistral":
        return {"sliding_window": window}
    if config.model_type == "llama":
        return {}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    first = kinds.index("sliding_attention") if window else config.num_layers
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def rope_frequencies(config: ModelConfig) -> tuple[float, ...]:
    """Radians per position of each of the head_dim / 2 rotary pairs.

    Source: RoFormer (arXiv 2104.09864) equation 15; `Llama3Rope` for the scaling.
    """
    half = config.head_dim // 2
    plain = [config.rope_theta ** (-i / half) for i in range(half)]
    scaling = config.rope_scaling
    if scaling is None:
        return tuple(plain)
    return tuple(_llama3_frequency(f, scaling) for f in plain)


def _llama3_frequency(frequency: float, scaling: Llama3Rope) -> float:
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (kept + (1 - kept) / scaling.factor)
