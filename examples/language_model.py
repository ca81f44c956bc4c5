"""A small language model, trained twice: with torch.nn, then with the same modules swapped to seqkernels.

Both start from the same weights and see the same batches, so their losses must agree; the script prints
both, the speed of both, and some text that each has learned to write. The text to learn is the Python
language reference, which ships inside Python (pydoc_data.topics), or any file you name. Nothing is
downloaded.

    python examples/language_model.py                       # an LSTM
    python examples/language_model.py --cell all --steps 400
    python examples/language_model.py --text my_novel.txt
"""

import argparse
import copy
import re
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import seqkernels

MODULES = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
LEARNING_RATE = {"rnn": 0.1, "gru": 0.5, "lstm": 0.5}  # without gates, larger steps throw the model off
LARGEST_DIFFERENCE = 1e-3  # between the two losses at any step


class LanguageModel(nn.Module):
    """Word by word: look the word up, let the recurrent layers read it, guess the next one."""

    def __init__(self, cell: str, words: int, width: int, hidden: int, layers: int):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.recurrent = MODULES[cell](width, hidden, num_layers=layers)
        self.guess = nn.Linear(hidden, words)

    def forward(self, tokens, state=None):  # tokens [T, B]
        y, state = self.recurrent(self.embed(tokens), state)
        return self.guess(y), state


class Vocabulary:
    """The most frequent words, numbered; all others share number 0."""

    def __init__(self, text: str, size: int):
        pieces = self.split(text)
        self.words = ["?"] + [word for word, _ in Counter(pieces).most_common(size - 1)]
        self.number = {word: k for k, word in enumerate(self.words)}
        self.tokens = torch.tensor([self.number.get(piece, 0) for piece in pieces])

    @staticmethod
    def split(text: str) -> list[str]:
        return [
            match[0] for match in re.finditer(r"\w+|\s+|([^\w\s])\1*", text)
        ]  # words, gaps, signs like ***

    def join(self, tokens: list[int]) -> str:
        return "".join(self.words[token] for token in tokens)


def read_text(path: Path | None) -> str:
    if path:
        return path.read_text(encoding="utf-8", errors="replace")
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def batches(tokens: torch.Tensor, rows: int, length: int, steps: int):
    """Cut the text into `rows` long strands and walk along them: (input, target), each [length, rows]."""
    strand = len(tokens) // rows
    strands = tokens[: strand * rows].view(rows, strand).t()
    for step in range(steps):
        start = step * length % (strand - length)
        yield (
            strands[start : start + length].contiguous(),
            strands[start + 1 : start + 1 + length].contiguous(),
        )


class Trainer:
    """A model and its optimizer. Keeps the loss of every step and the time spent."""

    def __init__(self, model: LanguageModel, learning_rate: float):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
        self.losses, self.tokens, self.seconds = [], 0, 0.0

    def step(self, x: torch.Tensor, target: torch.Tensor) -> None:
        start = time.perf_counter()
        logits, _ = self.model(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.tokens += x.numel()
        self.seconds += time.perf_counter() - start


@torch.no_grad()
def write(model: LanguageModel, prompt: torch.Tensor, count: int) -> list[int]:
    """Let the model go on after the prompt, one token at a time; the state is all it remembers."""
    generator = torch.Generator().manual_seed(0)
    logits, state = model(prompt[:, None])
    tokens = []
    for _ in range(count):
        likely = torch.softmax(logits[-1, 0] / 0.7, dim=0)
        likely[0] = 0  # never write "?"
        tokens.append(torch.multinomial(likely, 1, generator=generator).item())
        logits, state = model(torch.tensor([[tokens[-1]]]), state)
    return tokens


def compare(cell: str, vocabulary: Vocabulary, args: argparse.Namespace) -> float:
    """Train both models step by step in turn. Returns the largest difference between their losses."""
    torch.manual_seed(args.seed)
    model = LanguageModel(cell, len(vocabulary.words), args.width, args.hidden, args.layers)
    swapped = copy.deepcopy(model)
    seqkernels.swap_(swapped)  # the only line that your own program needs

    rate = args.lr or LEARNING_RATE[cell]
    theirs, ours = Trainer(model, rate), Trainer(swapped, rate)
    print(f"\n{cell.upper()}, {args.layers} x {args.hidden} hidden units, {len(vocabulary.words)} words")
    print("  step    loss with torch.nn   with seqkernels")
    for step, (x, target) in enumerate(batches(vocabulary.tokens, args.batch, args.length, args.steps)):
        theirs.step(x, target)
        ours.step(x, target)
        if step % max(1, args.steps // 8) == 0 or step == args.steps - 1:
            print(f"{step:6} {theirs.losses[-1]:21.6f} {ours.losses[-1]:17.6f}", flush=True)

    difference = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
    speeds = [trainer.tokens / trainer.seconds for trainer in (theirs, ours)]
    print(f"largest difference in {args.steps} steps: {difference:.1e} (right: <= {LARGEST_DIFFERENCE:.0e})")
    print(f"tokens/s in training: torch.nn {speeds[0]:,.0f}, seqkernels {speeds[1]:,.0f}, ", end="")
    print(f"{speeds[1] / speeds[0]:.2f} times as fast, embedding and softmax included")
    prompt = vocabulary.tokens[:20]
    for name, trainer in (("torch.nn", theirs), ("seqkernels", ours)):
        print(f"--- written by {name}:\n{vocabulary.join(write(trainer.model, prompt, args.write)).strip()}")
    return difference


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", choices=[*MODULES, "all"], default="lstm")
    parser.add_argument("--text", type=Path, help="a text file to learn from")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens per row and step (T)")
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--write", type=int, default=120, help="tokens to generate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    for name in ("steps", "batch", "length", "width", "hidden", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.vocabulary < 2:
        parser.error(f"--vocabulary must be at least 2, got {args.vocabulary}")
    try:
        vocabulary = Vocabulary(read_text(args.text), args.vocabulary)
    except OSError as error:
        parser.error(f"--text {error}")
    if len(vocabulary.tokens) // args.batch <= args.length:
        parser.error("the text is too short for so many tokens a batch (--batch) and step (--length)")
    known = (vocabulary.tokens != 0).float().mean()
    print(f"{len(vocabulary.tokens):,} tokens, {known:.0%} of them known words")
    cells = list(MODULES) if args.cell == "all" else [args.cell]
    differences = [compare(cell, vocabulary, args) for cell in cells]
    return 0 if max(differences) <= LARGEST_DIFFERENCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
