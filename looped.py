"""
A looped language model, whole: one stack of transformer blocks run K times, every state decoded and fed back.

    h_0 = embed(idx)                 token and position embeddings
    h_k = step(h_{k-1}, h_0, k)      loop k: the blocks, run on carry(h_{k-1}, h_0, k)
    z_k = readout(h_k, k)            the logits of exit k

The argument of "Dense Supervision Is Not Enough: The Readout Blind Spot in Looped Language Models"
(arXiv:2606.24898): `readout` decides what the loss can see of a state, `carry` what the next loop is fed.
Where the readout hides the norm of h (RMSNorm, LayerNorm) and the recurrence carries it (residual), no exit's
own loss can hold that norm, and training drives it up.

Shapes: B sequences, T positions, C channels (n_embd), V tokens (vocab_size), K loops.
"""

import functools
import math
import numbers
from dataclasses import dataclass, field, fields
from typing import NamedTuple, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

EPS = 1e-6

# ------------------------------------------------------------------------------------------------------------
# The options are three tables. A new row is by itself a new choice of --readout, --recurrence, --supervision.
# A row of the first two makes, from the config, a module or a function of a state.


def cut(h):
    """h. In backward, the part of the gradient g along h is removed: g - (g·h) h / |h|²."""
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True).clamp(min=1e-30)
    # the value is h; for backward it is a constant times h / |h|, which has no gradient along h
    return h * (norm.detach() / norm)


def power_norm(h, alpha):
    """h · RMS(h)^(alpha - 1): the direction of h, and its norm to the power alpha."""
    mean_square = h.square().mean(-1, keepdim=True)
    return h * (mean_square + EPS) ** ((alpha - 1) / 2)


class Damping(nn.Module):
    """sigmoid(a) · h with one learned scalar a."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0))

    def forward(self, h):
        return torch.sigmoid(self.a) * h


# What the unembedding W is fed of h_k: all that cross-entropy can see of it. (.., C) -> (.., C)
READOUTS = {
    'rms':       lambda cfg: nn.RMSNorm(cfg.n_embd, EPS),                  # the direction alone
    'layernorm': lambda cfg: nn.LayerNorm(cfg.n_embd, EPS, bias=False),    # the direction without its mean
    'raw':       lambda cfg: nn.Identity(),                                # everything
    'cut':       lambda cfg: cut,                                # everything, but no gradient to the norm
    'final_rms': lambda cfg: nn.RMSNorm(cfg.n_embd, EPS),        # raw at exits before the last, see `readout`
    'alpha':     lambda cfg: functools.partial(power_norm, alpha=cfg.alpha),    # a dial from blind to raw
}

# What the next loop is fed of h_k. (.., C) -> (.., C)
RECURRENCES = {
    'residual':  lambda cfg: nn.Identity(),                                # the norm is carried, and grows
    'rms':       lambda cfg: nn.RMSNorm(cfg.n_embd, EPS),                  # the norm is removed
    'damped':    lambda cfg: Damping(),                                    # the norm is contracted
}

# The weights of exits 1..K in the loss
SUPERVISIONS = {
    'per_loop':  lambda K: [1 / K] * K,
    'terminal':  lambda K: [0.0] * (K - 1) + [1.0],
}

# ------------------------------------------------------------------------------------------------------------


def flag(default, help: str, choices=(), low=0, high=None, result=True, resume=True):
    """A config field that is also a command-line flag: its meaning, what is allowed, whether it changes the
    result (and so stands in the name of a run), and whether --resume may change it."""
    rules = dict(help=help, choices=choices, low=low, high=high, result=result, resume=resume)
    return field(default=default, metadata=rules)


@dataclass
class LoopedConfig:
    """Everything that makes a model. ValueError names the field, its value and what is allowed."""
    block_size: int = flag(64, 'context length in tokens', low=1, high=2 ** 20)
    vocab_size: int = flag(256, '256 is bytes; 257 to 50257 is that much of the GPT-2 BPE', low=1)
    n_layer: int = flag(2, 'blocks in the stack that is looped', low=1, high=1000)
    n_head: int = flag(4, 'attention heads', low=1, high=2 ** 16)
    n_embd: int = flag(64, 'channels of the state', low=1, high=2 ** 16)
    dropout: float = flag(0.0, 'dropout probability', high=0.999)
    loops: int = flag(8, 'K, how often the stack runs', low=1, high=10_000)
    readout: str = flag('rms', 'what the loss sees of a state', READOUTS)
    alpha: float = flag(0.5, 'for --readout=alpha: 0 is blind to the norm of a state, 1 is raw', high=1)
    recurrence: str = flag('residual', 'what the next loop is fed of a state', RECURRENCES)
    inject: float = flag(0.0, 'how much of h_0 is added to what every loop after the first is fed')
    output_bias: str = flag('none', 'added to the logits of every exit: learned starts at zero, unigram is\n'
                            'the fixed log frequency of each token', ('none', 'learned', 'unigram'),
                            resume=False)
    init: str = flag('torch', "first weights: torch is PyTorch's default, with embeddings N(0, 1);\n"
                     'gpt2 is N(0, 0.02) and smaller updates', ('torch', 'gpt2'), resume=False)
    supervision: str = flag('per_loop', 'where the loss is: at every exit, or at the last', SUPERVISIONS)
    norm_penalty: float = flag(0.0, 'weight of mean(h^2) in the loss')

    def __post_init__(self):
        validate(self)  # at the end of this file
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head ({self.n_head}), got {self.n_embd}')


class Block(nn.Module):
    """x = x + attn(norm(x)); x = x + mlp(norm(x)).  (B, T, C) -> (B, T, C)

    Pre-norm: what is added depends on the direction of x alone, so its size does not depend on the norm of x.
    """

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        C = cfg.n_embd
        self.n_head = cfg.n_head
        self.dropout = cfg.dropout
        self.norm_attn = nn.RMSNorm(C, EPS)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.norm_mlp = nn.RMSNorm(C, EPS)
        # in this order: a seed then gives the very weights that the authors' code starts from
        self.w1 = nn.Linear(C, 4 * C, bias=False)
        self.w2 = nn.Linear(4 * C, C, bias=False)
        self.w3 = nn.Linear(C, 4 * C, bias=False)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, past=None):
        x = x + self.attn(self.norm_attn(x), past)
        x = x + self.mlp(self.norm_mlp(x))
        return x

    def attn(self, x, past):
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)                       # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)                       # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)                       # (B, nh, T, hs)
        if past is not None:  # generation: a list of keys and values of earlier positions, empty at first
            if past:
                k = torch.cat((past[0], k), dim=2)
                v = torch.cat((past[1], v), dim=2)
            past[:] = k, v  # kept for the next call
        causal = q.size(2) == k.size(2)  # otherwise the one new position, which may see everything
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

    def mlp(self, x):
        return self.drop(self.w2(F.silu(self.w1(x)) * self.w3(x)))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each token in nats, in float32 at least; 0 where the target is -100. (B, T, V), (B, T) -> (B, T)"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='none').view_as(targets)


class Output(NamedTuple):
    loss: torch.Tensor | None      # scalar, differentiable
    losses: torch.Tensor | None    # (K,), in terminal training (1,): cross-entropy per exit, detached
    norms: torch.Tensor            # (K,) mean over tokens of the L2 norm of h_k, float32, detached
    logits: torch.Tensor | None    # (B, T, V) of the last loop, without targets


class LoopedGPT(nn.Module):
    """A pre-norm transformer whose one stack of blocks runs `loops` times. LoopedConfig has the options."""

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        self.cfg = cfg
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.n_embd)  # also W, the unembedding
        self.pos_emb = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.recurrence = RECURRENCES[cfg.recurrence](cfg)
        self.exposure = READOUTS[cfg.readout](cfg)  # what `readout` applies before W
        self.output_bias = None
        if cfg.output_bias != 'none':  # train.py fills in the unigram frequencies
            bias = torch.zeros(cfg.vocab_size)
            self.output_bias = nn.Parameter(bias, requires_grad=cfg.output_bias == 'learned')
        self.cross_entropy = cross_entropy  # compile_regions puts a compiled one here
        if cfg.init == 'gpt2':
            self.init_gpt2()

    def init_gpt2(self):
        """N(0, 0.02), and less for what writes into the state, so that all updates together stay small."""
        updates = 2 * self.cfg.n_layer * self.cfg.loops
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writes = name.endswith(('proj.weight', 'w2.weight'))
                nn.init.normal_(p, std=0.02 / math.sqrt(updates) if writes else 0.02)

    # The transition: from one state to the next

    def embed(self, idx: torch.Tensor, start: int = 0) -> torch.Tensor:
        """h_0 of tokens that stand at positions start, start + 1, ... (B, T) -> (B, T, C)"""
        positions = self.pos_emb.weight[start:start + idx.size(1)]
        return self.drop(self.tok_emb(idx) + positions)

    def carry(self, h: torch.Tensor, h_0: torch.Tensor, k: int) -> torch.Tensor:
        """What loop k, counted from 1, is fed: h_0, then of h_{k-1} what the recurrence lets through.
        (B, T, C), (B, T, C) -> (B, T, C)"""
        if k == 1:
            return h_0
        fed = self.recurrence(h)
        if self.cfg.inject:
            fed = fed + self.cfg.inject * h_0
        return fed

    def step(self, h: torch.Tensor, h_0: torch.Tensor, k: int, cache: dict | None = None) -> torch.Tensor:
        """h_k from h_{k-1}: one loop. (B, T, C), (B, T, C) -> (B, T, C)"""
        x = self.carry(h, h_0, k)
        for i, block in enumerate(self.blocks):
            past = None if cache is None else cache.setdefault((k, i), [])
            x = block(x, past)
        return x

    def states(self, idx: torch.Tensor, loops: int | None = None, cache: dict | None = None) -> list:
        """[h_1 .. h_K], each (B, T, C), just as loop k left it, differentiable. idx (B, T) holds token ids;
        `loops` is any depth from 1 on, None the trained one. `cache`, for generation, is an empty dict at
        first, in which keys and values are kept; then give it one new position per call, at the same depth.
        ValueError for anything else."""
        loops = self.cfg.loops if loops is None else loops
        start, depth = 0, loops
        if cache:
            start, depth = cache['positions'], cache['loops']
        T = idx.size(1)
        if not 1 <= start + T <= self.cfg.block_size:
            raise ValueError(f'positions must be 1 to block_size {self.cfg.block_size}, got {start + T}')
        if loops < 1:
            raise ValueError(f'loops must be at least 1, got {loops}')
        if loops != depth or (start and T > 1):
            raise ValueError(f'a cache of {depth} loops goes on at that depth, one position at a time; got '
                             f'{loops} loops and {T} positions')
        h = h_0 = self.embed(idx, start)
        states = []
        for k in range(1, loops + 1):
            h = self.step(h, h_0, k, cache)
            states.append(h)
        if cache is not None:
            cache.update(positions=start + T, loops=loops)
        return states

    # The exposure: from a state to logits, and the loss of them

    def readout(self, h: torch.Tensor, k: int | None = None) -> torch.Tensor:
        """Logits of a state at exit k as it was trained; without k, or from K on, at the last exit.
        (.., C) -> (.., V)"""
        last = k is None or k >= self.cfg.loops
        if last or self.cfg.readout != 'final_rms':
            h = self.exposure(h)
        return F.linear(h, self.tok_emb.weight, self.output_bias)

    def exit_ce(self, h: torch.Tensor, targets: torch.Tensor, k: int | None) -> torch.Tensor:
        """Cross-entropy of each token at exit k. (B, T, C), (B, T) -> (B, T)"""
        return self.cross_entropy(self.readout(h, k), targets)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                loops: int | None = None) -> Output:
        """idx and targets (B, T) -> Output. The loss: cross-entropy at the exits, weighted by supervision,
        plus norm_penalty times the mean of h². The last loop that runs is read through the last exit. Targets
        of -100 are not counted. ValueError: targets of another shape than idx."""
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f'targets must be of shape {list(idx.shape)}, as idx, not {list(targets.shape)}')
        states = self.states(idx, loops)
        norms = torch.stack([h.detach().float().norm(dim=-1).mean() for h in states])
        if targets is None:
            return Output(None, None, norms, self.readout(states[-1]))

        weights = SUPERVISIONS[self.cfg.supervision](len(states))
        counted = (targets != -100).sum()
        loss, losses = 0.0, []
        for k, (h, weight) in enumerate(zip(states, weights), 1):
            if weight == 0 and self.training:  # in eval every exit is reported
                continue
            exit_k = k if k < len(states) else None  # the last loop that runs has the last exit
            ce = self.exit_ce(h, targets, exit_k)                                                     # (B, T)
            loss = loss + weight * ce.sum() / counted
            losses.append(ce.detach().sum() / counted)
        if self.cfg.norm_penalty:
            mean_squares = torch.stack([h.square().mean() for h in states])
            loss = loss + self.cfg.norm_penalty * mean_squares.mean()
        return Output(loss, torch.stack(losses), norms, None)

    # Use

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, max_new_tokens: int, loops: int | None = None,
                 temperature: float = 1.0, top_k: int | None = None) -> torch.Tensor:
        """idx (B, T) and its continuation: (B, T + max_new_tokens). temperature 0 is greedy. model.eval()
        first. Keys and values of every loop and block are kept, so a new token costs one position. Past
        block_size the window slides: every token is at another position, and a new one costs the window."""
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f'temperature must be >= 0 and top_k >= 1, got {temperature} and {top_k}')
        cache = {}
        for _ in range(max_new_tokens):
            if cache and idx.size(1) <= self.cfg.block_size:
                new = idx[:, -1:]
            else:
                new = idx[:, -self.cfg.block_size:]
                cache = {}
            h = self.states(new, loops, cache)[-1]
            logits = self.readout(h[:, -1]).float()                                                  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature < 1e-6:  # 0, or so small that the quotient would overflow
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat((idx, token), dim=1)
        return idx

    def recompute(self):
        """From now on, backward computes loops and exits again, and keeps one state per loop alone."""
        self.step = functools.partial(checkpoint, self.step, use_reentrant=False)
        self.exit_ce = functools.partial(checkpoint, self.exit_ce, use_reentrant=False)

    def compile_regions(self):
        """torch.compile one block, which every layer and loop reuses, and the cross-entropy of logits: what
        is compiled grows neither with n_layer nor with loops, nor when inference runs at another depth."""
        try:
            from torch._functorch import config
            config.ban_recompute_materialized_backward = False  # in bfloat16, 28% less is kept for backward
        except (ImportError, AttributeError):
            pass  # private, so it may go; only memory is lost
        for block in self.blocks:
            block.compile()
        self.cross_entropy = torch.compile(cross_entropy)

    def flops_per_token(self) -> int:
        """Floating-point operations of a training step per token: 6 per weight of a matrix and visit (one run
        of one block), 12·C·T per visit for attention. What is computed again is not counted."""
        C, T, V = self.cfg.n_embd, self.cfg.block_size, self.cfg.vocab_size
        visits = self.cfg.loops * self.cfg.n_layer
        exits = sum(w > 0 for w in SUPERVISIONS[self.cfg.supervision](self.cfg.loops))
        weights = 16 * C * C  # of a block: 4 C² of attention, 12 C² of the mlp
        return visits * (6 * weights + 12 * C * T) + exits * 6 * C * V


def validate(config):
    """ValueError for the first field whose value is not allowed: its name, what is allowed, its value.
    numpy's numbers become plain ones. A field of another type than these four may hold anything."""
    kinds = {int: (numbers.Integral, 'a whole number'), float: (numbers.Real, 'a number'),
             bool: (bool, 'True or False'), str: (str, 'text')}
    types = get_type_hints(type(config))  # not f.type, which may be a string
    for f in fields(config):
        value, kind, rules = getattr(config, f.name), types[f.name], f.metadata
        if kind not in kinds:
            continue
        abstract, allowed = kinds[kind]
        valid = isinstance(value, abstract)
        if kind is not bool and isinstance(value, bool):  # True is an Integral, but no number of loops
            valid = False
        if valid and rules.get('choices'):
            valid = value in rules['choices']
            allowed = f'one of {", ".join(rules["choices"])}'
        elif valid and rules and kind in (int, float):
            high = rules['high'] or (10 ** 9 if kind is int else 1e30)
            valid = rules['low'] <= value <= high
            allowed = f'from {rules["low"]} to {high}'
        if not valid:
            raise ValueError(f'{f.name} must be {allowed}, got {value!r}')
        setattr(config, f.name, kind(value))
