"""The shape of a codebook format, and what it costs in bits.

Letters: m codebooks, b bits a code, v weights a code, g weights a scale, K input and N output
features.
"""

import dataclasses
import re

# Up to AQLM's 8x8. Kernels for GPUs hold less, and refuse what they cannot.
CODEBOOK_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8)
VECTOR_LENGTHS = (2, 4, 8, 16, 32)
CODE_BITS = (2, 4, 8, 16)  # those that divide a word
WORD_BITS = 32  # codes are packed into uint32 words

_PATTERN = re.compile(r"m(\d+)v(\d+)(?:b(\d+))?g(\d+)")


@dataclasses.dataclass(frozen=True)
class CodebookSpec:
    """How a matrix is stored: each run of `v` weights along K is a sum of `m` codebook vectors.

    Attributes:
      num_codebooks: m, codebooks added up for one vector (1 to 8).
      vector_length: v, weights that one code stands for, along K (2, 4, 8, 16 or 32).
      group_size: g, weights along K that share one scale; K itself for one scale per output.
      bits: b, bits of one code; a codebook has 2**b vectors (2, 4, 8 or 16).

    Raises:
      ValueError: a field outside the format, with the values that are allowed.

    Source: AQLM (arXiv 2401.06118) section 3; CodeGEMM (arXiv 2512.17970) section 3 for g.
    """

    num_codebooks: int
    vector_length: int
    group_size: int
    bits: int = 8

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("num_codebooks (m)", self.num_codebooks, CODEBOOK_COUNTS),
            ("vector_length (v)", self.vector_length, VECTOR_LENGTHS),
            ("bits (b)", self.bits, CODE_BITS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value}.")
        if self.group_size < self.vector_length or self.group_size % self.vector_length:
            raise ValueError(
                f"group_size (g) must be a positive multiple of v = {self.vector_length}, "
                f"got {self.group_size}."
            )

    @classmethod
    def parse(cls, text: str) -> "CodebookSpec":
        """Read a spec as the papers print it: `m2v8g128`, or `m1v8b16g4096` when b is not 8."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"Expected a spec such as m2v8g128 or m1v8b16g4096, got {text!r}.")
        m, v, b, g = match.groups()
        return cls(int(m), int(v), int(g), int(b or 8))

    def __str__(self) -> str:
        bits = "" if self.bits == 8 else f"b{self.bits}"
        return f"m{self.num_codebooks}v{self.vector_length}{bits}g{self.group_size}"

    @property
    def codebook_size(self) -> int:
        """Vectors in one codebook, 2**b."""
        return 2**self.bits

    @property
    def codes_per_word(self) -> int:
        """Codes in one packed uint32."""
        return WORD_BITS // self.bits

    def check_shape(self, K: int, N: int) -> None:
        """Refuse a matrix [K, N] that the format cannot hold."""
        if K <= 0 or N <= 0:
            raise ValueError(f"A weight needs K > 0 and N > 0, got K = {K}, N = {N}.")
        if K % self.group_size:
            raise ValueError(f"{self}: K = {K} is not a multiple of g = {self.group_size}.")
        word = self.vector_length * self.codes_per_word
        if K % word:
            raise ValueError(
                f"{self}: K = {K} is not a multiple of {word} weights, the content of one packed "
                f"word ({self.codes_per_word} codes of v = {self.vector_length})."
            )

    def bits_per_weight(self, K: int, N: int, value_bits: int = 16) -> float:
        """Bits stored per weight of a [K, N] matrix: codes, scales and codebooks all counted.

        Args:
          K: input features.
          N: output features.
          value_bits: bits of one scale or codebook entry (16 for bf16 and f16).
        """
        codes = self.num_codebooks * self.bits * (K // self.vector_length) * N
        scales = value_bits * (K // self.group_size) * N
        codebooks = value_bits * self.num_codebooks * self.codebook_size * self.vector_length
        return (codes + scales + codebooks) / (K * N)
