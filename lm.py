"""A Llama-style language model in one file: the model, its optimizer, its data and its checkpoints.

A language model reads a sequence of tokens: integers that stand for pieces of text. (A tokenizer, which is
not in this file, turns text into tokens and back.) At each position the model predicts which token comes
next, from the tokens up to there alone. So one pass over T tokens makes T predictions.

    tokens (B, T)                        TransformerBlock:
      │                                    x (B, T, D)
    Embedding                              ├──► RMSNorm ──► MultiheadSelfAttention ──┐
      │ x (B, T, D)                        + ◄───────────────────────────────────────┘
    TransformerBlock × num_layers          ├──► RMSNorm ──► SwiGLU ──┐
      │                                    + ◄───────────────────────┘
    RMSNorm                                x (B, T, D)
      │
    Linear
      │
    logits (B, T, V)

The embedding turns each token into a vector of D numbers. This vector x is called the residual stream: each
block reads it and adds to it, twice. First attention adds what it collects from the token itself and from
earlier ones. For this, three linear maps of its vector give each token a query (what it looks for), a key
(what it offers) and a value (what it passes on): the better a query matches a key, the more of the value is
collected. This happens several times side by side, in "heads". Then the feed-forward, SwiGLU, adds what it
computes from each token's vector on its own. Both read a copy of x that RMSNorm has rescaled.

The last Linear turns each vector into V logits: one score z_i for every token i that might come next.
Softmax, exp(z_i) / Σ_j exp(z_j), turns the scores into probabilities. The loss is the mean of -ln(probability
of the true next token). It is called the cross-entropy, and measured in nats, the unit of the natural
logarithm. A blind guess costs ln(V) = -ln(1/V).

To train the model, repeat:

    for step in range(1, total_steps + 1):
        for group in optimizer.param_groups:  # set the learning rate: how large a step to take
            group["lr"] = lr_cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)
        x, y = dataset.batch(step - 1, batch_size, seed)  # y: for each token of x, the token that follows
        loss = model.loss(x, y)  # the forward pass, which torch's autograd records
        loss.backward()  # the backward pass: the gradient, which is how the loss changes with each weight
        optimizer.step()  # move each weight a little against its gradient
        optimizer.zero_grad()  # forget this gradient

To generate text, draw a token from the last prediction, append it to the sequence, and repeat.

The same letters name the dimensions in every shape below:
    B  batch: sequences processed side by side      V  vocabulary: how many different tokens there are
    T  time: tokens in a sequence                   H  heads of queries
    D  d_model: width of the residual stream        G  heads of keys and values: H, or fewer to save memory
    N  all tokens of a batch, B · T                 K  width of a head, D / H
    S  tokens that attention reads: T, and while generating also those read before (see KVCache)

Read from top to bottom. Each class and function can be copied into another project, together with the
imports and with the names that its comment `# needs:` lists.
"""

import contextlib
import json
import math
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------------------------------ Linear, Embedding
class Linear(nn.Module):
    """A linear map without bias, y = x Wᵀ. Every matrix that multiplies is one of these.

    The weights start random: equal weights would get equal gradients and stay equal. Each output is a sum of
    d_in independent terms, so a variance of 1 / d_in would give the outputs the scale of the inputs. In the
    backward pass, 1 / d_out would do the same for the gradients. 2 / (d_in + d_out) is the compromise.
    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    2010, equation 12.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values. All layers have this method, so that a whole model can be filled anew."""
        d_out, d_in = self.weight.shape
        nn.init.normal_(self.weight, std=math.sqrt(2 / (d_in + d_out)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out)."""
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """A table with one learned vector of D numbers for each token of the vocabulary.

    The vectors start with variance 1, so that what the first blocks add does not drown them.
    """

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        nn.init.normal_(self.weight, std=1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Integers from 0 to V-1 (...) → their vectors (..., D)."""
        return F.embedding(tokens, self.weight)


# ---------------------------------------------------------------------------------------------------- RMSNorm
class RMSNorm(nn.Module):
    """y = x / √(mean(x²) + ε) · g: scale each vector to root mean square 1, then each feature by its gain g.

    What the blocks add to the residual stream changes its scale, from block to block and in the course of
    training. Attention and feed-forward learn best if their input keeps its scale, so each has an RMSNorm
    before it, and so has the last map, to logits. The gains are learned; ε only prevents division by 0.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all gains to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D) of the same dtype."""
        x32 = x.float()  # in a 16-bit dtype the squares would overflow or lose digits
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * scale * self.weight).type_as(x)


# -------------------------------------------------------------------------------------------------- Attention
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √K + mask) v: each token collects information from itself and the tokens before it.

    Each token has a query q (what it looks for), a key k (what it offers) and a value v (what it passes on).
    The dot product of a query and a key is their score: how well they match. For each query, softmax turns
    the scores into attention weights, which are positive and sum to 1. The result is the mean of the values
    with these weights.

    A token must not see later ones: they are what it has to predict. So the causal mask adds -inf to their
    scores, and softmax makes their weights 0. For T = S = 3, with a row for each query and a column for each
    key:

        0  -inf  -inf
        0     0  -inf
        0     0     0

    If q and k hold K independent numbers of variance 1, their dot product has a standard deviation of √K;
    divided by √K it has 1. Larger scores would give nearly all weight to a single token, where the gradient
    of softmax vanishes.

    If T < S, as in generation (see KVCache), the queries are those of the last T of the S tokens, and the
    mask has only its last T rows. q (B, H, T, K), k and v (B, H, S, K) → (B, H, T, K).
    Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, equation 1.
    """
    T, K = q.shape[-2:]
    S = k.shape[-2]
    # triu(d) keeps column - row ≥ d. Row i is the query of token S - T + i: this hides the keys after it.
    mask = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)
    scores = (q / math.sqrt(K)) @ k.mT + mask  # (B, H, T, S)
    return scores.softmax(dim=-1) @ v


def fast_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # needs: attention
    """The same result as `attention`, but faster. First readers may skip it: `attention` says it all.

    torch's fused kernel computes all in one go, and never holds all T · S scores. q (B, H, T, K), k and v
    (B, G, S, K) → (B, H, T, K). If G < H, each head of keys and values serves H / G heads of queries (see
    MultiheadSelfAttention).
    """
    H, T = q.shape[1:3]
    G, S = k.shape[1:3]
    if T == 1:  # a single new token may see all tokens: no mask
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=G < H)
    # On a CPU in bfloat16, `attention` makes a training step 1.3 times as fast at T = 128, 1.0 at T = 512.
    plain_is_faster = q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 512
    if T == S and not plain_is_faster:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G < H)
    if G < H:
        k = k.repeat_interleave(H // G, dim=1)
        v = v.repeat_interleave(H // G, dim=1)
    return attention(q, k, v)


# ------------------------------------------------------------------------------------------------------- RoPE
class RoPE(nn.Module):
    """Rotary position embedding: rotate queries and keys by an angle that grows with their position.

    Without it, a score does not depend on where the two tokens stand. To a layer of attention, the tokens
    before a word are an unordered set: "dog bites" and "bites dog" look alike. RoPE rotates each query and
    each key by an angle proportional to its position. If R_a is the rotation by the angle a, then

        (R_a q) · (R_b k) = q · (R_{b-a} k)

    because turning both vectors by the same angle, -a, does not change their dot product. So the score now
    depends on how far apart the two tokens are. Values are not rotated.

    A rotation needs two coordinates, so the K features form K/2 pairs. For j = 0 … K/2 - 1, let x1 be feature
    j of the first half and x2 feature j of the second half. At position t, this pair rotates by the angle
    t · θ^(-2j/K), with a constant θ, 10,000 by default:

        x1' = x1 · cos - x2 · sin
        x2' = x2 · cos + x1 · sin

    The first pair rotates fast, to tell neighbours apart, the last one slowly, for long distances. If K is 4,
    features 0 and 2 rotate by t radians, and features 1 and 3 by t / 100.

    The paper pairs neighbours instead, features 2j and 2j + 1 ("interleaved"). Both are the same method with
    the features in another order, but weights trained with one pairing do not work with the other. This one
    is that of Hugging Face's Llama.
    Source: Su et al., "RoFormer", 2021, arXiv:2104.09864.
    """

    def __init__(
        self, head_dim: int, context_length: int, theta: float = 10000.0, scaling: dict | None = None
    ):
        """scaling: the arguments of `scale_frequencies`, for models that use it; None: as above."""
        super().__init__()
        self.head_dim = head_dim
        self.context_length = context_length
        self.theta = theta
        self.scaling = scaling
        # Buffers move with the model to another device; persistent=False keeps them out of checkpoints.
        self.register_buffer("cos", torch.empty(context_length, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(context_length, head_dim // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the two tables: a row for each position, a column for each pair. No state dict holds them."""
        device = self.cos.device
        position = torch.arange(self.context_length, dtype=torch.float32, device=device)
        two_j = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        frequency = self.theta ** (-two_j / self.head_dim)  # radians per position, (K/2,)
        if self.scaling is not None:
            frequency = self.scale_frequencies(frequency, **self.scaling)
        angle = torch.outer(position, frequency)  # (context_length, K/2)
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the pairs of x (..., T, K) by the angles that have these cosines and sines, (T, K/2)."""
        x1, x2 = x.chunk(2, dim=-1)  # the first half of the features and the second
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

    def forward(self, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Rotate queries q (B, H, T, K) and keys k (B, G, T, K) of the positions start … start + T-1.

        Returns both in the same shapes. Raises ValueError for positions beyond context_length.
        """
        end = start + q.shape[-2]
        if end > self.context_length:
            raise ValueError(f"{end} tokens are more than the context_length of {self.context_length}")
        cos = self.cos[start:end].to(q.dtype)  # (T, K/2)
        sin = self.sin[start:end].to(q.dtype)
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin)

    @staticmethod
    def scale_frequencies(
        frequency: Tensor,
        factor: float,
        low_freq_factor: float,
        high_freq_factor: float,
        original_max_position_embeddings: int,
    ) -> Tensor:
        """Change the frequencies (K/2,) for a longer context, as Llama 3.1 does. First readers may skip it.

        Llama 3.1 was trained on L = original_max_position_embeddings tokens, and then made to read more. A
        slow pair would reach angles there that it has never had. So a pair that turns less than
        low_freq_factor times within L tokens becomes `factor` times slower. One that turns more than
        high_freq_factor times knows all angles, and stays. In between the two are mixed.
        Source: Meta, llama-models, 2024, `apply_scaling`. The arguments have the names of Hugging Face.
        """
        turns = original_max_position_embeddings * frequency / (2 * math.pi)
        stay = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        stay = stay.clamp(0, 1)
        return frequency * (stay + (1 - stay) / factor)


# ---------------------------------------------------------------------------- KVCache, MultiheadSelfAttention
class KVCache:
    """Keeps the keys and values of earlier tokens while text is generated.

    A token sees itself and earlier tokens only, so its keys and values do not change when text is added after
    it: compute them once and keep them. Its queries are needed once, for its own prediction.
    """

    def __init__(self, max_length: int):
        """max_length: room for this many tokens, allocated at the first update."""
        self.max_length = max_length
        self.length = 0  # tokens held so far
        self.keys = None  # (B, G, max_length, K)
        self.values = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, G, T, K); return all keys and values held, (B, G, S, K) each.

        Raises ValueError if they are more than max_length.
        """
        start = self.length
        end = start + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"{end} tokens are more than the cache's max_length of {self.max_length}")
        if self.keys is None:
            B, G, _, K = k.shape
            self.keys = k.new_empty(B, G, self.max_length, K)
            self.values = v.new_empty(B, G, self.max_length, K)
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class MultiheadSelfAttention(nn.Module):  # needs: Linear, RoPE, KVCache, attention, fast_attention
    """H causal attentions side by side, each with queries, keys and values of its own, of width K = D / H.

    Causal: a token sees itself and the tokens before it, never later ones. Self: queries, keys and values
    come from the same sequence. One softmax gives one set of attention weights to each token, so one
    attention looks for one thing at a time. H heads look for H things, at the cost of one attention of width
    D, since each is D / H wide. A last linear map mixes their results.

    With G < H heads of keys and values, each of them serves H / G heads of queries, and the cache is H / G
    times smaller. This is called grouped-query attention.
    Source: Ainslie et al., "GQA", 2023, arXiv:2305.13245.
    """

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int, rope: RoPE):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = rope.head_dim
        if d_model != num_heads * self.head_dim:
            raise ValueError(f"d_model is {d_model}, not {num_heads} heads of rope's {self.head_dim}")
        self.q_proj = Linear(d_model, num_heads * self.head_dim)
        self.k_proj = Linear(d_model, num_kv_heads * self.head_dim)
        self.v_proj = Linear(d_model, num_kv_heads * self.head_dim)
        self.o_proj = Linear(num_heads * self.head_dim, d_model)
        self.rope = rope  # holds no weights: all layers share one

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D).

        With a cache, the tokens of x follow those in the cache; their keys and values are appended to it.
        """
        B, T, _ = x.shape
        # Split the features into heads, and move the heads before the tokens: each head works on its own.
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, K)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, K)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        start = 0 if cache is None else cache.length
        q, k = self.rope(q, k, start)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, G, S, K); the keys in the cache are rotated already
        y = fast_attention(q, k, v)  # (B, H, T, K)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H · K): the heads joined again
        return self.o_proj(y)


# ----------------------------------------------------------------------------------------------------- SwiGLU
class SwiGLU(nn.Module):  # needs: Linear
    """The feed-forward of each vector x: W_down (silu(W_gate x) ⊙ W_up x).

    Attention moves information from token to token, but only averages it. The feed-forward does not look at
    other tokens. It computes, on what each token has collected, something that no linear map can:
    silu(z) = z / (1 + e⁻ᶻ) is close to 0 if z is far below 0, and close to z if z is far above. So W_gate x
    switches each of the d_ff inner features W_up x off, or scales it; ⊙ multiplies feature by feature.
    d_ff is usually 2.7 to 4 times D.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        gate = F.silu(self.gate_proj(x))  # (..., d_ff)
        return self.down_proj(gate * self.up_proj(x))


# ------------------------------------------------------------------------------------------- TransformerBlock
class TransformerBlock(nn.Module):  # needs: RMSNorm, SwiGLU, MultiheadSelfAttention and its needs
    """x ← x + attention(norm(x)), then x ← x + feed-forward(norm(x)).

    The two terms that are added are called branches. The norm stands before each branch ("pre-norm"), never
    on the residual stream itself. So the gradient reaches the first layer through a chain of additions,
    undamped, and deep models train stably.
    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, arXiv:2002.04745.

    In train mode, dropout sets a random share p of what a branch adds to zero and multiplies the rest by
    1 / (1 - p), so that the mean stays. The model then cannot rely on any single feature, which helps if it
    would otherwise memorize a small text.

    The parts are named as in Hugging Face's Llama: mlp is the feed-forward, and post_attention_layernorm
    comes after the attention, and before the feed-forward.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        d_ff: int,
        rope: RoPE,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.input_layernorm = RMSNorm(d_model, norm_eps)
        self.self_attn = MultiheadSelfAttention(d_model, num_heads, num_kv_heads, rope)
        self.post_attention_layernorm = RMSNorm(d_model, norm_eps)
        self.mlp = SwiGLU(d_model, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cache))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x


# ------------------------------------------------------------------------------------------------------- Loss
def full_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of -ln softmax(W x_n)[target_n] over n = 1 … N, in nats.

    Targets of -100, torch's convention, are left out of the mean: for tokens that are not to be learned.
    x (N, D), weight (V, D), targets (N,) → (), float32.
    """
    logits = F.linear(x, weight)  # (N, V)
    return F.cross_entropy(logits.float(), targets)


MAX_LOGITS = 2**24  # hold at most about this many logits at once; in float32 they take 64 MiB


class ChunkedCrossEntropy(torch.autograd.Function):  # needs: MAX_LOGITS
    """`full_cross_entropy` and its gradients, without holding all N · V logits. A first reader may skip this.

    With a large vocabulary the logits are by far the largest tensor of a training step. Here they exist for
    one chunk of rows at a time. As soon as a row of logits is known, so is the gradient of the loss with
    respect to it: (softmax - onehot(target)) / count. So the forward pass computes the gradients too, and
    keeps only those.
    Sources: Hsu et al., "Liger Kernel", 2024, arXiv:2410.10989; Wijmans et al., "Cut Your Losses in
    Large-Vocabulary Language Models", 2024, arXiv:2411.09009.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, needs_grad: bool) -> Tensor:
        """x (N, D), weight (V, D), targets (N,) → (), float32."""
        w = weight.to(x.dtype)
        total = torch.zeros((), device=x.device)
        count = (targets != -100).sum()
        if needs_grad:
            dx = torch.empty_like(x)
            dw = torch.zeros_like(weight, dtype=torch.float32)
            ctx.save_for_backward(dx, dw, count)
        chunk_size = max(256, MAX_LOGITS // len(w))
        for start in range(0, len(x), chunk_size):
            x_chunk = x[start : start + chunk_size]
            target = targets[start : start + chunk_size]
            log_probs = F.log_softmax(x_chunk @ w.T, dim=-1, dtype=torch.float32)  # (chunk_size, V)
            total += F.nll_loss(log_probs, target, reduction="sum")  # leaves out targets of -100
            if needs_grad:
                ignored = target == -100
                row = torch.arange(len(target), device=x.device)
                dlogits = log_probs.exp()  # softmax
                dlogits[row, target.masked_fill(ignored, 0)] -= 1  # - onehot
                dlogits = dlogits.masked_fill(ignored[:, None], 0).to(x.dtype)
                dx[start : start + chunk_size] = dlogits @ w
                dw += dlogits.T @ x_chunk
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor):
        dx, dw, count = ctx.saved_tensors
        # Divide by count only now. In float16 small numbers become 0; grad_loss is large then, as training
        # scales the loss up against that.
        scale = grad_loss / count
        return dx * scale, dw * scale, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # needs: full_cross_entropy, ChunkedCrossEntropy, MAX_LOGITS
    """What the model calls: `full_cross_entropy` if the logits are few, else `ChunkedCrossEntropy`.

    x (..., D), weight (V, D), targets (...) → (), float32. Raises ValueError if x and targets do not match.
    """
    if x.shape[:-1] != targets.shape:
        raise ValueError(f"x {tuple(x.shape)} and targets {tuple(targets.shape)} do not match")
    x = x.flatten(0, -2)
    targets = targets.flatten()
    if len(x) * len(weight) <= MAX_LOGITS:
        return full_cross_entropy(x, weight, targets)
    # Under autocast (mixed precision), torch casts the inputs of its matrix products to a shorter dtype.
    # It does not know ours, so cast here.
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    # autograd is off inside forward(), so decide here whether gradients are needed.
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return ChunkedCrossEntropy.apply(x, weight, targets, needs_grad)


# --------------------------------------------------------------------------------------------------- Sampling
def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for settings of `sample_token` that are out of range."""
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


def sample_token(  # needs: check_sampling
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token from each row of logits (..., V) → (...), int64.

    The three settings act in this order:
    temperature   divides the logits: below 1 makes likely tokens likelier; 0 always takes the likeliest
    top_k         draw only among the k likeliest tokens; None: all
    top_p         draw only among the fewest likeliest tokens that together reach probability p; None: all
                  ("nucleus sampling", Holtzman et al., 2019, arXiv:1904.09751)

    Example: probabilities (0.5, 0.3, 0.15, 0.05) and top_p = 0.7. The probability before each token is
    (0, 0.5, 0.8, 0.95). Tokens where this is below 0.7 are kept: the first two. They are then drawn with
    probabilities 0.5 / 0.8 and 0.3 / 0.8.

    Raises ValueError for settings out of range, and on a CPU for logits that are NaN. On a GPU that check
    would make the CPU wait: torch.multinomial fails in its own words there, and temperature 0 sees nothing.
    """
    check_sampling(temperature, top_k, top_p)
    if logits.device.type == "cpu" and logits.isnan().any():
        raise ValueError("the logits are NaN: the model's weights are damaged, or its training diverged")
    if temperature < 1e-6:  # 0, or too close to 0 to divide by
        return logits.argmax(dim=-1)

    vocab_size = logits.shape[-1]
    k = vocab_size if top_k is None else min(top_k, vocab_size)
    logits, tokens = logits.float().topk(k)  # (..., k), likeliest first; k = vocab_size sorts them all
    probs = torch.softmax(logits / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        before = probs.cumsum(dim=-1) - probs
        removed = before >= top_p
        removed[..., 0] = False  # always keep the likeliest: a tiny top_p may be rounded to 0
        probs = probs.masked_fill(removed, 0.0)
    choice = torch.multinomial(probs.view(-1, k), 1, generator=generator)  # rows need not sum to 1
    choice = choice.view(*logits.shape[:-1], 1)
    return tokens.gather(-1, choice).squeeze(-1)


# --------------------------------------------------------------------------------- ModelConfig, TransformerLM
ROPE_SCALING = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]


@dataclass
class ModelConfig:  # needs: ROPE_SCALING
    """The shape of a TransformerLM. Raises ValueError for a shape that cannot be."""

    vocab_size: int
    context_length: int  # the most tokens that the model can look at together
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None  # None: num_heads
    d_ff: int | None = None  # None: 8/3 · d_model, a usual choice for SwiGLU
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # the arguments of RoPE.scale_frequencies; None: no scaling
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # one matrix as embedding and as last Linear saves V · D weights
    dropout: float = 0.0

    def __post_init__(self):
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if self.d_ff is None:
            self.d_ff = 8 * math.ceil(self.d_model / 3)  # a multiple of 8
        sizes = ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff")
        for name in sizes:
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1 and below 2**31")
        if self.num_layers > 10_000:
            raise ValueError(f"num_layers is {self.num_layers}; it must be at most 10,000")
        if self.d_model % (2 * self.num_heads) != 0:
            raise ValueError(
                f"d_model is {self.d_model}; it must be a multiple of 2 * num_heads, {2 * self.num_heads}, "
                "because each head rotates pairs of features"
            )
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}; num_heads must be a multiple of it")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta is {self.rope_theta}; it must be above 0")
        if self.rope_scaling is not None:
            self.check_rope_scaling()
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")

    def check_rope_scaling(self) -> None:
        scaling = self.rope_scaling
        if sorted(scaling) != sorted(ROPE_SCALING):
            raise ValueError(f"rope_scaling has the entries {sorted(scaling)}, not {sorted(ROPE_SCALING)}")
        for name, value in scaling.items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"rope_scaling: {name} is {value!r}; it must be a number above 0")
        if not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
            raise ValueError("rope_scaling: low_freq_factor must be below high_freq_factor")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads


class TransformerLM(nn.Module):  # needs: everything above
    """The whole model: embedding, num_layers blocks, a norm, and a linear map to logits.

    The keys of its state dict are those of Hugging Face's Llama without the prefix `model.`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # see hidden_states
        rope = RoPE(config.head_dim, config.context_length, config.rope_theta, config.rope_scaling)
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList()
        for _ in range(config.num_layers):
            block = TransformerBlock(
                d_model=config.d_model,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                d_ff=config.d_ff,
                rope=rope,
                norm_eps=config.norm_eps,
                dropout=config.dropout,
            )
            self.layers.append(block)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values of all layers, and what concerns them together.

        This one call also fills a model that was made on torch's meta device, where tensors have no memory.
        """
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        # 2 · num_layers branches add to the residual stream. A sum of n independent terms grows like √n, so
        # divide by that: at the start all of them together add as much as one, however deep the model.
        for layer in self.layers:
            layer.self_attn.o_proj.weight /= math.sqrt(2 * len(self.layers))
            layer.mlp.down_proj.weight /= math.sqrt(2 * len(self.layers))
        if self.config.tie_embeddings:
            # The one matrix must suit the logits. These are sums of d_model terms: this gives them a variance
            # of 1. As embeddings its vectors are smaller than they would be alone: the price of sharing.
            nn.init.normal_(self.lm_head.weight, std=1 / math.sqrt(self.config.d_model))
            self.embed_tokens.weight = self.lm_head.weight

    def hidden_states(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """tokens (B, T), int64 → the residual stream after all blocks and the last norm, (B, T, D).

        If self.recompute is true, a block keeps only its input for the backward pass, and computes the rest
        there again. That takes much less memory, and up to a third more time.
        """
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            if caches is not None:
                x = layer(x, caches[i])
            elif self.recompute:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return self.norm(x)

    def forward(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """tokens (B, T), int64, T ≤ context_length → logits (B, T, V) of the token after each.

        With caches, one for each layer, tokens are those that follow what the caches hold.
        """
        return self.lm_head(self.hidden_states(tokens, caches))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens and targets (B, T), int64 → mean cross-entropy in nats, (), float32.

        The target at each position is the next token. Targets of -100 are left out of the mean. Hooks on
        lm_head do not act here, because only its weight is used.
        """
        x = self.hidden_states(tokens)
        if type(self.lm_head) is not Linear:  # replaced by the user: call what is there
            return F.cross_entropy(self.lm_head(x).float().flatten(0, 1), targets.flatten())
        return linear_cross_entropy(x, self.lm_head.weight, targets)

    def check_prompt(self, prompt: Tensor, max_new_tokens: int) -> None:
        """Raise ValueError for a prompt (B, P) that cannot be continued."""
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
        vocab_size = self.config.vocab_size
        if prompt.shape[1] == 0 or prompt.min() < 0 or prompt.max() >= vocab_size:
            raise ValueError(f"the prompt must hold one or more tokens, each from 0 to {vocab_size - 1}")

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """prompt (B, P) → prompt and continuation, (B, P + new). The arguments are those of `stream`.

        It draws one token after another. In its plainest form, which reads all tokens anew each time and ends
        at context_length, that is

            for _ in range(max_new_tokens):
                token = sample_token(model(tokens)[:, -1])
                tokens = torch.cat((tokens, token[:, None]), dim=1)
        """
        tokens = [prompt]
        for token in self.stream(prompt, max_new_tokens, temperature, top_k, top_p, eos_id, generator):
            tokens.append(token[:, None])
        return torch.cat(tokens, dim=1)

    def stream(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue a prompt of P tokens, (B, P), int64: yield one token for each row, (B,), at a time.

        The settings are those of `sample_token`. A row that has drawn eos_id ("end of sequence") repeats it;
        when all rows have, generation ends. Call model.eval() first, or dropout acts. Raises ValueError.
        """
        self.check_prompt(prompt, max_new_tokens)
        context_length = self.config.context_length
        max_length = min(context_length, prompt.shape[1] + max_new_tokens)
        caches = [KVCache(max_length) for _ in self.layers]
        window = prompt[:, -context_length:]  # the tokens that the model sees
        finished = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
        for _ in range(max_new_tokens):
            # 1. Make room. A full cache cannot drop its first token, because what it holds of the others was
            #    computed with it. So keep the last half of the window, and read that again, from position 0.
            if window.shape[1] > context_length:
                window = window[:, -max(1, context_length // 2) :]
                caches = [KVCache(max_length) for _ in self.layers]
            # 2. Read what is not in the caches yet: first the whole window, then one token at a time.
            with torch.inference_mode():
                x = self.hidden_states(window[:, caches[0].length :], caches)
                logits = self.lm_head(x[:, -1])
            # 3. Draw the next token of each row, and append it.
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if eos_id is not None:
                token = token.masked_fill(finished, eos_id)
                finished = finished | (token == eos_id)
            yield token
            if eos_id is not None and finished.all():
                return
            window = torch.cat((window, token[:, None]), dim=1)


# ---------------------------------------------------------------------------------- AdamW, lr_cosine_schedule
class AdamW(torch.optim.Optimizer):
    """Gradient descent, θ ← θ - η · g, made to work well: Adam with decoupled weight decay.

    For a parameter θ with gradient g, in its step t = 1, 2, …, at the learning rate η:

        θ ← θ - η · λ · θ              weight decay, with λ = weight_decay
        m ← β₁ · m + (1 - β₁) · g      running mean of the gradient
        v ← β₂ · v + (1 - β₂) · g²     running mean of its square
        m̂ = m / (1 - β₁ᵗ)
        v̂ = v / (1 - β₂ᵗ)
        θ ← θ - η · m̂ / (√v̂ + ε)

    m and v start at 0, so at first they are too small: after one step m is (1 - β₁) · g. Divided by 1 - β₁ᵗ
    it is g. The mean m̂ smooths out the noise of single batches. Some parameters have gradients a thousand
    times larger than others; divided by √v̂, their typical size, all of them take steps of about η. Weight
    decay pulls each weight towards 0 unless the data keeps pushing it away; this curbs overfitting.
    It is decoupled: not a part of g, so √v̂ does not rescale it.
    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101.

    The gains of RMSNorm belong near 1, not 0, so they get a group of parameters without decay:

        matrices = [p for p in model.parameters() if p.ndim > 1]
        gains = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = AdamW([{"params": matrices}, {"params": gains, "weight_decay": 0.0}], lr=3e-3)

    The state has the layout of torch.optim.AdamW, and each loads the other's state_dict. The defaults are
    usual for language models; torch's are betas=(0.9, 0.999) and weight_decay=0.01. If lr is a 0-d tensor, a
    compiled step is not compiled again when it changes. Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):
        if not lr >= 0:
            raise ValueError(f"lr is {lr}; it must be at least 0")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas are {betas}; each must be at least 0 and below 1")
        if not eps >= 0:
            raise ValueError(f"eps is {eps}; it must be at least 0")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; it must be at least 0")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient; return the loss of closure(), if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = group["lr"]
            eps = group["eps"]
            decay = 1 - lr * group["weight_decay"]
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.zeros((), device=param.device)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                g = param.grad
                t = state["step"]
                m = state["exp_avg"]
                v = state["exp_avg_sq"]
                t += 1  # in place, as all that follows: t, m and v are the state
                param.mul_(decay)
                m.lerp_(g, 1 - beta1)  # m + (1 - β₁) · (g - m)
                v.lerp_(g * g, 1 - beta2)
                # Stacked, so that a compiled step computes the powers once, not anew for every weight.
                bias_correction1, bias_correction2 = 1 - torch.stack((beta1**t, beta2**t))
                m_hat = m / bias_correction1
                v_hat = v / bias_correction2
                param.sub_(lr * m_hat / (v_hat.sqrt() + eps))
        return loss


def lr_cosine_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of update `step`, counted from 1: a line up, half a cosine down, then constant.

    Why warm up? AdamW's running means start from a few batches, and a large step in such an uncertain
    direction can do damage that takes long to repair. Why go down? Large steps jump around a minimum; small
    ones settle in.
    Source: Loshchilov and Hutter, "SGDR", 2016, arXiv:1608.03983, equation 5.
    """
    # 1. Warm-up: a line from 0 to max_lr.
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    # 2. From the last step on: min_lr.
    if step >= total_steps:
        return min_lr
    # 3. In between: half a cosine from max_lr down to min_lr.
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------------- MemmapTokenDataset
def shuffled(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of 0 … n-1, fixed by seed and epoch: its entries at `positions` (B,), int64.

    A first reader may skip how. The permutation is computed, only at the positions asked for, because a
    stored one would grow with the file. Each step of the scrambling can be undone, so no two positions get
    the same result. It permutes 0 … 2^bits - 1; what lands beyond n - 1 is scrambled again until it does not
    ("cycle walking", Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    keys = np.random.SeedSequence((seed, epoch)).generate_state(6, np.uint64).reshape(3, 2)
    bits = (n - 1).bit_length()
    mask = np.uint64(2**bits - 1)
    half = np.uint64((bits + 1) // 2)
    result = positions.astype(np.uint64)
    outside = np.full(len(result), True)
    while outside.any():
        x = result[outside]
        for add, multiply in keys:
            x = (x + add) * (multiply | np.uint64(1)) & mask  # odd, because only odd factors can be undone
            x = x ^ (x >> half)
        result[outside] = x
        outside = result >= n
    return result.astype(np.int64)


class MemmapTokenDataset(torch.utils.data.Dataset):  # needs: shuffled
    """Training examples from a file of token ids: one integer after another, nothing else.

    The file is cut into windows of T = context_length tokens. Window i is a pair: x holds the T tokens from
    number i · T on, and y holds the token that follows each of them. One pass over all windows, in shuffled
    order, is called an epoch. The file is mapped into memory: the operating system reads only the parts that
    are used, so the file may be larger than memory.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        context_length: int,
        dtype: np.dtype | str,
        vocab_size: int | None = None,
    ):
        """dtype: the type of the file's integers, unsigned and little-endian, such as "uint16".
        vocab_size: if given, tokens from vocab_size on are refused when they are read.

        Raises OSError if the file cannot be read, ValueError if it is too short or not of this dtype.
        """
        self.path = Path(path)
        self.context_length = context_length
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype.kind != "u":
            raise ValueError(f"dtype is {self.dtype.name}; it must be an unsigned integer")
        self.vocab_size = vocab_size
        size = self.path.stat().st_size
        if size % self.dtype.itemsize != 0:
            raise ValueError(f"{path}: {size:,} bytes are not a whole number of {self.dtype.name} tokens")
        row_length = context_length + 1  # a window, and the token after it
        count = size // self.dtype.itemsize
        if count < row_length:
            raise ValueError(f"{path}: {count:,} tokens are fewer than context_length + 1 = {row_length}")
        self.tokens = np.memmap(self.path, self.dtype, mode="r")
        # rows[i] is the window that begins at token i, and the token after it: with T = 3, the tokens 0 … 5
        # give the rows [0 1 2 3], [1 2 3 4] and [2 3 4 5]. This is a view of the file: nothing is copied.
        self.rows = np.lib.stride_tricks.sliding_window_view(self.tokens, row_length)

    def __reduce__(self):
        # pickle would copy the whole file to each worker of a DataLoader; let them open it themselves.
        return type(self), (self.path, self.context_length, self.dtype, self.vocab_size)

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context_length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Window `index` → (x, y), each (T,), int64. Raises IndexError outside 0 … len-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no window {index}: {self.path} has {len(self)}")
        x, y = self.windows([index])
        return x[0], y[0]

    def windows(self, indices: np.ndarray | list[int]) -> tuple[Tensor, Tensor]:
        """The windows with these indices (B,) → (x, y), each (B, T), int64. Raises as `read` does."""
        return self.read(np.asarray(indices) * self.context_length)

    def read(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """The windows that begin at the tokens `starts` (B,) → (x, y), each (B, T), int64.

        Raises ValueError for a token that is not below vocab_size.
        """
        rows = self.rows[starts]  # (B, T + 1)
        if self.vocab_size is not None and rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            raise ValueError(
                f"{self.path}: token {starts[row] + column:,} is {rows[row, column]}, "
                f"but the vocabulary has {self.vocab_size} entries; prepare the file again"
            )
        x = torch.from_numpy(rows[:, :-1].astype(np.int64))
        y = torch.from_numpy(rows[:, 1:].astype(np.int64))
        return x, y

    def batch(
        self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Batch number `step`, counted from 0 → (x, y), each (batch_size, T), int64.

        Batches follow one shuffled epoch after another. From the second epoch on, all windows of an epoch
        begin a random number of tokens later, so that the model does not see the same ones again. Batches
        depend on the arguments and the file alone, so an interrupted run continues with the same data. If
        world_size processes train together, process number `rank` gets its batch_size / world_size rows of
        the batch. Raises ValueError for a remainder.
        """
        if batch_size % world_size != 0:
            raise ValueError(f"batch_size {batch_size} does not divide among {world_size} processes")
        share = batch_size // world_size
        first = step * batch_size + rank * share
        epochs, positions = np.divmod(np.arange(first, first + share), len(self))
        starts = []
        for epoch in np.unique(epochs).tolist():  # usually one; two if an epoch ends within this batch
            indices = shuffled(positions[epochs == epoch], len(self), seed, epoch)
            offset = 0
            if epoch > 0:
                offset = np.random.default_rng((seed, epoch)).integers(self.context_length)
            last = len(self.rows) - 1  # the last window ends with the file
            starts.append(np.minimum(indices * self.context_length + offset, last))
        return self.read(np.concatenate(starts))


# ------------------------------------------------------------------------------------------ CheckpointHandler
# The model and its training are complete. What follows stores weights safely and exchanges them with others.


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator:
    """Open a temporary file to write to, and rename it to `path` once it is complete and safe on the disk.

    After a crash at any moment, `path` is the whole old file or the whole new one. Raises OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # of this process alone
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # as when the disk is full
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_plain(value, name: str) -> None:
    """Raise ValueError, naming the entry, for anything but tensors and plain Python values."""
    if type(value) in (dict, OrderedDict, Counter):  # torch's learning rate schedulers hold a Counter
        for key, item in value.items():
            check_plain(key, f"the key {key!r} of {name}")
            check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{name}[{i}]")
    elif type(value) not in (Tensor, nn.Parameter, str, bytes, int, float, bool, type(None)):
        raise ValueError(f"{name} is a {type(value).__name__}, neither a tensor nor a plain Python value")


class CheckpointHandler:  # needs: atomic_write, check_plain
    """Saves and loads dictionaries of tensors and plain values, such as the state of a training run.

    A file appears whole or not at all, damage to it is noticed, and loading it never runs code. It is what
    torch.save writes, followed by the CRC-32 of that, 4 bytes, little-endian. torch.load reads it too.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def save(self, name: str, state: dict) -> None:
        """Write folder/name. The old file stays until the new one is safe on the disk.

        Raises ValueError if `check_plain` does, OSError if the file cannot be written.
        """
        check_plain(state, "state")
        with atomic_write(self.folder / name) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch wraps the OSError of a full disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            file.write(self.crc32(file, file.tell()))

    def load(self, name: str, map_location: str | torch.device = "cpu") -> dict:
        """Read folder/name. Raises ValueError if it is damaged, OSError if it cannot be read."""
        path = self.folder / name
        with open(path, "rb") as file:
            size = os.path.getsize(path) - 4
            if size < 0 or self.crc32(file, size) != file.read(4):
                raise ValueError(
                    f"{path}: damaged, or not written by CheckpointHandler.save: "
                    "it does not end with the CRC-32 of its content"
                )
        try:
            # weights_only: data, never code. mmap: the tensors are not copied into memory of their own.
            return torch.load(path, map_location=map_location, weights_only=True, mmap=True)
        except Exception as error:  # of many types: the file is undamaged, but something else wrote it
            raise ValueError(f"{path}: not a checkpoint ({type(error).__name__})") from error

    @staticmethod
    def crc32(file, size: int) -> bytes:
        """The CRC-32 of the first `size` bytes; the file then stands behind them."""
        file.seek(0)
        crc = 0
        for start in range(0, size, 2**20):
            crc = zlib.crc32(file.read(min(2**20, size - start)), crc)
        return crc.to_bytes(4, "little")


def model_from_state_dict(config: ModelConfig, state: dict[str, Tensor]) -> TransformerLM:
    # needs: ModelConfig, TransformerLM and its needs
    """A model that holds the tensors of a state dict themselves: no copies, in the dtype that they have.

    Raises ValueError if they do not fit the config.
    """
    with torch.device("meta"):  # without memory, and without drawing initial values
        model = TransformerLM(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # in one line
        raise ValueError(f"the weights do not fit the config: {reason}") from None
    if config.tie_embeddings:  # loading has made two parameters of the one
        model.embed_tokens.weight = model.lm_head.weight
    for module in model.modules():
        if isinstance(module, RoPE):  # no state dict holds its tables
            module.to_empty(device="cpu").reset_parameters()
    return model


# ----------------------------------------------------------------------------------------------- Hugging Face
# The fields of a Llama's config.json: their names, ours, and the value where a config.json leaves the field
# out.
LLAMA_SHAPE = [
    ("vocab_size", "vocab_size", 32000),
    ("max_position_embeddings", "context_length", 2048),
    ("hidden_size", "d_model", 4096),
    ("num_hidden_layers", "num_layers", 32),
    ("num_attention_heads", "num_heads", 32),
    ("num_key_value_heads", "num_kv_heads", None),
    ("intermediate_size", "d_ff", 11008),
    ("rms_norm_eps", "norm_eps", 1e-6),
    ("tie_word_embeddings", "tie_embeddings", False),
]
# Fields that would change what the model computes, and the one value that this model supports.
LLAMA_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "is_causal": True,
    "partial_rotary_factor": 1.0,
}
# Mistral is a Llama that looks back at most sliding_window tokens, and has other values for missing fields.
MISTRAL_DEFAULTS = {
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def save_pretrained(model: TransformerLM, folder: str | os.PathLike, eos_id: int | None = None) -> None:
    # needs: atomic_write, LLAMA_SHAPE, TransformerLM and its needs
    """Write a folder that Hugging Face's transformers loads as LlamaForCausalLM, in the model's dtype.

    Needs the package safetensors. Raises OSError if a file cannot be written.
    """
    import safetensors.torch

    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    for theirs, ours, _ in LLAMA_SHAPE:
        fields[theirs] = getattr(model.config, ours)
    fields["rope_theta"] = model.config.rope_theta
    if model.config.rope_scaling is not None:
        fields["rope_scaling"] = {"rope_type": "llama3", **model.config.rope_scaling}
    fields["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    fields["bos_token_id"] = None
    fields["eos_token_id"] = eos_id
    weights = {}
    for name, weight in model.named_parameters():
        weights[name if name == "lm_head.weight" else f"model.{name}"] = weight
    with atomic_write(Path(folder, "model.safetensors")) as file:
        file.write(safetensors.torch.save(weights, {"format": "pt"}))
    with atomic_write(Path(folder, "config.json")) as file:
        file.write(json.dumps(fields, indent=2).encode())


def rope_config(fields: dict) -> dict:
    # needs: ROPE_SCALING
    """The fields of ModelConfig about RoPE, from those of a config.json, which has two spellings of them."""
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"RoPE of type {rope_type!r} is not supported, only 'default' and 'llama3'")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; only 1 is supported")
    config = {"rope_theta": rope.get("rope_theta", fields.get("rope_theta", 10000.0))}
    if rope_type == "llama3":
        rope.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings", 2048))
        config["rope_scaling"] = {name: rope.get(name) for name in ROPE_SCALING}
    return config


def llama_config(fields: dict, changes: dict) -> ModelConfig:
    # needs: ModelConfig and its needs, LLAMA_SHAPE, LLAMA_FIXED, MISTRAL_DEFAULTS, rope_config
    """The ModelConfig of the fields of a config.json. Raises ValueError if this model cannot do the same."""
    model_type = fields.get("model_type")
    if model_type not in ("llama", "mistral"):
        raise ValueError(f"model_type is {model_type!r}; only 'llama' and 'mistral' are supported")
    if model_type == "mistral":
        fields = {**MISTRAL_DEFAULTS, **fields}
    for name, supported in LLAMA_FIXED.items():
        if fields.get(name) not in (None, supported):
            raise ValueError(f"{name} is {fields[name]!r}; only {supported!r} is supported")

    shape = {}
    for theirs, ours, default in LLAMA_SHAPE:
        shape[ours] = fields.get(theirs, default)
    config = ModelConfig(**{**shape, **rope_config(fields), **changes})
    if fields.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"head_dim is {fields['head_dim']}; only d_model / num_heads is supported")
    window = fields.get("sliding_window")
    if model_type == "mistral" and window is not None and window < config.context_length:
        raise ValueError(f"sliding_window is {window}; it must be null, or at least the context length")
    return config


def pretrained_config(folder: str | os.PathLike, **changes) -> ModelConfig:
    # needs: ModelConfig, llama_config and its needs
    """The shape of the model in a Hugging Face folder; `changes` replace fields of ModelConfig.

    Fields of config.json that do not change what LlamaForCausalLM computes are ignored. Raises OSError if the
    file cannot be read, ValueError if it asks for something that this model does not do.
    """
    path = Path(folder, "config.json")
    text = path.read_text(encoding="utf-8")
    try:
        return llama_config(dict(json.loads(text)), changes)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the config of a supported model: {error}") from None


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The safetensors files of a Hugging Face folder: one, or several that an index names.

    Raises OSError if the index cannot be read, ValueError if it is damaged.
    """
    single = Path(folder, "model.safetensors")
    index = Path(folder, "model.safetensors.index.json")
    if single.exists() or not index.exists():
        return [single]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index}: not an index of safetensors files ({error!r})") from None
    return [Path(folder, name) for name in sorted(names)]


def load_pretrained(
    folder: str | os.PathLike, dtype: torch.dtype = torch.float32, **changes
) -> TransformerLM:
    # needs: model_from_state_dict and its needs, pretrained_config and its needs, weight_files
    """The Llama in a Hugging Face folder, its weights in this dtype; `changes` as in `pretrained_config`.

    Needs the package safetensors. Weights that have this dtype already stay in the file, from which the
    operating system reads what is used. Raises OSError if a file cannot be read, ValueError if the model
    cannot be built from it.
    """
    import safetensors.torch

    config = pretrained_config(folder, **changes)
    state = {}
    for path in weight_files(folder):
        try:
            weights = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
        for name, weight in weights.items():
            if not name.endswith("inv_freq"):  # older files hold RoPE's frequencies too
                state[name.removeprefix("model.")] = weight.to(dtype)
    if config.tie_embeddings and "embed_tokens.weight" in state:
        embedding = state["embed_tokens.weight"]
        if not torch.equal(state.get("lm_head.weight", embedding), embedding):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding"
            )
        state["lm_head.weight"] = embedding
    try:
        return model_from_state_dict(config, state)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
