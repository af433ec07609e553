"""A Llama-style language model in one file: the model, its optimizer, its data and its checkpoints.

Read it from top to bottom: no name is used before it is defined. Each class or function may be copied out on
its own, with the imports and with what the comment `# needs:` at its head names.

    tokens (B, T)                     TransformerBlock:  x ─┬─ RMSNorm ─ MultiheadSelfAttention ─┐
      │                                                     └───────────────── + ◄───────────────┘
    Embedding                                                                  │
      │ x (B, T, D)                                         ┌──────────────────┴─ RMSNorm ─ SwiGLU ─┐
    TransformerBlock × num_layers                           └───────────────── + ◄──────────────────┘
      │                                                                        x
    RMSNorm
      │
    Linear ─ logits (B, T, V): what is the next token?

Legend, used in every shape:
    B  batch, sequences side by side                  F  d_ff, the width inside the feed-forward
    T  time, the tokens of a sequence                 V  vocabulary, how many different tokens there are
    D  d_model, the width of the residual stream      G  heads of keys and values, each serving H / G of the H
    H  heads (of queries)                             S  time of keys and values: T and what is cached before
    K  head size, D / H                               N  B · T, all tokens of a batch in one row
Tokens are integers that stand for pieces of text. The residual stream is the vector of each token that all
blocks read and add to. Logits are scores z of what may come next; softmax, exp(z_i) / Σ exp(z_j), makes them
probabilities. The loss is the mean of -ln(probability of the true next token), in nats.
"""

import contextlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.serialization import config as serialization


# ------------------------------------------------------------------------------------------ Linear, Embedding
class Linear(nn.Module):
    """y = x Wᵀ, with no bias.

    W starts normally distributed with variance 2 / (d_in + d_out), a compromise between keeping the scale of
    activations (forward) and of gradients (backward); clipped at 3σ, so that no weight starts as an outlier.
    Source: Glorot and Bengio, "Understanding the difficulty of training deep networks", 2010, equation 12.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        std = math.sqrt(2 / (d_in + d_out))
        self.weight = nn.Parameter(torch.empty(d_out, d_in).normal_(0, std).clamp_(-3 * std, 3 * std))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out)."""
        W, d_in, rows = self.weight, x.shape[-1], x.numel() // x.shape[-1]
        few = rows <= 32 and x.device.type == "cpu" and x.dtype == torch.float32
        if few and W.numel() >= 2**16 and len(W) % 2 == 0:
            # So few as in generating: W xᵀ, in halves for two cores, is up to 5 times as fast as x Wᵀ.
            halves = W.view(2, -1, d_in) @ x.reshape(rows, d_in).T.expand(2, -1, -1)  # (2, d_out/2, rows)
            return halves.flatten(0, 1).T.reshape(*x.shape[:-1], len(W))
        return F.linear(x, W)


class Embedding(nn.Module):
    """A table with a row of D numbers for each token. They start at σ = 1, the scale of RMSNorm."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model).normal_().clamp_(-3, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) of integers in 0 … V-1 → (..., D)."""
        return F.embedding(tokens, self.weight)


# ---------------------------------------------------------------------------------------------------- RMSNorm
class RMSNorm(nn.Module):
    """y = x / √(mean(x²) + ε) · g: scale a vector to root mean square 1, then each feature by its gain g.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D) of the same dtype."""
        x32 = x.float()  # a sum of squares overflows float16 and has 8 bits in bfloat16
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * scale * self.weight).type_as(x)


# ------------------------------------------------------------------------------------------------------- RoPE
class RoPE(nn.Module):
    """Rotary position embedding: turn pairs of features by an angle that grows with the position.

    The pair (x_j, x_{j + K/2}) at position t is rotated by the angle t·θ^(-2j/K):

        x_j       ← x_j·cos - x_{j+K/2}·sin
        x_{j+K/2} ← x_{j+K/2}·cos + x_j·sin

    for j = 0 … K/2-1. The dot product of two vectors so rotated depends on how far apart they are, not where.
    Source: Su et al., "RoFormer", 2021, arXiv:2104.09864; the pairs are those of Hugging Face's Llama.
    """

    def __init__(self, head_dim: int, context_length: int, theta: float = 10000.0):
        super().__init__()
        frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (K/2,)
        angle = torch.outer(torch.arange(context_length, dtype=torch.float32), frequency)
        # Both tables are (context_length, K): a column for each feature, the sine with the sign of its term.
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), -1), persistent=False)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), -1), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x (..., T, K) at the positions start … start + T-1 → (..., T, K). Past the table: ValueError."""
        end = start + x.shape[-2]
        if end > len(self.cos):  # a shorter slice might be broadcast, without a word
            raise ValueError(f"{end} tokens are more than the context_length of {len(self.cos)}")
        cos, sin = self.cos[start:end].to(x.dtype), self.sin[start:end].to(x.dtype)
        return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # rolled by K/2, each meets its partner


# ----------------------------------------------------------------------------------------------------- SwiGLU
class SwiGLU(nn.Module):  # needs: Linear
    """The feed-forward, W_down (silu(W_gate x) ⊙ W_up x): a gate says how much of each inner feature passes.

    silu(z) = z · sigmoid(z); ⊙ multiplies feature by feature.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # gate and up: (..., F)


# ----------------------------------------------------------------------------------------- Attention, KVCache
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √K) v, where each token sees itself and what came before it.

    Each token asks with its query q; the better another's key k answers, the more it gets of its value v.
    q (B, H, T, K), k and v (B, H, S, K); the T queries are the last of the S positions. → (B, H, T, K).
    Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, equation 1.
    """
    (T, K), S = q.shape[2:], k.shape[2]
    # -inf where the key comes after the query, of which softmax makes 0; else 0
    future = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)
    scores = (q / math.sqrt(K)) @ k.mT + future  # (B, H, T, S)
    return scores.softmax(-1) @ v


def fast_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # needs: attention
    """The same, by whichever is faster: the lines above, or torch's kernel, which never holds all scores.

    k and v (B, G, S, K): each of their heads serves H / G of the queries'. The kernel's mask begins with the
    first key, so that it is right for T = S alone. In bfloat16 on a CPU the lines above won up to T = 512.
    """
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    if T == 1:  # it sees all, without a mask: so the H / G queries of a group may read its keys together
        return F.scaled_dot_product_attention(q.reshape(B, G, H // G, K), k, v).reshape(B, H, 1, K)
    if G < H:
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    if T < S or (q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 512):
        return attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class KVCache:
    """The keys and values of the tokens seen so far: none is computed twice."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        """shape: (B, G, context_length, K). Their memory is taken once, for the whole window."""
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, G, T, K); return all held, (B, G, S, K) each. Raises ValueError when full."""
        start, end = self.length, self.length + k.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"{end} tokens are more than the cache's {self.keys.shape[2]}")
        self.keys[:, :, start:end], self.values[:, :, start:end], self.length = k, v, end
        return self.keys[:, :, :end], self.values[:, :, :end]


class MultiheadSelfAttention(nn.Module):  # needs: Linear, RoPE, KVCache, attention, fast_attention
    """H attentions side by side, each on its own K features, mixed by a last projection.

    With G < H heads of keys and values (grouped-query attention), the cache is H / G times smaller.
    Source: Ainslie et al., "GQA", 2023, arXiv:2305.13245.
    """

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int, rope: RoPE):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, d_model // num_heads
        self.q_proj = Linear(d_model, num_heads * self.head_dim)
        self.k_proj = Linear(d_model, num_kv_heads * self.head_dim)
        self.v_proj = Linear(d_model, num_kv_heads * self.head_dim)
        self.o_proj = Linear(num_heads * self.head_dim, d_model)
        self.rope = rope

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D). With a cache, x follows the tokens in it, sees them, and is added."""
        if cache is None:  # all heads by one product: on a CPU in bfloat16 up to 1.1 times as fast
            start, weights = 0, (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
            qkv = F.linear(x, torch.cat(weights))  # so q_proj itself is not called here, nor are its hooks
        else:  # a token at a time: to copy the weights would take longer than to multiply by them
            start, qkv = cache.length, torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)
        qkv = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 G, T, K)
        qk, v = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), 1)
        q, k = self.rope(qk, start).split((self.num_heads, self.num_kv_heads), 1)
        if cache is not None:
            k, v = cache.update(k, v)
        y = fast_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))


# ------------------------------------------------------------------------------------------- TransformerBlock
class TransformerBlock(nn.Module):  # needs: RMSNorm, SwiGLU, MultiheadSelfAttention and its needs
    """x ← x + attention(norm(x)), then x ← x + feed-forward(norm(x)).

    With the norm before each branch ("pre-norm"), the residual stream x itself is never rescaled: gradients
    reach the first layer undamped, and deep models train stably.
    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, arXiv:2002.04745.
    """

    def __init__(self, d_model, num_heads, num_kv_heads, d_ff, rope: RoPE, eps=1e-5, dropout=0.0):
        super().__init__()
        self.input_layernorm = RMSNorm(d_model, eps)
        self.self_attn = MultiheadSelfAttention(d_model, num_heads, num_kv_heads, rope)
        self.post_attention_layernorm = RMSNorm(d_model, eps)
        self.mlp = SwiGLU(d_model, d_ff)
        self.dropout = dropout

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        p = self.dropout if self.training and cache is None else 0.0  # no dropout while generating
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cache), p)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), p)


# ------------------------------------------------------------------------------------------------------- Loss
class LinearCrossEntropy(torch.autograd.Function):
    """mean over n of -log softmax(W x_n)[target_n], without ever holding all the logits.

    Equal, in value and gradient, to F.cross_entropy((x @ weight.T).float(), targets), whose (N, V) numbers
    would be the largest in memory by far. Here a chunk of rows at a time gives its part of the loss and, at
    once, of the gradients, because ∂loss/∂logits = (softmax - onehot) / N needs nothing but the logits.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, with_grad: bool) -> Tensor:
        """x (N, D), weight (V, D), targets (N,) → (), float32. ctx carries what backward needs."""
        w, total = weight.to(x.dtype), torch.zeros((), device=x.device)
        if with_grad:
            dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
            ctx.save_for_backward(dx, dw)
        rows = min(4096, max(256, 2**24 // len(w)))  # at most 64 MiB of float32 logits, for V up to 65,536
        for start in range(0, len(x), rows):
            chunk, target = x[start : start + rows], targets[start : start + rows]
            log_probs = F.log_softmax(chunk @ w.T, -1, dtype=torch.float32)  # (rows, V)
            total -= log_probs.gather(-1, target[:, None]).sum()
            if with_grad:  # of the logits: softmax - onehot, which float16 can hold
                error = log_probs.exp_().scatter_(-1, target[:, None], -1.0, reduce="add").to(x.dtype)
                dx[start : start + rows] = error @ w
                dw += error.T @ chunk
        return total / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        scale = grad / len(dx)  # 1 / N waits until here, where the loss scale of float16 multiplies it
        return dx * scale, dw * scale, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # needs: LinearCrossEntropy
    """LinearCrossEntropy of x (..., D), weight (V, D) and targets (...), in nats; heeds autocast."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    # Asked here, because inside forward gradients are always off: an evaluation forms none.
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(x.flatten(0, -2), weight, targets.flatten(), with_grad)


# --------------------------------------------------------------------------------------------------- Sampling
def sample_token(logits: Tensor, temperature=1.0, top_k=None, top_p=None, generator=None) -> Tensor:
    """Draw a token from each row of logits (B, V) → (B,), int64. Raises ValueError for settings out of range.

    temperature   divides the logits: below 1 the likely becomes likelier; 0 takes the likeliest
    top_k         then only the k likeliest can be drawn; None: all
    top_p         then only the fewest of the likeliest whose probabilities reach p together; None or 1: all
                  ("nucleus sampling", Holtzman et al., 2019, arXiv:1904.09751)

    Probabilities (0.5, 0.3, 0.15, 0.05), top_p = 0.7: before each there lies (0, 0.5, 0.8, 0.95). Where that
    is below 0.7 the token is kept: the first two, then drawn with probabilities 0.5 / 0.8 and 0.3 / 0.8.
    """
    V = logits.shape[-1]
    top_k, top_p = V if top_k is None else top_k, 1.0 if top_p is None else top_p
    if not (temperature >= 0 and top_k >= 1 and 0 < top_p <= 1):
        raise ValueError(f"{temperature=} must be at least 0, {top_k=} at least 1, {top_p=} above 0, up to 1")
    if temperature < 1e-30:  # 0, or so near that to divide by it might overflow
        return logits.argmax(-1)
    logits, ids = logits.topk(min(top_k, V)) if top_k < V or top_p < 1 else (logits, None)  # likeliest first
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= top_p, 0.0)
    # argmax(p / Exp(1)) is distributed as p, like the winner of a race between exponential clocks (its log is
    # the Gumbel-max trick); torch.multinomial would wait for the GPU. Clamped, no clock makes 0 / 0 of p = 0.
    clocks = torch.empty_like(probs).exponential_(generator=generator).clamp_min_(1e-30)
    choice = (probs / clocks).argmax(-1, keepdim=True)
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]


@contextlib.contextmanager
def onednn(wanted: bool) -> Iterator:
    """Leave the products of a CPU to oneDNN, or else to torch, which is faster for one row in bfloat16."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and wanted
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


# --------------------------------------------------------------------------------- ModelConfig, TransformerLM
@dataclass
class ModelConfig:
    """The shape of a TransformerLM. One that cannot be raises ValueError."""

    vocab_size: int
    context_length: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None  # None: as many as heads
    d_ff: int | None = None  # None: 8/3 · d_model: 3 such matrices cost as much as 2 of 4 · d_model
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # one matrix serves as embedding and as output
    dropout: float = 0.0

    def __post_init__(self):
        self.num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        self.d_ff = 8 * math.ceil(self.d_model / 3) if self.d_ff is None else self.d_ff
        for name, value in vars(self).items():
            if name not in ("tie_embeddings", "dropout") and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        for name, divisor in (("d_model", "num_heads"), ("num_heads", "num_kv_heads")):
            if (size := getattr(self, name)) % getattr(self, divisor):
                raise ValueError(f"{name} is {size}, not a multiple of {divisor}, {getattr(self, divisor)}")
        self.head_dim = self.d_model // self.num_heads
        if self.head_dim % 2:
            raise ValueError(f"d_model / num_heads is {self.head_dim}; it must be even: RoPE rotates pairs")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")


class TransformerLM(nn.Module):  # needs: everything above
    """Tokens in, logits of each next token out: embedding, num_layers blocks, norm, and a last linear map.

    State-dict keys are those of Hugging Face's Llama without the prefix `model.`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        rope = RoPE(c.head_dim, c.context_length, c.rope_theta)
        block = (c.d_model, c.num_heads, c.num_kv_heads, c.d_ff, rope, c.norm_eps, c.dropout)
        self.embed_tokens = Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList(TransformerBlock(*block) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.lm_head = Linear(c.d_model, c.vocab_size)
        if c.tie_embeddings:
            self.embed_tokens.weight = self.lm_head.weight  # the head's initial values serve both
        # 2 · num_layers branches are added: divided by that number's root, the sum does not grow with depth.
        for layer in self.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.data /= math.sqrt(2 * c.num_layers)

    def hidden(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """tokens (B, T), int64 → what the blocks make of them, normed, (B, T, D); T ≤ context_length."""
        x = self.embed_tokens(tokens)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, cache)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T), int64 → logits (B, T, V); those at t depend on the tokens up to t alone."""
        return self.lm_head(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, (), float32, of targets (B, T), the tokens (B, T) one step ahead."""
        return linear_cross_entropy(self.hidden(tokens), self.lm_head.weight, targets)

    def new_caches(self, batch_size: int) -> list[KVCache]:
        """An empty KVCache for each layer."""
        c, weight = self.config, self.lm_head.weight
        shape = (batch_size, c.num_kv_heads, c.context_length, c.head_dim)
        return [KVCache(shape, weight.dtype, weight.device) for _ in self.layers]

    @torch.inference_mode()
    def stream(
        self, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_id=None, generator=None
    ) -> Iterator[Tensor]:
        """Yield the tokens that follow prompt (B, P), int64, P ≥ 1: (B,) at a time, as they come.

        A row that has drawn eos_id repeats it; the stream ends when all have. When the window is full, its
        last half is read again into empty caches. temperature, top_k, top_p: as for sample_token. Raises
        ValueError, at the first token, for what is out of range. The tokens are inference tensors.
        """
        (B, P), T, V = prompt.shape, self.config.context_length, self.config.vocab_size
        if max_new_tokens < 0 or not P or prompt.min() < 0 or prompt.max() >= V:
            raise ValueError(f"prompt must hold tokens, 0 to {V - 1}, and {max_new_tokens=} be at least 0")
        tokens = torch.cat((prompt, prompt.new_zeros(B, max_new_tokens)), 1)
        done = torch.zeros(B, dtype=torch.bool, device=prompt.device)
        caches, start = self.new_caches(B), max(0, P - T)
        for end in range(P, P + max_new_tokens):
            if caches[0].length == T:
                caches, start = self.new_caches(B), end - max(1, T // 2)
            unread, start = tokens[:, start:end], end
            with onednn(unread.numel() > 1):  # without it, one in bfloat16 takes half the time
                logits = self.lm_head(self.hidden(unread, caches)[:, -1])
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if eos_id is not None:
                token = token.masked_fill(done, eos_id)
                done |= token == eos_id
            tokens[:, end] = token
            yield token
            if eos_id is not None and done.all():
                return

    def generate(self, prompt: Tensor, *args, **kwargs) -> Tensor:
        """prompt (B, P) → (B, P + new), prompt included; the arguments are those of `stream`."""
        return torch.cat([prompt, *(token[:, None] for token in self.stream(prompt, *args, **kwargs))], 1)


# ------------------------------------------------------------------------------------------------------ AdamW
class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, for parameters θ with gradients g at step t:

        θ ← θ - η·λ·θ                            decay; give RMSNorm's gains a group with weight_decay=0
        m ← β₁·m + (1 - β₁)·g                    mean of the gradients
        v ← β₂·v + (1 - β₂)·g²                   mean of their squares
        θ ← θ - η·(m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101.
    t is counted once a group: all its parameters should have gradients from its first step on. lr may be a
    0-d tensor: `torch.compile(optimizer.step)` then serves every rate.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
            group["step"] = t = group.get("step", torch.zeros((), device=params[0].device)) + 1
            # Stacked, the powers are computed once, and not in the innermost loop of a compiled step.
            correction1, correction2 = 1 - torch.stack((beta1**t, beta2**t))
            decay, rate = 1 - lr * group["weight_decay"], lr / correction1
            for param in params:
                state = self.state[param]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                m, v, g = state["exp_avg"], state["exp_avg_sq"], param.grad
                param.mul_(decay)
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                param.addcmul_(m / (v / correction2).sqrt_().add_(eps), rate, value=-1)
        return loss


def lr_cosine_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of an update: a line up to max_lr, half a cosine down to min_lr, then min_lr.

    Source: Loshchilov and Hutter, "SGDR", 2016, arXiv:1608.03983, equation 5.
    """
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    progress = 1.0 if step >= total_steps else (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------------- MemmapTokenDataset
class MemmapTokenDataset(torch.utils.data.Dataset):
    """Windows of context_length + 1 tokens in a file of unsigned little-endian integers of any size.

    An epoch visits all n windows once, in an order of its own, which is not stored but computed: place i of
    the epoch belongs to window π(i). π permutes 0 … n-1 on the next power of two, by steps that can each be
    undone: add; multiply by an odd number; fold high bits onto low ones. What lands beyond n-1 is sent on,
    until it lands below ("cycle walking": Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    Each epoch also shifts all its windows by an offset of its own, so that they begin at other tokens.
    """

    def __init__(self, path: str | os.PathLike, context_length: int, dtype, vocab_size: int | None = None):
        """Raises ValueError for a file that is no whole number of tokens or shorter than a window."""
        self.path, self.context_length, self.vocab_size = Path(path), context_length, vocab_size
        self.dtype = dtype = np.dtype(dtype).newbyteorder("<")
        count, rest = divmod(size := self.path.stat().st_size, dtype.itemsize)
        window = context_length + 1  # x and y are the same tokens, one apart
        if rest:
            raise ValueError(f"{path}: {size:,} bytes are no whole number of {dtype.name}s; prepare it again")
        if count < window:
            raise ValueError(f"{path}: {count:,} tokens are fewer than context_length + 1 = {window}")
        self.tokens = np.memmap(self.path, dtype, mode="r")
        self.rows = np.lib.stride_tricks.sliding_window_view(self.tokens, window)  # no copy

    def __reduce__(self):
        # A DataLoader's workers open the file themselves: pickled as it is, the map would be copied whole.
        return type(self), (self.path, self.context_length, self.dtype, self.vocab_size)

    def __len__(self) -> int:
        return max(1, (len(self.tokens) - self.context_length) // self.context_length)  # room for the shift

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Window `index` → (x, y), each (T,), int64, y one token ahead of x."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        x, y = self.windows(np.array([index * self.context_length]))
        return x[0], y[0]

    def windows(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """The windows that begin at the tokens `starts` (B,) → (x, y), each (B, T), int64."""
        rows = self.rows[starts]
        if self.vocab_size is not None and rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            found = f"{self.path}: token {starts[row] + column:,} is {rows[row, column]}"
            raise ValueError(f"{found}, but the vocabulary has {self.vocab_size} entries; prepare it again")
        tokens = torch.from_numpy(rows.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def batch(self, step: int, batch_size: int, seed: int, rank=0, world_size=1) -> tuple[Tensor, Tensor]:
        """(x, y), as of `windows`: this rank's batch_size / world_size rows of batch `step`, from 0.

        It depends on the arguments and the file alone. Raises ValueError if the ranks cannot share evenly.
        """
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} does not divide among {world_size} processes")
        share, n, T, starts = batch_size // world_size, len(self), self.context_length, []
        epochs, places = np.divmod(step * batch_size + rank * share + np.arange(share), n)
        for epoch in np.unique(epochs).tolist():  # nearly always one
            keys = np.random.SeedSequence((seed, epoch)).generate_state(7, np.uint64)
            offset = int(keys[6]) % min(T, len(self.tokens) - n * T)
            starts.append(self._shuffle(places[epochs == epoch], keys[:6]) * T + offset)
        return self.windows(np.concatenate(starts))

    def _shuffle(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """π(places), int64, for the permutation π that six random keys, uint64, make."""
        bits = (len(self) - 1).bit_length()
        mask, half = np.uint64(2**bits - 1), np.uint64((bits + 1) // 2)
        x = places.astype(np.uint64)
        for add, multiply in keys.reshape(3, 2):
            x = (x + add) * (multiply | 1) & mask
            x ^= x >> half
        if (beyond := x >= len(self)).any():
            x[beyond] = self._shuffle(x[beyond], keys)
        return x.astype(np.int64)


# ------------------------------------------------------------------------------------------ CheckpointHandler
@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator:
    """Open a file to write that takes the place of `path` once it is whole and safe on the disk, or never."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:
        # torch.save wraps the OSError that it met in a RuntimeError; that of a full disk has no file's name.
        cause = problem if isinstance(problem, OSError) else problem.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(cause.filename or path)) from None
    finally:
        temporary.unlink(missing_ok=True)


class CheckpointHandler:  # needs: replacing
    """Saves and loads dictionaries of tensors and plain values: whole or not at all; damage is noticed.

    A file is what torch.save writes and then its CRC-32, 4 bytes, little-endian, which torch.load ignores.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def save(self, name: str, state: dict) -> None:
        """Write folder/name. Until that is safe on the disk, the old one stays. Raises OSError."""
        # torch's own checksums, one for each tensor, would take longer than this one, and miss more.
        with replacing(self.folder / name) as file, serialization.patch("save.compute_crc32", False):
            torch.save(state, file)
            file.write(self._crc32(file).to_bytes(4, "little"))

    def load(self, name: str, map_location: str | torch.device = "cpu") -> dict:
        """Read folder/name: data, never code. Raises ValueError if damaged, OSError if unreadable."""
        path = self.folder / name
        with open(path, "rb") as file:
            if self._crc32(file) != 0x2144DF1C:  # what anything followed by its own CRC-32 comes to
                raise ValueError(f"{path}: damaged, or no checkpoint at all: its checksum is wrong")
        try:  # mapped, so that no tensor is copied before it is used
            return torch.load(path, map_location=map_location, weights_only=True, mmap=True)
        except Exception as problem:  # of any type: these bytes are whole, but no work of `save`
            raise ValueError(f"{path}: no checkpoint: {type(problem).__name__}") from problem

    @staticmethod
    def _crc32(file) -> int:
        """The CRC-32 of the whole file, which then stands at its end."""
        file.seek(0)
        crc = 0
        while block := file.read(2**18):
            crc = zlib.crc32(block, crc)
        return crc


# ----------------------------------------------------------------------------------------------- Hugging Face
LLAMA_SHAPE = {  # what config.json calls the fields of ModelConfig
    "vocab_size": "vocab_size", "max_position_embeddings": "context_length", "hidden_size": "d_model",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "intermediate_size": "d_ff", "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
LLAMA_KIND = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
NO_EFFECT = r"\w+_token_id|(torch_)?dtype|initializer_range|is_llama_config|use_cache|_name.*|transformers.*"


def save_pretrained(model: TransformerLM, folder: str | os.PathLike, eos_id: int | None = None) -> None:
    # needs: replacing, LLAMA_SHAPE, LLAMA_KIND, TransformerLM and its needs
    """Write a folder that transformers loads as LlamaForCausalLM. Needs safetensors; raises OSError."""
    from safetensors.torch import save

    folder, config = Path(folder), LLAMA_KIND | {"bos_token_id": None, "eos_token_id": eos_id}
    config |= {theirs: getattr(model.config, ours) for theirs, ours in LLAMA_SHAPE.items()}
    weights = {n if n == "lm_head.weight" else f"model.{n}": w for n, w in model.named_parameters()}
    with replacing(folder / "model.safetensors") as file:
        file.write(save(weights, {"format": "pt"}))
    with replacing(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode())


def pretrained_config(folder: str | os.PathLike, **changes) -> ModelConfig:
    # needs: ModelConfig, LLAMA_SHAPE, LLAMA_KIND, NO_EFFECT
    """The shape of the Llama in a Hugging Face folder, with changes. Raises OSError or ValueError."""
    path = Path(folder, "config.json")
    try:
        fields = {"model_type": "absent", "rms_norm_eps": 1e-6} | json.loads(path.read_text())  # if left out
        fields |= fields.pop("rope_parameters", None) or {}  # where transformers 5 keeps rope_theta
        shape = {LLAMA_SHAPE[name]: fields.pop(name) for name in LLAMA_SHAPE.keys() & fields.keys()}
        config = ModelConfig(**shape | changes)
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{path}, with {changes}: not understood: {problem!r}") from None
    known = LLAMA_KIND | {"rope_type": "default", "pretraining_tp": 1, "head_dim": config.head_dim}
    for name, value in fields.items():  # each must be known here, or null, false or 0
        if value and value != known.get(name) and not re.fullmatch(NO_EFFECT, name):
            raise ValueError(f"{path}: {name} is {value!r}, which this model does not do")
    return config


def load_pretrained(folder: str | os.PathLike, **changes) -> TransformerLM:
    # needs: TransformerLM and its needs, pretrained_config and its needs
    """The Llama in a Hugging Face folder, in float32. Raises OSError or ValueError; needs safetensors."""
    import safetensors.torch

    model, weights = TransformerLM(pretrained_config(folder, **changes)), {}
    files, index = {"model.safetensors"}, Path(folder, "model.safetensors.index.json")
    try:
        if index.exists() and not Path(folder, "model.safetensors").exists():
            files = set(dict(json.loads(index.read_text())["weight_map"]).values())
        for name in files:
            weights |= safetensors.torch.load_file(Path(folder, name))  # mapped: no weight is in memory twice
        # Old files hold RoPE's frequencies too.
        weights = {k.removeprefix("model."): w for k, w in weights.items() if not k.endswith("inv_freq")}
        if model.config.tie_embeddings and "embed_tokens.weight" in weights:
            weights["lm_head.weight"] = weights["embed_tokens.weight"]
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as problem:
        raise ValueError(f"{folder}: its weights do not fit: {' '.join(str(problem).split())}") from None
    return model
