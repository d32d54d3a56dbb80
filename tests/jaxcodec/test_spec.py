"""The format's name, its limits and its price."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcodec.spec import CODE_BITS, CODEBOOK_COUNTS, VECTOR_LENGTHS, CodebookSpec
from jaxcodec.tensor import random_codebook_tensor

SPECS = st.builds(
    lambda m, v, groups, b: CodebookSpec(m, v, v * groups, b),
    st.sampled_from(CODEBOOK_COUNTS),
    st.sampled_from(VECTOR_LENGTHS),
    st.integers(1, 4096),
    st.sampled_from(CODE_BITS),
)


@given(SPECS)
def test_a_printed_spec_parses_to_itself(spec: CodebookSpec) -> None:
    assert CodebookSpec.parse(str(spec)) == spec


def test_specs_print_as_the_papers_do() -> None:
    assert str(CodebookSpec(2, 8, 128)) == "m2v8g128"
    assert str(CodebookSpec(1, 8, 4096, 16)) == "m1v8b16g4096"


@pytest.mark.parametrize("text", ["", "v8m2g128", "m2v8", "m2v8g128 ", "m2v8g-1", "m2v8g128b8"])
def test_what_is_not_a_spec_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as m2v8g128"):
        CodebookSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "field"),
    [("m9v8g128", "(m)"), ("m1v3g128", "(v)"), ("m1v8b5g128", "(b)"), ("m1v8g12", "(g)")],
)
def test_fields_outside_the_format_are_named(text: str, field: str) -> None:
    with pytest.raises(ValueError, match=f".*\\{field[:-1]}\\)"):
        CodebookSpec.parse(text)


# From the CodeGEMM paper: without the codebooks, which a large matrix pays off.
@pytest.mark.parametrize(
    ("text", "bits"), [("m1v4g128", 2.125), ("m2v8g128", 2.125), ("m1v4g32", 2.5), ("m3v16g32", 2)]
)
def test_bits_per_weight_are_the_papers_plus_the_codebooks(text: str, bits: float) -> None:
    spec, K, N = CodebookSpec.parse(text), 4096, 14336
    codebooks = 16 * spec.num_codebooks * 256 * spec.vector_length / (K * N)
    assert spec.bits_per_weight(K, N) == pytest.approx(bits + codebooks, abs=1e-12)


@pytest.mark.parametrize("text", ["m1v4g128", "m3v16g32", "m2v2b4g64", "m4v8b2g128", "m1v4b16g8"])
def test_bits_per_weight_are_those_in_memory(text: str, key: jax.Array) -> None:
    spec = CodebookSpec.parse(text)
    w = random_codebook_tensor(key, spec, 256, 24)
    assert w.bits_per_weight == spec.bits_per_weight(256, 24)
    assert w.bits_per_weight * 256 * 24 == 8 * w.nbytes


@pytest.mark.parametrize(("K", "reason"), [(192, "g = 128"), (0, "K > 0")])
def test_a_matrix_that_does_not_fit_is_refused(K: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CodebookSpec.parse("m2v8g128").check_shape(K, 16)


def test_codes_must_fill_words() -> None:
    with pytest.raises(ValueError, match="not a multiple of 64 weights"):
        CodebookSpec.parse("m1v4b2g4").check_shape(96, 16)
