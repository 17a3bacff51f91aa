"""What a pretrained encoder looks like in a folder, without anything pretrained in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] : . , 1 2 win money now spam list meeting at noon see you there".split()


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A folder with a tiny random BERT and its tokenizer, as a pretrained one would lie there."""
    place = tmp_path / "encoder"
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **size)).save_pretrained(place)
    vocabulary = place / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    BertTokenizer(str(vocabulary)).save_pretrained(place)
    return place
