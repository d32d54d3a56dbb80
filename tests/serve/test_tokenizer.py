"""A tokenizer is read whole, or refused with a reason."""

import json
import shutil
from pathlib import Path

import pytest

from jaxcodec.serve.detokenizer import TextStream
from jaxcodec.serve.tokenizer import HFTokenizer

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "tokenizer"
TEXT = "Grüße, 世界! The end."


def test_text_survives_the_tokens() -> None:
    tokenizer = HFTokenizer(TOKENIZER)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eos_ids == (2,)


def test_streamed_pieces_are_the_text() -> None:
    tokenizer = HFTokenizer(TOKENIZER)
    prompt, *_ = tokenizer.encode("")
    stream = TextStream(tokenizer, [prompt])
    streamed = "".join(stream.push(token) for token in tokenizer.encode(TEXT)[1:])
    assert streamed + stream.finish() == TEXT


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
        HFTokenizer(tmp_path)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TOKENIZER, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no end-of-text token.*set eos_token"):
        HFTokenizer(tmp_path)
