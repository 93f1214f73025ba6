"""What a bare loop reaches on the same work: no toolkit, no checks, no logs. A measure of how much is left to gain.

    python benchmarks/floor.py sft --rows 128 --batch-size 16 [--model bigvocab]
    python benchmarks/floor.py grpo --steps 3

SFT: documents end to end, attention one document at a time, head at label positions with the gradient made in the forward.
GRPO: each prompt prefilled once, its cache repeated for the group; then one packed update on the completions.
"""

from __future__ import annotations

import argparse
import itertools

import measure  # first: fixes the threads
import tasks
import torch
import torch.nn.functional as F
from assets import END, build, rows, sft_rows
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

BOUNDS: list[int] = []  # where documents end in the packed row that is being computed
MASK: list[torch.Tensor] = []  # while sampling: which cache slots each query sees


def by_document(module, query, key, value, mask, scaling=None, **_):
    if MASK:
        seen = MASK[0][..., : key.shape[2]]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, s:e], key[:, :, s:e], value[:, :, s:e], is_causal=True, scale=scaling, enable_gqa=True
        )
        for s, e in itertools.pairwise(BOUNDS)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register("bench_floor", by_document)
AttentionMaskInterface.register("bench_floor", lambda *_, **__: None)


class WeightedNLL(torch.autograd.Function):
    """sum_k w_k * -log softmax(h_k W)[t_k], with both gradients made while a chunk's logits are there. h [K, D], W [V, D]."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, chunk):
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = 0.0
        for part in torch.arange(len(hidden)).split(chunk):
            logits = hidden[part] @ weight.T
            picked = logits.gather(1, targets[part, None])
            norm = logits.logsumexp(1, keepdim=True)
            total += float(((norm - picked)[:, 0] * weights[part]).sum())
            logits.sub_(norm).exp_().mul_(weights[part, None])
            logits.scatter_add_(1, targets[part, None], -weights[part, None])
            grad_hidden[part] = logits @ weight
            grad_weight.addmm_(logits.T, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return hidden.new_tensor(total)

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None


def update(model, optimizer, documents: list[tuple[list[int], int, float]], scale: float) -> float:
    """One optimizer step on (ids, prompt length, weight of its completion tokens) triples, 2048 tokens a microbatch."""
    documents = sorted(documents, key=lambda d: len(d[0]))
    loss = 0.0
    while documents:
        batch, size = [documents.pop()], 0
        size = len(batch[0][0])
        while documents and size + len(documents[-1][0]) <= 2048:
            batch.append(documents.pop())
            size += len(batch[-1][0])
        BOUNDS[:] = [0]
        for ids, _, _ in batch:
            BOUNDS.append(BOUNDS[-1] + len(ids))
        flat = torch.tensor([i for ids, _, _ in batch for i in ids])
        positions = torch.cat([torch.arange(len(ids)) for ids, _, _ in batch])
        picked = torch.cat([torch.arange(s + n, e) for (_, n, _), s, e in zip(batch, BOUNDS, BOUNDS[1:])])
        weights = torch.cat([torch.full((len(ids) - n,), w * scale) for ids, n, w in batch])
        hidden = model.model(input_ids=flat[None], position_ids=positions[None], use_cache=False).last_hidden_state[0]
        part = WeightedNLL.apply(
            hidden[picked - 1], model.lm_head.weight, flat[picked], weights, max(16, 2**22 // model.config.vocab_size)
        )
        part.backward()
        loss += float(part)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


class Slots:
    """A key-value cache that is allocated once and written in place, with the methods that transformers asks of one."""

    is_compileable = False

    def __init__(self, config, rows: int, length: int) -> None:
        shape = (rows, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        self.layers = [(torch.empty(shape), torch.empty(shape)) for _ in range(config.num_hidden_layers)]
        self.used = 0

    def update(self, key, value, layer, *_, **__):
        end = self.used + key.shape[2]
        for slots, new in zip(self.layers[layer], (key, value)):
            slots[:, :, self.used : end] = new
        return tuple(slots[:, :, :end] for slots in self.layers[layer])

    def get_seq_length(self, *_):
        return self.used

    get_query_offset = get_seq_length

    def get_mask_sizes(self, length, *_):
        return self.used + length, 0


@torch.no_grad()
def sample(model, prompts: list[list[int]]) -> list[list[int]]:
    """GENERATIONS completions of NEW_TOKENS tokens of each prompt, at temperature 1; prompts are padded on the left."""
    longest, rows_ = max(map(len, prompts)), len(prompts) * tasks.GENERATIONS
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])
    positions = (real.cumsum(1) - 1).clamp(min=0)
    square = torch.ones(longest, longest, dtype=torch.bool).tril() & real[:, None, None]
    MASK[:] = [square | torch.eye(longest, dtype=torch.bool)]
    first = Slots(model.config, len(prompts), longest)
    hidden = model.model(input_ids=padded, position_ids=positions, past_key_values=first).last_hidden_state[:, -1]
    cache = Slots(model.config, rows_, longest + tasks.NEW_TOKENS)
    for (key, value), (k, v) in zip(cache.layers, first.layers):
        key[:, :, :longest] = k.repeat_interleave(tasks.GENERATIONS, 0)
        value[:, :, :longest] = v.repeat_interleave(tasks.GENERATIONS, 0)
    cache.used = longest
    seen = torch.cat(
        [real.repeat_interleave(tasks.GENERATIONS, 0), torch.ones(rows_, tasks.NEW_TOKENS, dtype=torch.bool)], 1
    )
    MASK[:] = [seen[:, None, None]]
    hidden = hidden.repeat_interleave(tasks.GENERATIONS, 0)
    position = positions[:, -1:].repeat_interleave(tasks.GENERATIONS, 0)
    tokens = []
    for _ in range(tasks.NEW_TOKENS - 1):
        tokens.append(torch.multinomial(model.lm_head(hidden).softmax(-1), 1))
        position = position + 1
        out = model.model(input_ids=tokens[-1], position_ids=position, past_key_values=cache)
        hidden = out.last_hidden_state[:, -1]
        cache.used += 1
    tokens.append(torch.multinomial(model.lm_head(hidden).softmax(-1), 1))
    MASK.clear()
    return torch.cat(tokens, 1).tolist()


def sft(args: argparse.Namespace, meter: measure.Meter, model, tokenizer) -> None:
    documents = []
    for row in sft_rows(args.rows):
        prompt = tokenizer(row["prompt"])["input_ids"]
        documents.append((prompt + tokenizer(row["completion"] + END)["input_ids"], len(prompt), 1.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    losses, labels = [], 0
    with meter.running():
        for start in range(0, len(documents), args.batch_size):
            batch = documents[start : start + args.batch_size]
            count = sum(len(ids) - n for ids, n, _ in batch)
            losses.append(update(model, optimizer, batch, 1 / count))
            labels += count
    tokens = sum(len(ids) for ids, _, _ in documents)
    meter.report(tokens=tokens, loss_tokens=labels, steps=len(losses), first_loss=losses[0], final_loss=losses[-1])


def grpo(args: argparse.Namespace, meter: measure.Meter, model, tokenizer) -> None:
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows("prompts", 64)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    new = 0
    with meter.running():
        for step in range(args.steps):
            documents = []
            batch = prompts[step * tasks.PROMPTS : (step + 1) * tasks.PROMPTS]
            completions = sample(model, batch)
            rewards = torch.tensor(tasks.digit_share(tokenizer.batch_decode(completions))).view(-1, tasks.GENERATIONS)
            advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
            for i, (completion, advantage) in enumerate(zip(completions, advantages.flatten().tolist())):
                prompt = batch[i // tasks.GENERATIONS]
                documents.append((prompt + completion, len(prompt), advantage))
            new += sum(map(len, completions))
            # on policy, the gradient of the clipped surrogate is that of the advantage-weighted log-likelihood
            update(model, optimizer, documents, 1 / (len(documents) * tasks.NEW_TOKENS))
    meter.report(tokens=new, steps=args.steps)


def main() -> None:
    args = tasks.arguments()
    meter = measure.Meter()
    torch.manual_seed(0)
    assets = build()
    model = AutoModelForCausalLM.from_pretrained(
        assets / f"model-{args.model}", dtype=torch.float32, attn_implementation="bench_floor"
    )
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizer")
    (sft if args.task == "sft" else grpo)(args, meter, model.train(), tokenizer)


if __name__ == "__main__":
    main()
