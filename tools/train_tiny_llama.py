"""Train the embedded model "tiny": a LLaMA of 0.77 million weights that adds, reverses, sorts and looks things up.

    python -m tools.train_tiny_llama --minutes 22 --threads 1

needs only `torch` (CPU), `transformers` and `tokenizers`. It makes the tokenizer and the training data itself (see
assets/tasks.py), and writes a Hugging Face model folder: config.json, generation_config.json, model.safetensors
(float32), tokenizer.json, tokenizer_config.json and chat_template.jinja.

The committed weights are from that command with seed 0: 1,002 steps in 22 minutes on one CPU core shared with other
work; a quieter core does more steps in the time. Right answers of greedy decoding on held-out problems, to the last
token and with the end token:

    addition 1000/1000   reverse 500/500   sort 475/500   lookup 500/500 (304-496 tokens)   chat 487/500

Left to itself, a model this small is slow to learn to match a two-letter key in a list. Two things bring that about in
some hundred steps: heads of the first layer start as previous-token heads (attend_to_the_previous), and the attention
of the second layer is taught where the answer stands (attention_loss). The exported model is a plain LLaMA.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nanoflow_jax.assets.tasks import TASKS
from tools.tiny_llama_data import (
    BOS,
    CHAT_TEMPLATE,
    END_OF_TURN,
    EOS,
    NO_TARGET,
    SPECIAL_TOKENS,
    Row,
    TrainingData,
    held_out,
)

ASSETS = Path(__file__).parents[1] / "nanoflow_jax" / "assets"
VOCAB_SIZE = 262  # on purpose not divisible by 8: a sharded embedding has to handle an uneven vocabulary


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the lossless byte tokenizer: token id = byte value, then the special tokens. It adds begin-of-text."""
    alphabet = _byte_to_symbol()
    backend = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", BOS)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != VOCAB_SIZE or tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) != [*range(256, 262)]:
        raise RuntimeError("the tokenizer's ids are not the ones that this script uses")
    return tokenizer


def _byte_to_symbol() -> list[str]:
    """Return the printable character that ByteLevel writes for each byte [256] (the table of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (chr(code) for code in range(256, 512))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def build_model() -> LlamaForCausalLM:
    """Build the untrained model. 16 query and 8 key-value heads: it shards one, two, four or eight ways."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=16,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=BOS,
        eos_token_id=[EOS, END_OF_TURN],
        dtype="float32",
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    attend_to_the_like(model)
    attend_to_the_previous(model)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=[EOS, END_OF_TURN], pad_token_id=EOS)
    return model


@torch.no_grad()
def attend_to_the_like(model: LlamaForCausalLM) -> None:
    """Start half of the query heads with the projection of their keys, and their output with that of their values.

    Such a head attends to positions like its own and passes on what it finds, which is close to what look-up needs.
    """
    head_dim, groups = model.config.head_dim, model.config.num_key_value_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        queries = attention.q_proj.weight.view(groups, -1, head_dim, model.config.hidden_size)
        outputs = attention.o_proj.weight.view(model.config.hidden_size, groups, -1, head_dim)
        queries[:, 0] = attention.k_proj.weight.view(groups, head_dim, -1)
        outputs[:, :, 0] = attention.v_proj.weight.view(groups, head_dim, -1).permute(2, 0, 1)


@torch.no_grad()
def attend_to_the_previous(model: LlamaForCausalLM) -> None:
    """Start twelve heads of the first layer as heads that look one to four tokens back.

    All embeddings get a common component. A key projects it to a fixed vector, and a query to the same vector turned
    back by the rotary angle of the distance, so that their product is largest at that distance. The two heads of a
    group write to the same place, one distance apart: the letters of "kx" look alike from the 4 of "kx=48" and from
    the "?" of "kx?", and again from the 8 and from the position after "kx?4".
    """
    config, frequencies = model.config, 3  # the fastest rotations tell distances apart
    half = config.head_dim // 2
    common = torch.randn(config.hidden_size)
    common /= common.norm()
    embedding = model.model.embed_tokens.weight
    embedding += common * embedding.norm(dim=1).mean()
    attention = model.model.layers[0].self_attn
    queries = attention.q_proj.weight.view(config.num_key_value_heads, 2, config.head_dim, config.hidden_size)
    keys = attention.k_proj.weight.view(config.num_key_value_heads, config.head_dim, config.hidden_size)
    outputs = attention.o_proj.weight.view(config.hidden_size, config.num_key_value_heads, 2, config.head_dim)
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(frequencies) / half)  # radians per token
    fixed = 0.625 * common
    for group in range(6):
        outputs[:, group, 1] = outputs[:, group, 0]
        keys[group] *= 0.3
        keys[group, :frequencies] += fixed
        for head, distance in enumerate(((1, 2), (2, 3), (3, 4))[group % 3]):
            queries[group, head] *= 0.3
            queries[group, head, :frequencies] += torch.cos(distance * angles)[:, None] * fixed
            queries[group, head, half : half + frequencies] -= torch.sin(distance * angles)[:, None] * fixed


def pad(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and targets [rows, longest]. Padding is on the right, where causal attention cannot see it."""
    tokens = pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True, padding_value=EOS)
    targets = pad_sequence([torch.tensor(row.targets) for row in rows], batch_first=True, padding_value=NO_TARGET)
    return tokens, targets


@dataclass(frozen=True)
class Answers:
    """What the model says at the answer positions of a batch, and what attention_loss needs besides."""

    logits: torch.Tensor  # [answers, vocab]
    targets: torch.Tensor  # [answers], the right tokens
    row_numbers: torch.Tensor  # [answers]
    between: torch.Tensor  # hidden states [rows, longest, hidden] that go into the second layer
    rotation: tuple[torch.Tensor, torch.Tensor]  # cosines and sines [1, longest, head_dim] of the positions


def answer(model: LlamaForCausalLM, rows: list[Row]) -> Answers:
    tokens, targets = pad(rows)
    inner = model.model
    hidden = inner.embed_tokens(tokens)
    rotation = inner.rotary_emb(hidden, torch.arange(tokens.shape[1])[None])
    between = hidden
    for index, layer in enumerate(inner.layers):
        between = hidden if index == 1 else between
        hidden = layer(hidden, position_embeddings=rotation)  # without a mask, attention is causal
    is_answer = targets != NO_TARGET
    logits = model.lm_head(inner.norm(hidden[is_answer]))
    return Answers(logits, targets[is_answer], is_answer.nonzero()[:, 0], between, rotation)


def attention_loss(model: LlamaForCausalLM, rows: list[Row], answers: Answers) -> torch.Tensor:
    """Return the cross-entropy of the second layer's attention from each query to the linked digit in the list.

    The first head of every group is taught so. All rows have the same length and number of links.
    """
    config, layer = model.config, model.model.layers[1]
    normed = layer.input_layernorm(answers.between)
    shape = (*normed.shape[:2], config.num_key_value_heads, -1, config.head_dim)
    queries = layer.self_attn.q_proj(normed).view(shape)[:, :, :, 0].transpose(1, 2)  # [rows, groups, length, head_dim]
    keys = layer.self_attn.k_proj(normed).view(shape)[:, :, :, 0].transpose(1, 2)
    queries, keys = apply_rotary_pos_emb(queries, keys, *answers.rotation)
    links = torch.tensor([row.links for row in rows])  # [rows, links, 2]
    asking, value = links[:, None, :, 0], links[:, None, :, 1]
    asking_queries = queries.take_along_dim(asking[..., None], dim=2)  # [rows, groups, links, head_dim]
    scores = asking_queries @ keys.transpose(2, 3) / math.sqrt(config.head_dim)
    later = torch.arange(scores.shape[-1]) > asking[..., None]
    log_attention = scores.masked_fill(later, -torch.inf).log_softmax(-1)
    groups = config.num_key_value_heads
    return -log_attention.take_along_dim(value[..., None].expand(-1, groups, -1, -1), dim=3).mean()


# Evaluation


@torch.no_grad()
def count_right(model: LlamaForCausalLM, rows: list[Row]) -> int:
    """Count the rows that greedy decoding answers rightly to the last token, its end token included.

    Greedy decoding gives the right answer exactly when every token of that answer has the largest logit after the right
    tokens before it, so one forward pass over the whole row decides.
    """
    right = 0
    rows = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(rows), 50):
        batch = rows[start : start + 50]
        answers = answer(model, batch)
        wrong = answers.row_numbers[answers.logits.argmax(-1) != answers.targets]
        right += len(batch) - len(wrong.unique())
    return right


def evaluate(model: LlamaForCausalLM, counts: dict[str, int]) -> dict[str, str]:
    """Return for each task "right/count" on held-out problems."""
    return {task: f"{count_right(model, held_out(task, count))}/{count}" for task, count in counts.items()}


# Training


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is made orthogonal, in float32.

    The update is scaled to the size of an AdamW update, so that one learning rate serves both.
    """

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": 0.95, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"]
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(momentum, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(weight.shape)))


def orthogonalize(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Return roughly the nearest matrix with equal singular values, by a quintic Newton-Schulz iteration."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x if wide else x.T


def learning_rate(peak: float, done: float, step: int, warmup_steps: int = 30) -> float:
    """Return the rate after the fraction `done` of the run: linear warm-up, then a cosine down to 1 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak * min(1.0, (step + 1) / warmup_steps) * (0.01 + 0.99 * cosine)


def train(args: argparse.Namespace) -> LlamaForCausalLM:
    """Train until --steps or --minutes is reached and return the averaged model."""
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model, averaged = build_model(), build_model()
    averaged.load_state_dict(model.state_dict())
    averaged.requires_grad_(False)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    optimizers = [Muon(hidden), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)]
    resumed = {"model": model, "averaged": averaged, "muon": optimizers[0], "adamw": optimizers[1]}
    step, seconds = 0, 0.0  # spent in training, over all resumed runs
    if args.resume:
        state = torch.load(args.checkpoint, weights_only=True)
        step, seconds = state["step"], state["seconds"]
        for name, part in resumed.items():
            part.load_state_dict(state[name])
    data = TrainingData(seed=args.seed + step)  # a resumed run does not see the same problems again
    if args.resume:
        data.max_pairs, data.losses = state["max_pairs"], state["losses"]
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights", flush=True)

    def keep() -> None:
        """The model folder, and what --resume needs in one replacement: an interrupted save leaves the previous."""
        save(averaged, tokenizer, args.output)
        state = {name: part.state_dict() for name, part in resumed.items()}
        state |= {"step": step, "seconds": seconds, "max_pairs": data.max_pairs, "losses": data.losses}
        partial = args.checkpoint.with_name(args.checkpoint.name + ".partial")
        torch.save(state, partial)
        partial.replace(args.checkpoint)

    losses: dict[str, float] = {}
    tokens_since_log, logged, saved = 0, time.monotonic(), time.monotonic()
    while True:
        started = time.monotonic()
        done = max(step / args.steps if args.steps else 0.0, seconds / (60 * args.minutes) if args.minutes else 0.0)
        if done >= 1:
            break
        rate = learning_rate(args.learning_rate, done, step)
        for name, rows in data.batches().items():
            answers = answer(model, rows)
            loss = functional.cross_entropy(answers.logits, answers.targets)
            losses[name] = loss.item()
            if name == "lookup":
                guidance = attention_loss(model, rows, answers)
                losses["attention"] = guidance.item()
                loss = loss + guidance
            loss.backward()
            tokens_since_log += sum(len(row.tokens) for row in rows)
        data.observe(losses)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        decay = min(0.995, (1 + step) / (10 + step))
        for average, current in zip(averaged.parameters(), model.parameters(), strict=True):
            average.lerp_(current.detach(), 1 - decay)
        seconds += time.monotonic() - started

        now = time.monotonic()
        if step % 20 == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            speed = tokens_since_log / (now - logged)
            where = f"step {step} {seconds:.0f} s"
            print(f"{where}: {shown} pairs {data.max_pairs} {speed:.0f} tokens/s", flush=True)
            tokens_since_log, logged = 0, now
        if now - saved > 60 * args.save_minutes:
            keep()
            print("held out:", evaluate(averaged, dict.fromkeys(TASKS, 200)), flush=True)
            saved = logged = time.monotonic()
    keep()
    print(f"trained {step} steps in {seconds / 60:.1f} minutes", flush=True)
    return averaged


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    config.write_text(json.dumps(fields, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model 'tiny'.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=ASSETS / "tiny_llama", help="model folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps")
    parser.add_argument(
        "--minutes", type=float, default=None, help="stop after so many minutes of training (22 if neither is given)"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the peak of the schedule")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="save, and evaluate briefly, this often")
    parser.add_argument("--checkpoint", type=Path, default=Path("tiny_llama.train.pt"), help="file for --resume")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    args = parser.parse_args()
    if args.steps is None and args.minutes is None:
        args.minutes = 22.0
    torch.set_num_threads(args.threads)
    model = train(args)
    counts = {"addition": 1000, "reverse": 500, "sort": 500, "lookup": 500, "chat": 500}
    print("held out:", evaluate(model, counts), flush=True)


if __name__ == "__main__":
    main()
