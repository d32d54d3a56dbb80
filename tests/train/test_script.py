"""Training needs no command line: a script of ten lines does it."""

import jax

from jaxcodec.models.load import load_model
from jaxcodec.models.lora import init_adapter
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.train.data import read_examples
from jaxcodec.train.evaluate import mean_loss
from jaxcodec.train.loop import TrainOptions, train
from jaxcodec.train.step import adapter_training


def test_a_ten_line_script_trains(base, pairs_file, tmp_path):
    model, tokenizer = load_model(base), PretrainedTokenizer(base)
    examples = read_examples(pairs_file, tokenizer, max_length=16)
    adapter = init_adapter(model, jax.random.key(0), rank=4, alpha=8.0)
    objective = adapter_training(model, adapter)
    options = TrainOptions(steps=40, batch_size=16, learning_rate=1e-2, warmup_steps=4)
    adapter = train(objective, examples, options, tmp_path / "run")
    trained, _ = objective.models(adapter, objective.frozen)
    after = mean_loss(trained, examples, objective.scheme)
    assert after.mean < mean_loss(model, examples).mean
