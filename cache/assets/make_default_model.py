"""Make the model and the text that `cli cache` uses when it is given none: a small Llama that models English.

    bible -f "gen1:1-rev22:21" > kjv.txt        # Debian packages bible-kjv and bible-kjv-text
    python cache/assets/make_default_model.py kjv.txt

One seed, one fixed schedule, no choice made by looking at the held-out books. About 13 minutes on two CPU cores.
Prints the mean next-token loss on the held-out books of a unigram model, of an interpolated bigram model and of
the trained model as shipped (rounded to float16): the three figures in the README.
"""

import argparse
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
# Whole books with no close parallel among the others (Mark repeats Matthew, Chronicles repeats Kings: not these).
HELD_OUT = {"Ruth", "Est", "Job", "Eccl", "SSol", "Dan", "Jonah", "John", "Heb", "Jas", "Jude"}
SEED, VOCABULARY, CONTEXT, BATCH, STEPS, PEAK_LR = 0, 1024, 256, 32, 1800, 4e-3
CONFIG = dict(
    hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=VOCABULARY, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=0, eos_token_id=0, pad_token_id=None,
)  # fmt: skip


def chapters(dump: str) -> list[tuple[str, str]]:
    """(book, text) of every chapter, verse labels removed, verses joined by spaces."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in dump.splitlines():
        book, chapter, verse = re.match(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)", line).groups()
        found.setdefault((book, chapter), []).append(verse.strip())
    return [(book, " ".join(verses)) for (book, _), verses in found.items()]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, no unknown token is needed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tensor]:
    bos = tokenizer.bos_token_id
    return [torch.tensor([bos, *tokenizer.encode(text, add_special_tokens=False)]) for text in texts]


def ngram_losses(train: Tensor, held: Tensor, v: int = VOCABULARY) -> tuple[float, float]:
    """Mean next-token loss (nats) of a unigram and of a bigram interpolated with unigram and uniform.

    The three weights are fitted by expectation maximisation on the last tenth of the training tokens.
    """
    split = len(train) * 9 // 10

    def models_of(tokens: Tensor) -> tuple[Tensor, Tensor]:
        uni = (torch.bincount(tokens, minlength=v).double() + 1) / (len(tokens) + v)
        pairs = torch.bincount(tokens[:-1] * v + tokens[1:], minlength=v * v).double().view(v, v)
        return uni, pairs / pairs.sum(1, keepdim=True).clamp_min(1)

    def parts(tokens: Tensor, uni: Tensor, bi: Tensor) -> Tensor:
        first, second = tokens[:-1], tokens[1:]
        return torch.stack([bi[first, second], uni[second], torch.full((len(second),), 1 / v).double()])

    weights, fit = torch.full((3,), 1 / 3).double(), parts(train[split:], *models_of(train[:split]))
    for _ in range(50):
        share = weights[:, None] * fit
        weights = (share / share.sum(0)).mean(1)
    uni, bi = models_of(train)
    text = held[1:] != 0  # BOS is not text: it is never a target
    bigram = (weights[:, None] * parts(held, uni, bi)).sum(0)
    return -uni[held[1:]][text].log().mean().item(), -bigram[text].log().mean().item()


@torch.no_grad()
def model_loss(model: LlamaForCausalLM, documents: list[Tensor]) -> float:
    """Mean next-token loss (nats), each chapter read in windows of the training context that overlap by half."""
    total, count = 0.0, 0
    for ids in documents:
        for start in range(0, max(len(ids) - 1, 1), CONTEXT // 2):
            window = ids[start : start + CONTEXT + 1]
            new = 0 if start == 0 else CONTEXT // 2  # targets up to here were scored by the window before
            if len(window) - 1 <= new:
                continue
            logits = model(window[None, :-1]).logits[0].double()
            losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")[new:]
            total, count = total + losses.sum().item(), count + len(losses)
    return total / count


def train(documents: list[Tensor]) -> LlamaForCausalLM:
    """AdamW, warm-up then cosine to 2 %; each step reads random windows of the chapters in a fresh random order."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 100, PEAK_LR / 50)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [100])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(map(len, documents)):,} tokens", flush=True)
    started, windows = time.time(), iter(())
    for step in range(STEPS):
        batch = []
        while len(batch) < BATCH:
            window = next(windows, None)
            if window is None:
                stream = torch.cat([documents[i] for i in torch.randperm(len(documents))])
                stream = stream[torch.randint(CONTEXT, ()) :]
                windows = iter(stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT))
                continue
            batch.append(window)
        ids = torch.stack(batch)
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step} loss {loss.item():.3f} seconds {time.time() - started:.0f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="the text as the program `bible` prints it")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for model/ and text.txt")
    arguments = parser.parse_args()

    found = chapters(arguments.dump.read_text())
    kept = [text for book, text in found if book not in HELD_OUT]
    held = [text for book, text in found if book in HELD_OUT]
    tokenizer = train_tokenizer(kept)
    train_ids, held_ids = encode(tokenizer, kept), encode(tokenizer, held)
    (arguments.out / "text.txt").write_text("\n\n".join(held) + "\n")
    unigram, bigram = ngram_losses(torch.cat(train_ids), torch.cat(held_ids))
    print(f"held out {sum(map(len, held_ids)):,} tokens: unigram {unigram:.3f}, bigram {bigram:.3f}", flush=True)

    model = train(train_ids)
    model.half().save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")
    loss = model_loss(model.float(), held_ids)
    print(f"held out: unigram {unigram:.3f}, bigram {bigram:.3f}, model {loss:.3f} nats per token")


if __name__ == "__main__":
    main()
