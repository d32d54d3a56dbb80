"""Adapters: against PEFT, many in one bank, ranks that differ, and what is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxcodec.models.load import load_model
from jaxcodec.models.lora import (
    ALL_TARGETS,
    ICARUS_TARGETS,
    Adapter,
    AdapterBank,
    bank_positions,
    init_adapter,
    load_adapter,
    save_adapter,
    set_adapter,
    slot_values,
    with_bank,
    write_slot,
)
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS
from jaxcodec.models.steps import forward, generate
from jaxcodec.models.transformer import Model

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize("case", ["llama31_lora", "llama31_lora_all"])
def test_a_peft_adapter_gives_the_logits_of_peft(case: str) -> None:
    expected = load_file(FIXTURES / case / "expected.safetensors")
    tokens, lengths = expected["tokens"], expected["lengths"]
    base = load_model(FIXTURES / "llama31", jnp.float32)
    adapter = load_adapter(FIXTURES / case, base)
    model = set_adapter(with_bank(base, AdapterBank(2, 8, ALL_TARGETS)), adapter, 1)
    slots = jnp.ones((len(tokens),), jnp.int32)
    logits = forward(model, jnp.asarray(tokens), jnp.asarray(lengths), slots=slots)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            logits[row, :length], expected["logits"][row, :length], atol=1e-4, rtol=0
        )
    prompts = [tokens[row, :length].tolist() for row, length in enumerate(lengths)]
    assert generate(model, prompts, 64, slots=[1, 1, 1]) == expected["greedy"].tolist()


def test_written_as_peft_and_read_again_it_is_equal(
    base: Model, random_adapter, tmp_path: Path
) -> None:
    adapter = random_adapter(base, 0)
    save_adapter(tmp_path, adapter, base_name="tiny")
    again = load_adapter(tmp_path, base)
    assert (again.rank, again.alpha) == (adapter.rank, adapter.alpha)
    jax.tree.map(np.testing.assert_array_equal, again.weights, adapter.weights)


@pytest.mark.parametrize("scheme", [CONVENTIONAL, ICARUS], ids=str)
def test_adapters_in_one_bank_act_as_each_alone(
    scheme, base: Model, random_adapter, random_tokens
) -> None:
    adapters = [random_adapter(base, seed) for seed in (1, 2)]
    tokens, counts = random_tokens((3, 6)), jnp.array([6, 6, 6])
    bank = with_bank(base, AdapterBank(4, 4, ICARUS_TARGETS))
    for slot, adapter in zip((3, 1), adapters, strict=True):
        bank = set_adapter(bank, adapter, slot)
    together = forward(bank, tokens, counts, scheme, slots=jnp.array([1, 0, 3]))
    alone = with_bank(base, AdapterBank(1, 4, ICARUS_TARGETS))
    for row, adapter in ((0, adapters[1]), (1, None), (2, adapters[0])):
        model = set_adapter(alone, adapter, 0)
        expected = forward(model, tokens, counts, scheme, slots=jnp.zeros(3, jnp.int32))
        np.testing.assert_allclose(together[row], expected[row], atol=2e-4)


def test_a_new_adapter_is_the_identity(base: Model, random_tokens) -> None:
    adapter = init_adapter(base, jax.random.key(0), rank=4, targets=ALL_TARGETS)
    model = set_adapter(with_bank(base, AdapterBank(1, 4, ALL_TARGETS)), adapter, 0)
    tokens, counts = random_tokens((1, 6)), jnp.array([6])
    np.testing.assert_array_equal(
        forward(model, tokens, counts, slots=jnp.array([0])), forward(base, tokens, counts)
    )


def test_a_merged_adapter_is_the_same_model(base: Model, random_adapter, random_tokens) -> None:
    adapter = random_adapter(base, 7, ALL_TARGETS)
    model = set_adapter(with_bank(base, AdapterBank(2, 4, ALL_TARGETS)), adapter, 1)
    module = base.module
    for path, (a, b) in adapter.weights.items():
        _, layer, block, name = path.split(".")
        linear = getattr(getattr(module.layers[int(layer)], block), name)
        linear.kernel.set_value(linear.kernel[...] + adapter.alpha / adapter.rank * a @ b)
    tokens, counts = random_tokens((1, 6)), jnp.array([6])
    hidden = forward(model, tokens, counts, slots=jnp.array([1]))
    expected = forward(Model(base.config, nnx.state(module)), tokens, counts)
    np.testing.assert_allclose(hidden, expected, atol=2e-4)


def test_a_smaller_rank_is_padded_and_a_cleared_slot_is_the_base(
    base: Model, random_adapter, random_tokens
) -> None:
    adapter = random_adapter(base, 1)
    tokens, counts, slots = random_tokens((1, 6)), jnp.array([6]), jnp.array([1])
    logits = []
    for rank in (4, 9):
        model = set_adapter(with_bank(base, AdapterBank(2, rank, ALL_TARGETS)), adapter, 1)
        logits.append(forward(model, tokens, counts, slots=slots))
        cleared = set_adapter(model, None, 1)
        np.testing.assert_array_equal(
            forward(cleared, tokens, counts, slots=slots), forward(base, tokens, counts)
        )
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def test_what_does_not_fit_is_refused(base: Model, banked: Model, random_adapter) -> None:
    adapter = random_adapter(base, 0)
    with pytest.raises(ValueError, match="no adapter bank"):
        set_adapter(base, adapter, 0)
    with pytest.raises(ValueError, match="rank 4 in a bank of rank 2"):
        set_adapter(with_bank(base, AdapterBank(1, 2, ALL_TARGETS)), adapter, 0)
    with pytest.raises(ValueError, match="'down_proj'.*has room for"):
        set_adapter(with_bank(base, AdapterBank(1, 4, ("q_proj",))), adapter, 0)
    with pytest.raises(ValueError, match="slot 3.*3 slots"):
        set_adapter(banked, adapter, 3)
    with pytest.raises(ValueError, match="Unknown targets.*'lm_head'"):
        init_adapter(base, jax.random.key(0), targets=("lm_head",))


def test_an_adapter_by_hand_is_checked_as_one_from_a_file(banked: Model, random_adapter) -> None:
    adapter = random_adapter(banked, 0)
    with pytest.raises(ValueError, match="rank must be 1 or more .* got 0"):
        Adapter(adapter.weights, 0, 1.0)
    with pytest.raises(ValueError, match="alpha finite, got 4, nan"):
        Adapter(adapter.weights, 4, float("nan"))
    with pytest.raises(ValueError, match="holds no weights"):
        slot_values(banked, Adapter({}, 4, 1.0))
    path, (a_kr, b_rn) = next(iter(adapter.weights.items()))
    for pair in ((a_kr[:, :3], b_rn), (a_kr, b_rn[:3]), (a_kr[1:], b_rn), (b_rn, a_kr)):
        wrong = Adapter({**adapter.weights, path: pair}, 4, 1.0)
        for put in (slot_values, lambda model, adapter: set_adapter(model, adapter, 1)):
            with pytest.raises(ValueError, match=f"{path}: A and B must be .* for rank 4, got"):
                put(banked, wrong)
    for broken in (float("nan"), float("inf")):
        wrong = Adapter({path: (a_kr, b_rn.at[0, 0].set(broken))}, 4, 1.0)
        with pytest.raises(ValueError, match=f"NaN or infinity in lora_b of {path}"):
            slot_values(banked, wrong)


def test_a_slot_written_in_place_is_the_slot_that_was_set(banked: Model, random_adapter) -> None:
    adapter = random_adapter(banked, 3)
    expected = jax.tree.leaves(set_adapter(banked, adapter, 2))
    leaves, where = jax.tree.leaves(banked), bank_positions(banked)
    written = write_slot([jnp.copy(leaves[i]) for i in where], slot_values(banked, adapter), 2)
    for i, stack in zip(where, written, strict=True):
        np.testing.assert_array_equal(stack, expected[i])
    cleared = write_slot(written, slot_values(banked, None), 2)
    assert all(not stack.any() for stack in cleared)
