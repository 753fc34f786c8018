"""Claims about documents, their order, their first token and the held-out border."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from cache.run import ASSETS
from cache.store import BOS, HELD_OUT
from cache.text import pack, read_documents

TEXT = ["In the beginning was the Word. " * (5 + i) for i in range(150)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "model")


def packed(tokenizer, documents=TEXT, **changes):
    options = dict(merge=False, context=32, batch=4, row_bytes=64, n_tokens=None, seed=0)
    return pack(documents, tokenizer, **(options | changes))


def test_exactly_one_bos_per_document(tokenizer):
    tokens = packed(tokenizer)
    ids, documents = tokens.ids.ravel(), tokens.documents.ravel()
    starts = np.flatnonzero(np.r_[True, documents[1:] != documents[:-1]])
    assert tokens.starter == "bos"
    assert set(np.flatnonzero(ids == tokenizer.bos_token_id)) == set(starts)


def test_a_tokenizer_that_adds_its_own_bos_still_gives_one(tokenizer, model_folder):
    from tokenizers.processors import TemplateProcessing

    adding = AutoTokenizer.from_pretrained(model_folder)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert adding("a")["input_ids"][0] == 0
    assert (packed(adding).ids == packed(tokenizer).ids).all()


def test_no_document_is_on_both_sides(tokenizer):
    tokens = packed(tokenizer)
    train, held = np.split(tokens.documents, [tokens.layout.train_sequences])
    assert len(held) >= 0.05 * len(tokens.documents)
    assert not set(train.ravel()) & set(held.ravel())


def test_tokens_are_the_documents_own(tokenizer):
    tokens = packed(tokenizer)
    ids, documents = tokens.ids.ravel(), tokens.documents.ravel()
    document = int(documents[0])
    got = tokenizer.decode(ids[documents == document], skip_special_tokens=True)
    assert got == TEXT[document]


def test_order_depends_on_the_seed_alone(tokenizer):
    assert (packed(tokenizer).ids == packed(tokenizer).ids).all()
    assert (packed(tokenizer).documents[0] != packed(tokenizer, seed=1).documents[0]).any()


def test_short_blocks_are_merged(tokenizer):
    tokens = packed(tokenizer, [block for block in TEXT for _ in range(2)], merge=True)
    lengths = np.bincount(tokens.documents.ravel().astype(int))
    assert np.median(lengths[lengths > 0]) > 200


def test_a_token_limit_holds(tokenizer):
    assert packed(tokenizer, n_tokens=2048).ids.size <= 2048


def test_empty_and_single_document_texts_are_refused(tokenizer):
    with pytest.raises(ValueError, match="the text is empty"):
        packed(tokenizer, [])
    with pytest.raises(ValueError, match="one long document: held-out rows need documents of their own"):
        packed(tokenizer, [" ".join(TEXT)])


def test_jsonl_faults_are_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2 of .*a.jsonl is not JSON"):
        list(read_documents(str(file), "text", "train")[0])
    file.write_text(json.dumps({"story": "a"}))
    with pytest.raises(ValueError, match=r"has no field 'text'; it has \['story'\]: choose one with --text-field"):
        list(read_documents(str(file), "text", "train")[0])


@pytest.mark.parametrize(
    "line, sentence", [('"text"', "where an object with a field"), ('{"text": 5}', "which is no text")]
)
def test_records_that_hold_no_text_are_named(tmp_path, line, sentence):
    file = tmp_path / "a.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=sentence):
        list(read_documents(str(file), "text", "train")[0])


def test_a_data_set_folder_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"story": TEXT[:3]}).save_to_disk(str(tmp_path / "set"))
    assert list(read_documents(str(tmp_path / "set"), "story", "train")[0]) == TEXT[:3]
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": TEXT[:2]})}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(ValueError, match=r"has no split 'train'; it has \['test'\]: choose one with --text-split"):
        read_documents(str(tmp_path / "dict"), "text", "train")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="is not a data set saved by"):
        read_documents(str(tmp_path / "other"), "text", "train")


def test_flags_of_a_store_say_what_the_tokens_are(store):
    ids = store.token_ids[store.sequence, store.position]
    assert ((store.flags & BOS > 0) == (ids == 0)).all()
    assert ((store.flags & HELD_OUT > 0) == (store.sequence >= store.layout.train_sequences)).all()
