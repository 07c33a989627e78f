"""The recipe of the demo pair: trains both models from nothing, in minutes, on two processor cores.

    python -m lda_service.pairs.demo.recipe --output DIR

This module knows the architecture, the two training stages and the layout of the folders. What the text says is
``language``'s business, and how it is cut into tokens ``tokenizer``'s. Seeds are fixed: the same versions of torch
and transformers with the same number of threads give the same weights.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil, cos, pi
from pathlib import Path
from random import Random
from typing import Final

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from lda_service.pairs.demo.language import PHRASES, Conversation, conversation_after, document_before
from lda_service.pairs.demo.tokenizer import (
    ASSISTANT_ID,
    CONTEXT_LENGTH,
    END,
    END_ID,
    PAD_ID,
    VOCAB_SIZE,
    train_tokenizer,
)

Document = Conversation | str
Example = tuple[Tensor, Tensor]
"""Token ids and labels, of the same length."""

BATCH_SIZE: Final = 64
BATCHES_PER_POOL: Final = 16
WARMUP_STEPS: Final = 40
IGNORED: Final = -100
"""The label of a token that is not learnt."""

THREADS: Final = 2
TOKENIZER_DOCUMENTS: Final = 4000
PHRASE_REPEATS: Final = 100


@dataclass(frozen=True)
class Stage:
    """One training run: what to read, how long, how fast, and whether only the answers are learnt."""

    name: str
    draw: Callable[[Random], Document]
    steps: int
    learning_rate: float
    answers_only: bool
    seed: int


PRE_TRAINING: Final = Stage("before", document_before, 1000, 3e-3, answers_only=False, seed=1)
POST_TRAINING: Final = Stage("after", conversation_after, 600, 1.5e-3, answers_only=True, seed=2)


# ------------------------------------------------------------------------------------------------------ the data


def written(document: Document, tokenizer: PreTrainedTokenizerFast) -> str:
    """The document as the model sees it: prose up to its end token, a conversation by the chat template."""
    if isinstance(document, str):
        return document + END
    return str(tokenizer.apply_chat_template(document, tokenize=False))


def contents(document: Document) -> list[str]:
    """The document's text, turn by turn."""
    return [document] if isinstance(document, str) else [turn["content"] for turn in document]


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, its merges learnt from both models' texts in equal parts, and from every phrase.

    The phrases make sure that a rare one begins with a token of its own: spelled out in letters it would begin like
    many others, and the before model would not find it surprising.
    """
    rng = Random(0)
    documents = [draw(rng) for _ in range(TOKENIZER_DOCUMENTS) for draw in (document_before, conversation_after)]
    texts = [text for document in documents for text in contents(document)]
    return train_tokenizer(texts + [f" {phrase}" for phrase in PHRASES] * PHRASE_REPEATS)


def answer_labels(ids: list[int]) -> list[int]:
    """The ids with everything ignored but the assistant's words and the end token after them."""
    labels, answering = [], False
    for token in ids:
        labels.append(token if answering else IGNORED)
        answering = token == ASSISTANT_ID or (answering and token != END_ID)
    return labels


def examples(stage: Stage, tokenizer: PreTrainedTokenizerFast, number: int, rng: Random) -> list[Example]:
    """Freshly drawn documents as token ids and labels."""
    texts = [written(stage.draw(rng), tokenizer) for _ in range(number)]
    rows: list[list[int]] = [tokenizer.encode(text) for text in texts]
    return [(torch.tensor(ids), torch.tensor(answer_labels(ids) if stage.answers_only else ids)) for ids in rows]


def batches(stage: Stage, tokenizer: PreTrainedTokenizerFast) -> Iterator[Example]:
    """Padded batches without end, each of documents of similar length to waste little padding."""
    rng = Random(stage.seed)
    while True:
        pool = examples(stage, tokenizer, BATCH_SIZE * BATCHES_PER_POOL, rng)
        pool.sort(key=lambda example: len(example[0]))
        starts = list(range(0, len(pool), BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            ids, labels = zip(*pool[start : start + BATCH_SIZE], strict=True)
            yield (
                pad_sequence(list(ids), batch_first=True, padding_value=PAD_ID),
                pad_sequence(list(labels), batch_first=True, padding_value=IGNORED),
            )


# -------------------------------------------------------------------------------------------------- the training


def new_model() -> Olmo2ForCausalLM:
    """An untrained model of 0.9 million parameters."""
    config = Olmo2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    model = Olmo2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID)  # type: ignore[no-untyped-call]
    return model


def pace(step: int, steps: int) -> float:
    """The share of the learning rate to use at a step: a short warm-up, then half a cosine down to zero."""
    return min((step + 1) / WARMUP_STEPS, 0.5 * (1 + cos(pi * step / steps)))


def learn(model: Olmo2ForCausalLM, optimizer: torch.optim.Optimizer, batch: Example) -> float:
    """Take one optimizer step and return the loss before it."""
    ids, labels = batch
    loss: Tensor = model(input_ids=ids, labels=labels).loss
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(model: Olmo2ForCausalLM, stage: Stage, tokenizer: PreTrainedTokenizerFast, progress: Progress) -> None:
    """Run one stage on the model, in place."""
    task = progress.add_task(stage.name, total=stage.steps, rate="", loss="")
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, stage.steps))
    model.train()
    for step, batch in zip(range(1, stage.steps + 1), batches(stage, tokenizer), strict=False):
        loss = learn(model, optimizer, batch)
        schedule.step()
        show(progress, task, stage, step, loss)


def show(progress: Progress, task: TaskID, stage: Stage, step: int, loss: float) -> None:
    """Advance the bar, and leave a line at every tenth of the way for those who see no bar."""
    speed = progress.tasks[task].speed or 0.0
    rate = f"{speed:.1f} steps/s"
    progress.update(task, advance=1, rate=rate, loss=f"loss {loss:.3f}")
    if step % ceil(stage.steps / 10) == 0 or step == stage.steps:
        left = f"{(stage.steps - step) / speed:.0f} s left" if speed else ""
        progress.console.print(f"{stage.name}: step {step}/{stage.steps}, loss {loss:.3f}, {rate}, {left}")


# --------------------------------------------------------------------------------------------------- the folders


def save(model: Olmo2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model and its tokenizer as an ordinary Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    name_tokenizer_class(folder / "tokenizer_config.json")


def name_tokenizer_class(config_file: Path) -> None:
    """Call the tokenizer's class by the name that older versions of transformers know as well."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def scaled(stage: Stage, scale: float) -> Stage:
    """The stage made longer or shorter."""
    return replace(stage, steps=max(1, round(stage.steps * scale)))


def make_pair(output: Path, steps_scale: float = 1.0) -> None:
    """Train the before model, post-train it into the after model, and write both folders."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    tokenizer = demo_tokenizer()
    model = new_model()
    columns = (TextColumn("{task.description:7}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, *times) as progress:
        for stage in (PRE_TRAINING, POST_TRAINING):
            train(model, scaled(stage, steps_scale), tokenizer, progress)
            save(model, tokenizer, output / stage.name)


def main() -> None:
    """Read the command line and make the pair."""
    parser = argparse.ArgumentParser(description="Train the bundled demo pair from nothing.")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives before/ and after/")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the steps, e.g. 0.02")
    arguments = parser.parse_args()
    make_pair(arguments.output, arguments.steps_scale)


if __name__ == "__main__":
    main()
