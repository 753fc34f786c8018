"""Claims about token labels: shown as text, scored alike in every space, contexts the furthest rows."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch

from analyze.labels import Ends, TopContexts, Vocabulary, both_ends
from analyze.spaces import Space, choose_space, readout
from cache.weights import Head, Norm
from invented import TOKENS, D, Tokenizer, make_mlp


def test_tokens_are_shown_visibly_and_found_again():
    pieces = Vocabulary(Tokenizer(), len(TOKENS))
    assert pieces.shown[:6] == ["<s>", "·the", "·cat", "·sat", "ing", "⏎"]
    assert [pieces.find(text) for text in ("▁cat", "·cat", "cat", " cat", "\n")] == [2, 2, 2, 2, 5]
    assert pieces.join(np.array([1, 2, 4])) == " the cating"


def test_byte_level_tokens_are_shown_as_their_text():
    from tokenizers.pre_tokenizers import ByteLevel

    def stored(text: str) -> str:
        return "".join(part for part, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))

    texts = [" the", "é", "\n\n", "\tx", "日", "\x00", "\x7f", "\xad", "a b"]
    raw = [*map(stored, texts), "Ġcat", "Ã"]
    vocabulary = Vocabulary(SimpleNamespace(convert_ids_to_tokens=lambda ids: [raw[i] for i in ids]), len(raw))
    assert vocabulary.shown[:5] == ["·the", "é", "⏎⏎", "⇥x", "日"]
    assert vocabulary.shown[5:] == ["\\x00", "\\x7f", "\\xad", "a·b", "·cat", "\\xc3"]


def test_end_a_holds_the_larger_extreme():
    rows = torch.tensor([[1.0, 0], [-3, 0], [0, 1]])
    ends = both_ends(rows, torch.tensor([1.0, 0]), 2)
    assert ends == Ends(a=[(1, 3.0), (2, 0.0)], b=[(0, -1.0), (2, 0.0)], flip=True)


def test_top_contexts_do_not_depend_on_blocks():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, sequence = np.arange(60) + 100, np.arange(200) // 5
    whole, parts = (TopContexts(torch.eye(4, dtype=torch.float64), 3) for _ in range(2))
    whole.update(rows, x)
    for part in (slice(0, 1), slice(1, 35), slice(35, 60)):
        parts.update(rows[part], x[part])
    for k in range(4):
        assert whole.best(k, sequence) == parts.best(k, sequence)
        assert whole.best(k, sequence)[0] == (100 + int(x[:, k].abs().argmax()), float(x[x[:, k].abs().argmax(), k]))


def test_token_scores_do_not_depend_on_the_coordinates():
    norm = Norm("rms", 1e-5, torch.linspace(0.5, 2, D))
    embedding, read = torch.randn(5, D), torch.randn(D)
    plain, folded = Space(None, norm), Space(norm.gain.double(), norm)
    scores = plain.embed(embedding) @ read  # q.x, x the normed embedding
    torch.testing.assert_close(folded.embed(embedding) @ (norm.gain * read), scores)
    torch.testing.assert_close(plain.embed(embedding), torch.nn.functional.rms_norm(embedding, (D,), norm.gain, 0.0))
    layer = Norm("layer", 1e-5, norm.gain, torch.ones(D))
    expected = torch.nn.functional.layer_norm(embedding, (D,), layer.gain, layer.bias, 0.0)
    torch.testing.assert_close(Space(None, layer).embed(embedding), expected)
    assert choose_space(dataclasses.replace(make_mlp(), pre_norm=layer)).gain is None


def test_readout_is_the_change_of_logits_up_to_a_constant():
    head = Head(torch.zeros(7, D), torch.randn(7, D), Norm("layer", 0.0, torch.rand(D), torch.rand(D)))
    stream, write = torch.randn(2, D, dtype=torch.float64).unbind()
    step = 1e-6

    def logits(residual):
        centred = residual - residual.mean()
        return head.unembedding.double() @ (centred / stream.std(correction=0) * head.final_norm.gain)

    change = (logits(stream + step * write) - logits(stream)) / step * stream.std(correction=0)
    rows = readout(head, make_mlp()).double()
    torch.testing.assert_close(rows @ write, change - change.mean(), atol=1e-5, rtol=1e-5)
    assert readout(dataclasses.replace(head, unembedding=torch.randn(7, D + 1)), make_mlp()) is None
