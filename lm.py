"""A Llama-style language model in one file: the model, its optimizer, its data and its checkpoints.

A language model reads a sequence of tokens: integers that stand for pieces of text. In the simplest case each
byte is a token. At each position the model predicts which token comes next, from the token at that position
and those before it, never from later ones. So one pass over T tokens makes T predictions.

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

The letters name the dimensions, here and in every shape below:
    B  batch: how many sequences are processed side by side
    T  time: how many tokens a sequence has
    D  d_model: how many numbers, called features, describe a token inside the model
    V  vocabulary: how many different tokens there are
Attention adds H, K, G and S; they are explained there.

The embedding turns each token into a vector of D numbers. These vectors x are called the residual stream: a
block does not replace them, it adds something (a residual) to them, twice. First attention adds to each
token's vector what it collects from the token itself and from earlier ones. Then the feed-forward network,
SwiGLU, adds what it computes from each vector on its own. Both read a copy of x that RMSNorm has rescaled.

The last Linear turns each vector into V logits: a number z_i for every token i that might come next. Softmax,
exp(z_i) / Σ_j exp(z_j), turns them into probabilities. The loss is the mean of -ln(probability of the true
next token). It is called the cross-entropy, and measured in nats, the unit of the natural logarithm. A blind
guess costs -ln(1/V) = ln(V), which is 5.5 nats for the 256 tokens that bytes make.

Training changes the model's weights, the numbers in its matrices and tables, so that the loss falls.

This trains a small model on the text of this very file, in less than a minute:

    import torch
    from lm import AdamW, MemmapTokenDataset, ModelConfig, TransformerLM, lr_cosine_schedule

    torch.manual_seed(0)  # the same random numbers in every run
    config = ModelConfig(vocab_size=256, context_length=64, d_model=64, num_layers=2, num_heads=4)
    model = TransformerLM(config)
    dataset = MemmapTokenDataset("lm.py", context_length=64, dtype="uint8")  # each byte of lm.py is a token
    optimizer = AdamW(model.parameters(), lr=0.0, weight_decay=0.0)  # lr, the learning rate: set below

    for step in range(500):
        # The learning rate says how far to move. It warms up from 0 for 50 steps, then decays to 0.
        for group in optimizer.param_groups:  # where an optimizer keeps its settings
            group["lr"] = lr_cosine_schedule(step, max_lr=3e-3, min_lr=0.0, warmup_steps=50, total_steps=500)
        tokens, targets = dataset.batch(step, batch_size=8, seed=0)  # targets: the token after each token
        loss = model(tokens, targets)  # the forward pass: torch records each operation
        # The backward pass computes, by the chain rule, the gradient of each weight: how the loss changes
        # with it. torch keeps it in weight.grad.
        loss.backward()
        optimizer.step()  # move each weight a little, against its gradient
        optimizer.zero_grad()  # forget the gradients
        if step % 100 == 0 or step == 499:
            print(f"step {step}: loss {loss.item():.2f}")

    prompt = torch.tensor([list(b"def ")])  # (1, 4): a batch of one sequence
    text = model.generate(prompt, max_new_tokens=100)  # 100 times: draw a token, append it
    print(bytes(text[0].tolist()).decode(errors="replace"))

The loss begins at 5.8, above 5.5: the first logits are random, and preferring random tokens is worse than
preferring none. It falls below 2: the true next byte then typically has a probability of exp(-2), 14 percent.

Each class and function can be copied into another project, together with what it names.
"""

import math
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------ Linear, Embedding
class Linear(nn.Module):
    """A linear map without bias, y = x Wᵀ: vectors are rows, and W has a row of weights for each output.

    The weights start random: equal rows would get equal gradients and stay equal. How large? Each output is a
    sum of d_in independent terms, weight times input, so its variance is d_in times that of one term: weights
    of variance 1 / d_in keep the scale of the inputs. In the backward pass the gradient of each input is a
    sum of d_out terms, so 1 / d_out would keep its scale. 2 / (d_in + d_out) is the compromise.
    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    2010, equation 12.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        std = math.sqrt(2 / (d_in + d_out))
        self.weight = nn.Parameter(std * torch.randn(d_out, d_in))  # nn.Parameter: a tensor to be trained

    def forward(self, x: Tensor) -> Tensor:  # linear(x) calls linear.forward(x), as in all modules of torch
        """(..., d_in) → (..., d_out), where ... is any number of dimensions."""
        return x @ self.weight.T


class Embedding(nn.Module):
    """A table with one learned vector of D numbers for each token of the vocabulary.

    Their numbers start with variance 1, so that what the blocks add at first is not large beside them.
    """

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        """Integers from 0 to V-1 (...) → their rows of the table (..., D)."""
        return F.embedding(tokens, self.weight)  # self.weight[tokens]


# ---------------------------------------------------------------------------------------------------- RMSNorm
class RMSNorm(nn.Module):
    """y = g · x / √(mean(x²) + ε): scale each vector to root mean square 1, then each feature by a gain g.

    What the blocks add to the residual stream changes its scale, from block to block and in the course of
    training. Attention and feed-forward learn best if their input keeps its scale, so each has an RMSNorm
    before it, and so has the last map, to logits. The gains are learned; ε only prevents division by 0.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D) of the same dtype."""
        x32 = x.float()  # in 16 bits the squares would overflow, or their mean lose digits
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)  # rsqrt(a) = 1 / √a
        return (x32 * scale * self.weight).type_as(x)


# -------------------------------------------------------------------------------------------------- Attention
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each token collects information from itself and the tokens before it: softmax(q kᵀ / √K + mask) v.

    Three linear maps turn the vector of each token into three others, of K numbers each: a query q (what the
    token looks for), a key k (what it offers) and a value v (what it passes on). The dot product of a query
    and a key is their score: how well they match. For each query, softmax turns the scores into attention
    weights, which are at least 0 and sum to 1. The result is the mean of the values, weighted by these. So in
    "the cat slept because it", the query of "it" may match the key of "cat", whose value then flows to "it".
    What to look for is learned: the three maps are trained, the attention weights are computed for each text.

    A token must not see later ones: they are what it has to predict. So the causal mask adds -inf to their
    scores, and softmax makes their weights 0. For T = 3, with a row for each query and a column for each key:

        0  -inf  -inf
        0     0  -inf
        0     0     0

    Why √K? If q and k hold independent numbers of mean 0 and variance 1, each of the K products that a score
    sums has variance 1, so the score has variance K. Divided by √K it has 1. Larger scores would give nearly
    all weight to a single token; a small change of a score then changes almost nothing, and learning stalls.

    This happens H times side by side, in "heads". For q, k and v of shape (B, H, T, K), the function computes

        mask = torch.full((T, T), -math.inf).triu(1)  # triu(1): keep what is above the diagonal, else 0
        scores = q @ k.mT / math.sqrt(K) + mask  # (B, H, T, T); k.mT is k with its last two axes swapped
        y = scores.softmax(dim=-1) @ v  # (B, H, T, K)

    It leaves this to torch, which does it in one piece and need not hold all T · T scores in memory. It also
    takes two cases that are explained later: G < H heads of keys and values (see MultiheadSelfAttention), and
    T = 1 query, that of a new token, for the keys of all S tokens so far (see KVCache).

    q (B, H, T, K), k and v (B, G, S, K) → (B, H, T, K). Raises ValueError unless T is S or 1.
    Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, equation 1.
    """
    H, T = q.shape[1:3]
    G, S = k.shape[1:3]
    if T != S and T != 1:
        raise ValueError(f"{T} queries for {S} keys: the causal mask is for as many queries as keys, or one")
    is_causal = T > 1  # a single query is that of the last token, which may see all
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=G < H)


# ------------------------------------------------------------------------------------------------------- RoPE
class RoPE(nn.Module):
    """Rotary position embedding: tell attention where tokens stand, by rotating queries and keys.

    Without it, a score does not depend on where the two tokens stand. To a layer of attention, the tokens
    before a word are an unordered set: in "dog bites man" and "bites dog man", man would see the same.

    RoPE takes the K features of a query or a key in pairs, and sees each pair (x1, x2) as a point in a plane.
    For a token at position t it turns the point by an angle a that is proportional to t:

        x1' = x1 · cos a - x2 · sin a
        x2' = x2 · cos a + x1 · sin a

    If a query and a key are both turned by the same angle, their dot product stays the same. Turn both back
    by the key's angle: the key is not turned any more, and the query by the difference of the angles. So the
    score depends on how far apart the two tokens are. Values are not rotated: only scores need the distance.

    The pairs turn at different speeds. If K is 4, the first pair turns by a = t radians, which tells
    neighbours apart, and the second by a = t / 100, for long distances. In general, with theta = 10,000,

        a = t · theta^(-2j/K) for pair j = 0 … K/2 - 1

    Pair j is feature j of the first half of the features and feature j of the second half, as in Hugging
    Face's Llama. The paper pairs neighbours, features 2j and 2j + 1 ("interleaved"). Both are the same method
    with the features in another order, but weights trained with one do not work with the other.
    Source: Su et al., "RoFormer", 2021, arXiv:2104.09864.
    """

    def __init__(self, head_dim: int, context_length: int, theta=10000.0, scaling: dict | None = None):
        """scaling: the arguments of `scale_frequencies`, for models made with it; None: as above."""
        super().__init__()
        self.context_length = context_length
        position = torch.arange(context_length, dtype=torch.float32)
        two_j = torch.arange(0, head_dim, 2, dtype=torch.float32)
        frequency = theta ** (-two_j / head_dim)  # radians per token, (K/2,)
        if scaling is not None:
            frequency = scale_frequencies(frequency, **scaling)
        angle = torch.outer(position, frequency)  # (context_length, K/2)
        # Buffers move with the model to another device; persistent=False keeps them out of checkpoints.
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotate the queries or keys x (..., T, K) of positions start … start + T-1 → (..., T, K).

        Raises ValueError for positions beyond context_length.
        """
        end = start + x.shape[-2]
        if end > self.context_length:
            raise ValueError(f"{end} tokens are more than the context_length of {self.context_length}")
        cos = self.cos[start:end].type_as(x)  # (T, K/2): the same for all sequences and heads
        sin = self.sin[start:end].type_as(x)
        x1, x2 = x.chunk(2, dim=-1)  # the first half of the features and the second
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


# ------------------------------------------------------------------------------------- MultiheadSelfAttention
class MultiheadSelfAttention(nn.Module):
    """H attentions side by side, called heads, each with queries, keys and values of its own.

    One attention gives one set of weights to each token, so it looks for one thing at a time. H heads look
    for H things. Each has only K = D / H features, so together they cost as much as one with D. A last linear
    map mixes their results. Self-attention: queries, keys and values come from the same sequence.

    With G < H heads of keys and values, each of them serves H / G heads of queries. That saves weights, and
    memory in generation, and is called grouped-query attention.
    Source: Ainslie et al., "GQA", 2023, arXiv:2305.13245.
    """

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int, rope: RoPE):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = d_model // num_heads
        self.q_proj = Linear(d_model, num_heads * self.head_dim)
        self.k_proj = Linear(d_model, num_kv_heads * self.head_dim)
        self.v_proj = Linear(d_model, num_kv_heads * self.head_dim)
        self.o_proj = Linear(num_heads * self.head_dim, d_model)
        self.rope = rope  # holds no weights: all layers share one

    def forward(self, x: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """x (B, T, D) → (B, T, D). The cache is for generation: see KVCache."""
        B, T, D = x.shape
        # Split the features into heads, and move the heads before the tokens: each head works on its own.
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, K)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, K)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        start = 0 if cache is None else cache.length  # the position of the first token; 0 in training
        q = self.rope(q, start)
        k = self.rope(k, start)
        if cache is not None:
            k, v = cache.append(k, v)  # those of all S tokens so far, (B, G, S, K)
        y = attention(q, k, v)  # (B, H, T, K)
        y = y.transpose(1, 2).reshape(B, T, D)  # join the heads again
        return self.o_proj(y)


# ----------------------------------------------------------------------------------------------------- SwiGLU
class SwiGLU(nn.Module):
    """The feed-forward network: y = (silu(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ, for each vector x on its own.

    Attention moves information from token to token, but only averages it. The feed-forward does not look at
    other tokens. It computes, on what each token has collected, something that no linear map can. W_up makes
    d_ff features out of D, a gate switches each of them off or scales it, and W_down maps back to D. The gate
    is silu(x W_gateᵀ), where silu(z) = z / (1 + e⁻ᶻ) is close to 0 if z is far below 0, and close to z if z
    is far above; ⊙ multiplies feature by feature. A plain network, relu(x W_upᵀ) W_downᵀ, usually has d_ff =
    4 D; with three matrices 8/3 D costs the same.
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
class TransformerBlock(nn.Module):
    """One layer of the model: x ← x + attention(norm(x)), then x ← x + feed-forward(norm(x)).

    The two terms that are added are called branches. The norm stands before each branch ("pre-norm"), never
    on the residual stream between two blocks. The derivative of x + f(norm(x)) is 1 plus that of the branch,
    and the 1 carries the gradient undamped to the first layer. So deep models train stably.
    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, arXiv:2002.04745.

    In training, dropout sets each number that a branch adds to zero with probability p, and divides the rest
    by 1 - p, so that the mean stays. The model then cannot rely on any single feature, which helps if it
    would otherwise memorize a small text.

    The parts have the names of Hugging Face's Llama: mlp is the feed-forward, and post_attention_layernorm
    the RMSNorm before it.
    """

    def __init__(self, d_model, num_heads, num_kv_heads, d_ff, rope, norm_eps=1e-5, dropout=0.0):
        """Sizes; rope, the RoPE that all blocks share; norm_eps, RMSNorm's ε; dropout, the probability p."""
        super().__init__()
        self.input_layernorm = RMSNorm(d_model, norm_eps)
        self.self_attn = MultiheadSelfAttention(d_model, num_heads, num_kv_heads, rope)
        self.post_attention_layernorm = RMSNorm(d_model, norm_eps)
        self.mlp = SwiGLU(d_model, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cache))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x


# ------------------------------------------------------------------------------------- KVCache, sample_token
class KVCache:
    """Keeps the keys and values of one layer while text is generated.

    To generate text, predict the next token, append it, and predict again. A token sees only itself and
    earlier ones, so its keys and values do not change when text is added after it: compute them once and keep
    them. Its query is needed once, for its own prediction. So the model reads only the new token each time.
    """

    def __init__(self):
        self.length = 0  # tokens held so far
        self.keys = None  # (B, G, length, K), rotated already
        self.values = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, G, T, K); return those of all S tokens held now, (B, G, S, K) each."""
        if self.keys is not None:
            k = torch.cat((self.keys, k), dim=2)
            v = torch.cat((self.values, v), dim=2)
        self.keys = k
        self.values = v
        self.length = k.shape[2]
        return k, v


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None) -> Tensor:
    """Draw one token from each row of logits (B, V) → (B,), int64.

    temperature   divides the logits: below 1 makes likely tokens likelier; 0 always takes the likeliest
    top_k         draw only among the k likeliest tokens; None: all
    top_p         draw only among the fewest likeliest tokens that together reach probability p; None: all
                  ("nucleus sampling", Holtzman et al., 2019, arXiv:1904.09751)
    generator     a torch.Generator, the source of the random numbers; None: torch's own

    Example: probabilities (0.5, 0.3, 0.15, 0.05) and top_p = 0.7. The probability before each token is
    (0, 0.5, 0.8, 0.95). Tokens where this is below 0.7 are kept: the first two. They are then drawn with
    probabilities 0.5 / 0.8 and 0.3 / 0.8. Raises ValueError for settings out of range.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if temperature == 0:
        return logits.argmax(dim=-1)

    vocab_size = logits.shape[-1]
    k = vocab_size if top_k is None else min(top_k, vocab_size)
    logits, tokens = logits.float().topk(k)  # (B, k), likeliest first; k = vocab_size sorts them all
    probs = torch.softmax(logits / temperature, dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1); rescales rows to sum to 1
    return tokens.gather(-1, choice).squeeze(-1)  # from the place in the sorted row to the token


# --------------------------------------------------------------------------------- ModelConfig, TransformerLM
@dataclass
class ModelConfig:
    """The shape of a TransformerLM. Raises ValueError for an impossible shape."""

    vocab_size: int
    context_length: int  # the most tokens that the model can look at together
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None  # None: num_heads
    d_ff: int | None = None  # None: 8/3 · d_model, rounded up to a multiple of 8
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # the arguments of scale_frequencies; None: no scaling
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # one matrix as embedding and as last Linear saves V · D weights
    dropout: float = 0.0

    def __post_init__(self):
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if self.d_ff is None:
            self.d_ff = 8 * math.ceil(self.d_model / 3)
        sizes = ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.d_model % (2 * self.num_heads) != 0:
            raise ValueError(
                f"d_model is {self.d_model}; it must be a multiple of 2 * num_heads, {2 * self.num_heads}, "
                "because each head rotates pairs of features"
            )
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}; num_heads must be a multiple of it")


class TransformerLM(nn.Module):
    """The whole model: embedding, num_layers blocks, a norm, and a linear map to logits.

    Its state dict, the dictionary of all weights by name, has the keys of Hugging Face's Llama without the
    prefix `model.`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.config = config
        rope = RoPE(c.d_model // c.num_heads, c.context_length, c.rope_theta, c.rope_scaling)
        self.embed_tokens = Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList()
        for _ in range(c.num_layers):
            block = TransformerBlock(
                c.d_model, c.num_heads, c.num_kv_heads, c.d_ff, rope, c.norm_eps, c.dropout
            )
            self.layers.append(block)
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.lm_head = Linear(c.d_model, c.vocab_size)

        # 2 · num_layers branches add to the residual stream. A sum of n independent terms grows like √n, so
        # divide by that: at the start all of them together add as much as one, however deep the model.
        with torch.no_grad():  # not an operation to be differentiated
            for layer in self.layers:
                layer.self_attn.o_proj.weight /= math.sqrt(2 * c.num_layers)
                layer.mlp.down_proj.weight /= math.sqrt(2 * c.num_layers)
        if c.tie_embeddings:
            # One matrix: a token's row is looked up when the token is read, and multiplied with x to score it
            # as the next one. Logits are sums of d_model terms, so this gives them variance 1. As embeddings
            # the rows are then small beside what the blocks add: the price of sharing.
            nn.init.normal_(self.lm_head.weight, std=1 / math.sqrt(c.d_model))
            self.embed_tokens.weight = self.lm_head.weight

    def forward(self, tokens, targets=None, caches=None) -> Tensor:
        """tokens (B, T), int64, T ≤ context_length → logits (B, T, V) of the token after each.

        With targets (B, T), int64, the true next tokens → the mean cross-entropy in nats, (), float32. A
        target of -100, as F.cross_entropy has it, is left out of the mean.

        With caches, a list of one KVCache for each layer, tokens are those that follow what the caches hold →
        logits (B, 1, V) of the token after the last.
        """
        if caches is None:
            caches = [None] * len(self.layers)
        x = self.embed_tokens(tokens)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache)
        if caches[0] is not None:
            x = x[:, -1:]  # in generation, only the last prediction is needed
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())  # of B · T predictions

    def generate(
        self, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_id=None, generator=None
    ) -> Tensor:
        """prompt (B, P), int64 → prompt and continuation, (B, P + new). The arguments are those of `stream`.

        It draws one token after another. In its plainest form, which reads all tokens anew each time and ends
        at context_length, that is

            tokens = prompt
            for _ in range(max_new_tokens):
                token = sample_token(model(tokens)[:, -1])  # [:, -1]: the prediction at the last position
                tokens = torch.cat((tokens, token[:, None]), dim=1)
        """
        tokens = [prompt]
        for token in self.stream(prompt, max_new_tokens, temperature, top_k, top_p, eos_id, generator):
            tokens.append(token[:, None])
        return torch.cat(tokens, dim=1)

    @torch.no_grad()
    def stream(
        self, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_id=None, generator=None
    ) -> Iterator[Tensor]:
        """Continue a prompt of P tokens, (B, P), int64: yield one token for each row, (B,), at a time.

        The settings are those of `sample_token`. A row that has drawn eos_id ("end of sequence") repeats it;
        when all rows have, generation ends. Call model.eval() first, or dropout acts.
        """
        context_length = self.config.context_length
        window = prompt[:, -context_length:]  # the tokens that the model sees
        caches = [KVCache() for _ in self.layers]  # what it has read of them
        finished = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)  # which rows have ended
        for _ in range(max_new_tokens):
            # A full cache cannot drop its first token: the keys and values of the others were computed from
            # vectors that had collected from it. So read the end of the window again, from position 0; half
            # of it, so that this is rare.
            if window.shape[1] > context_length:
                window = window[:, -max(1, context_length // 2) :]
                caches = [KVCache() for _ in self.layers]
            unread = window[:, caches[0].length :]  # first the whole window, then one token at a time
            logits = self.forward(unread, caches=caches)[:, -1]  # self(…), if compiled, would recompile
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if eos_id is not None:
                token = token.masked_fill(finished, eos_id)
                finished = finished | (token == eos_id)
            yield token
            if eos_id is not None and finished.all():
                return
            window = torch.cat((window, token[:, None]), dim=1)


# ------------------------------------------------------------------------------------------- Llama 3.1's RoPE
def scale_frequencies(
    frequency, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
) -> Tensor:
    """Change the frequencies of RoPE (K/2,) for a longer context, as Llama 3.1 does.

    Llama 3.1 was trained on L = original_max_position_embeddings tokens, and then made to read more. A slow
    pair would reach angles there that it has never had. So a pair that turns less than low_freq_factor times
    within L tokens becomes `factor` times slower. One that turns more than high_freq_factor times knows all
    angles, and stays. In between the two are mixed.
    Source: Meta, llama-models, 2024, `apply_scaling`. The arguments, all numbers, have Hugging Face's names.
    """
    turns = original_max_position_embeddings * frequency / (2 * math.pi)
    stay = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    stay = stay.clamp(0, 1)
    return frequency * (stay + (1 - stay) / factor)


# ---------------------------------------------------------------------------------- AdamW, lr_cosine_schedule
class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay: gradient descent that gives all weights steps of similar size.

    Plain gradient descent is w ← w - η · g, for a weight w with gradient g and the learning rate η. Step t of
    AdamW, t = 1, 2, …, is

        w ← w - η · λ · w              weight decay, with λ = weight_decay
        m ← β₁ · m + (1 - β₁) · g      first moment: the running mean of the gradient
        v ← β₂ · v + (1 - β₂) · g²     second moment: the running mean of its square
        m̂ = m / (1 - β₁ᵗ)
        v̂ = v / (1 - β₂ᵗ)
        w ← w - η · m̂ / (√v̂ + ε)

    m and v start at 0, so at first they are too small: after one step m is (1 - β₁) · g. Divided by 1 - β₁ᵗ
    it is g. The mean m̂ smooths out the noise of single batches. Some weights have gradients a thousand times
    larger than others; divided by √v̂, their typical size, all of them take steps of about η. Weight decay
    pulls each weight towards 0, so that it stays large only if the data keeps pushing it. This curbs
    overfitting. It is decoupled: not a part of g, so √v̂ does not rescale it.
    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101.

    The gains of RMSNorm belong near 1, not 0, so they get a group of parameters without decay:

        decay = [p for p in model.parameters() if p.ndim > 1]  # matrices and the embedding
        no_decay = [p for p in model.parameters() if p.ndim == 1]  # gains
        optimizer = AdamW([{"params": decay}, {"params": no_decay, "weight_decay": 0.0}], lr=3e-3)

    The state has the layout of torch.optim.AdamW, and each loads the other's state_dict. The defaults are
    usual for language models; torch's are betas=(0.9, 0.999) and weight_decay=0.01.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        """params: parameters, or groups of them as above. betas: (β₁, β₂). All others are floats."""
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
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                g = param.grad
                t = state["step"]
                m = state["exp_avg"]
                v = state["exp_avg_sq"]
                t += 1  # in place, as all that follows: t, m and v are the state
                param.mul_(1 - lr * group["weight_decay"])
                m.lerp_(g, 1 - beta1)  # m + (1 - β₁) · (g - m)
                v.lerp_(g * g, 1 - beta2)
                m_hat = m / (1 - beta1**t)
                v_hat = v / (1 - beta2**t)
                param.sub_(lr * m_hat / (v_hat.sqrt() + group["eps"]))
        return loss


def lr_cosine_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of a step, counted from 0: a line up, then half a cosine down.

    With a warm-up it is 0 at step 0, which then only fills AdamW's moments; max_lr at warmup_steps; min_lr
    from total_steps on. (A warm-up that is longer than total_steps is finished first.)

    Why warm up? AdamW's running means start from a few batches, and a large step in such an uncertain
    direction can do damage that takes long to repair. Why go down? Large steps jump around a minimum; small
    ones settle in.
    Source: Loshchilov and Hutter, "SGDR", 2016, arXiv:1608.03983, equation 5.
    """
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    if step >= total_steps:
        return min_lr
    progress = (step - warmup_steps) / (total_steps - warmup_steps)  # from 0 to 1
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------------- MemmapTokenDataset
class MemmapTokenDataset(torch.utils.data.Dataset):
    """Training examples from a file of token ids: one integer after another, nothing else.

    An example is a window of T + 1 tokens in a row, where T = context_length. Its first T are the tokens that
    the model reads, and its last T, the same shifted by one, are the targets: at each place the next token.
    One pass over the windows of the whole text, in random order, is called an epoch.

    The file is mapped into memory ("memmap"): the operating system reads only the parts that are used, so it
    may be larger than memory. dataset[i], for torch's DataLoader, is the i-th of the windows that begin at
    tokens 0, T, 2T, …; training uses `batch`.
    """

    def __init__(self, path: str | os.PathLike, context_length: int, dtype: np.dtype | str):
        """dtype: the type of the file's integers, unsigned and little-endian, such as "uint16".

        Raises OSError if the file cannot be read, ValueError if it holds no window.
        """
        self.context_length = context_length
        self.tokens = np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r")
        self.epoch_key = None  # the epoch whose order `epoch_starts` has drawn and keeps
        self.starts = None
        if len(self) < 1:
            raise ValueError(f"{path}: {len(self.tokens)} tokens are fewer than context_length + 1")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context_length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The window that begins at token index · T → (tokens, targets), each (T,), int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        tokens, targets = self.read([index * self.context_length])
        return tokens[0], targets[0]

    def read(self, starts) -> tuple[Tensor, Tensor]:
        """The windows that begin at these B tokens → (tokens, targets), each (B, T), int64."""
        windows = [self.tokens[start : start + self.context_length + 1] for start in starts]
        windows = torch.from_numpy(np.stack(windows).astype(np.int64))  # (B, T + 1)
        return windows[:, :-1].clone(), windows[:, 1:].clone()  # copies: to change one leaves the other

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Batch number `step`, counted from 0 → (tokens, targets), each (batch_size, T), int64.

        It depends on the arguments and the file alone, so an interrupted run can continue with the same data.
        Raises ValueError as `steps_per_epoch` does.
        """
        epoch, i = divmod(step, self.steps_per_epoch(batch_size))
        starts = self.epoch_starts(epoch, seed)
        return self.read(starts[i * batch_size : (i + 1) * batch_size])

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many full batches an epoch has. Raises ValueError if it has none."""
        num_windows = len(self) - 1  # the random offset of an epoch costs one window
        if num_windows < batch_size:
            raise ValueError(f"an epoch has {num_windows} windows, fewer than the batch_size of {batch_size}")
        return num_windows // batch_size

    def epoch_starts(self, epoch: int, seed: int) -> np.ndarray:
        """Where the windows of an epoch begin, in shuffled order, (len - 1,), int64.

        Each epoch begins a random number of tokens later, so that it cuts the text in other places.
        """
        if self.epoch_key != (epoch, seed):
            rng = np.random.default_rng((seed, epoch))
            offset = rng.integers(self.context_length)
            self.starts = offset + self.context_length * rng.permutation(len(self) - 1)
            self.epoch_key = (epoch, seed)
        return self.starts


# ------------------------------------------------------------------------------ CheckpointHandler, load_model
class CheckpointHandler:
    """Saves and loads checkpoints: dictionaries of tensors and plain values, in torch.save's format.

    A file appears whole or not at all, damage to its content is noticed, and loading it never runs code.

    A checkpoint of a model holds
        model           its state dict
        model_config    the fields of its ModelConfig, a dict
        tokenizer       "bytes", or the text of a tokenizer.json, or None
        eos_id          the token that ends a document ("end of sequence")
    One of a training run also holds
        config          the options of the run, a dict
        step            how many steps it has made
        best_val_loss   the lowest loss so far, in nats, on text that is held out from training
    and, if the run can be resumed from it,
        optimizer, scaler   their state dicts (the scaler is for training in float16)
    """

    @staticmethod
    def save(state: dict, path: str | os.PathLike) -> None:
        """Write a checkpoint. An old file of this name stays until the new one is safe on the disk."""
        temporary = f"{path}.tmp"
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    @staticmethod
    def load(path: str | os.PathLike) -> dict:
        """Read a checkpoint, its tensors on the CPU.

        Raises OSError if the file cannot be read, ValueError if it is not whole or its content is damaged.
        """
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):  # the format of torch.save is a zip file
                raise ValueError(f"{path}: not a checkpoint, or not whole")
            if zipfile.ZipFile(file).testzip() is not None:  # torch does not compare the checksums
                raise ValueError(f"{path}: damaged")
        return torch.load(path, map_location="cpu", weights_only=True)  # data, never code


def load_model(path: str | os.PathLike, dropout: float = 0.0) -> tuple[TransformerLM, dict]:
    """The model of a checkpoint file, in float32 on the CPU, and the whole checkpoint.

    dropout: its probability in training. Raises as CheckpointHandler.load does.
    """
    state = CheckpointHandler.load(path)
    config = ModelConfig(**state["model_config"])
    config.dropout = dropout
    model = TransformerLM(config)
    model.load_state_dict(state["model"])
    return model, state
