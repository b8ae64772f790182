"""
A looped language model, whole: one stack of transformer blocks run K times, every state decoded and fed back.

    h_0 = embed(idx)                token and position embeddings
    h_k = step(h_{k-1}, h_0, k)     loop k: the blocks, fed h_0 at k = 1 and then carry(h_{k-1}, h_0)
    z_k = readout(h_k, k)           the logits of exit k: W · expose(h_k, k)

The argument of "Dense Supervision Is Not Enough: The Readout Blind Spot in Looped Language Models"
(arXiv:2606.24898): `readout` is what the loss can see of a state, `carry` is what the next loop is fed of it.
Where the readout hides the length of h (RMSNorm, LayerNorm) while the recurrence carries it (residual),
nothing in the loss holds that length, and training drives it up.

Shapes: B sequences, T positions, C channels (n_embd), V tokens (vocab_size), K loops.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Iterator, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

EPS = 1e-6

# ------------------------------------------------------------------------------------------------------------
# The options as three tables. A new row is by itself a new choice of --readout, --recurrence, --supervision.


def power_norm(h, alpha):
    """h · RMS(h)^(alpha - 1): the direction, and the length to the power alpha. (.., C) -> (.., C)"""
    return h * (h.square().mean(-1, keepdim=True) + EPS) ** ((alpha - 1) / 2)


def cut(h):
    """h, whose gradient g becomes g - (g·h) h / |h|²: the part along h is taken out. (.., C) -> (.., C)"""
    length = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return h * (length.detach() / length)  # a factor that is 1, but for its derivative


class Damping(nn.Module):
    """sigmoid(a) · h with one learned scalar a. (.., C) -> (.., C)"""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0))

    def forward(self, h):
        return torch.sigmoid(self.a) * h


READOUTS = {  # what W is fed of h_k; a pair is (the exits before the last, the last exit)
    'rms':       lambda cfg: nn.RMSNorm(cfg.n_embd, EPS),                     # direction only
    'layernorm': lambda cfg: nn.LayerNorm(cfg.n_embd, EPS, bias=False),       # direction without its mean
    'raw':       lambda cfg: nn.Identity(),                                   # everything
    'cut':       lambda cfg: cut,                      # everything in its value, no length in its gradient
    'final_rms': lambda cfg: (nn.Identity(), nn.RMSNorm(cfg.n_embd, EPS)),    # everything; at K, direction
    'alpha':     lambda cfg: lambda h: power_norm(h, cfg.alpha),              # a dial from blind to raw
}

RECURRENCES = {  # what loop k + 1 is fed of h_k
    'residual':  lambda cfg: nn.Identity(),                                   # length is carried, and grows
    'rms':       lambda cfg: nn.RMSNorm(cfg.n_embd, EPS),                     # length is removed
    'damped':    lambda cfg: Damping(),                                       # length is contracted
}

SUPERVISIONS = {  # weights of the exits 1..K in the loss; in training, one of weight 0 is not computed
    'per_loop':  lambda K: [1 / K] * K,
    'terminal':  lambda K: [0.0] * (K - 1) + [1.0],
}

# ------------------------------------------------------------------------------------------------------------


def flag(default, help: str, choices=(), low=0, high=None, result=True):
    """A field that is also a command-line flag: its meaning, what is allowed, and whether it changes the
    result and so stands in a run's name. A plain field will do, too: it allows any value and changes it."""
    high = high or (10 ** 9 if type(default) is int else 1e30)
    rules = dict(help=help, choices=choices, low=low, high=high, result=result)
    return field(default=default, metadata=rules)


@dataclass
class LoopedConfig:
    """Everything that makes a model. ValueError names the field, its value and what is allowed."""
    block_size: int = flag(64, 'context length in tokens', low=1, high=2 ** 20)
    vocab_size: int = flag(256, '256 is bytes; 257 to 50257 is that much of the GPT-2 BPE', low=1, high=50257)
    n_layer: int = flag(2, 'blocks in the stack that is looped', low=1, high=1000)
    n_head: int = flag(4, 'attention heads', low=1, high=2 ** 16)
    n_embd: int = flag(64, 'channels of the state', low=1, high=2 ** 16)
    dropout: float = flag(0.0, 'dropout probability', high=0.999)
    loops: int = flag(8, 'K, how often the stack runs', low=1, high=10_000)
    readout: str = flag('rms', 'what the loss sees of a state', READOUTS)
    alpha: float = flag(0.5, 'for --readout=alpha: 0 is blind to the length of a state, 1 is raw', high=1)
    recurrence: str = flag('residual', 'what the next loop is fed of a state', RECURRENCES)
    inject: float = flag(0.0, 'how much of h_0 is added to what every loop after the first is fed')
    output_bias: str = flag('none', 'added to the logits of every exit: learned starts at zero, unigram is\n'
                            'the fixed log frequency of each token', ('none', 'learned', 'unigram'))
    init: str = flag('torch', "first weights: torch is PyTorch's default, with embeddings N(0, 1);\n"
                     'gpt2 is N(0, 0.02) and smaller updates', ('torch', 'gpt2'))
    supervision: str = flag('per_loop', 'loss at every exit, or at the last alone', SUPERVISIONS)
    norm_penalty: float = flag(0.0, 'weight of mean(h^2) in the loss')

    def __post_init__(self):
        validate(self)
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head ({self.n_head}), got {self.n_embd}')


class Block(nn.Module):
    """x = x + attn(norm(x)); x = x + swiglu(norm(x)).  (B, T, C) -> (B, T, C)

    Pre-norm: each update sees the direction of x alone, so its length does not depend on the length of x.
    """

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        C = cfg.n_embd
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.norm_attn = nn.RMSNorm(C, EPS)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.norm_mlp = nn.RMSNorm(C, EPS)
        self.w1 = nn.Linear(C, 4 * C, bias=False)
        self.w3 = nn.Linear(C, 4 * C, bias=False)
        self.w2 = nn.Linear(4 * C, C, bias=False)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, past=None):
        x = x + self.drop(self.attn(self.norm_attn(x), past))
        m = self.norm_mlp(x)
        return x + self.drop(self.w2(F.silu(self.w1(m)) * self.w3(m)))

    def attn(self, x, past):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                             # each (B, nh, T, hs)
        if past is not None:  # generating: keys and values of earlier positions are remembered
            if past:
                k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            past[:] = k, v
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0,
                                           is_causal=q.size(2) == k.size(2))  # or one position that sees all
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Output(NamedTuple):
    loss: torch.Tensor | None      # scalar, differentiable
    losses: torch.Tensor | None    # (K,) cross-entropy at each exit that was computed, detached
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
        exits = READOUTS[cfg.readout](cfg)
        self.early_exit, self.last_exit = exits if isinstance(exits, tuple) else (exits, exits)
        self.output_bias = None
        if cfg.output_bias != 'none':  # train.py fills in the unigram frequencies
            self.output_bias = nn.Parameter(torch.zeros(cfg.vocab_size), cfg.output_bias == 'learned')
        self.checkpoint_loops = False  # True: keep one state per loop for backward and recompute the rest
        for name, p in self.named_parameters():
            if p.dim() == 2 and cfg.init == 'gpt2':
                updates = 2 * cfg.n_layer * cfg.loops if name.endswith(('proj.weight', 'w2.weight')) else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(updates))  # so that all updates together stay small

    # The transition: embed, carry, step, and the states that they make

    def embed(self, idx: torch.Tensor, start: int = 0) -> torch.Tensor:
        """h_0 of tokens that stand at positions start, start + 1, ... (B, T) -> (B, T, C)"""
        return self.drop(self.tok_emb(idx) + self.pos_emb.weight[start:start + idx.size(1)])

    def carry(self, h: torch.Tensor, h_0: torch.Tensor) -> torch.Tensor:
        """What the next loop is fed of a state. (B, T, C), (B, T, C) -> (B, T, C)"""
        fed = self.recurrence(h)
        return fed + self.cfg.inject * h_0 if self.cfg.inject else fed

    def step(self, h: torch.Tensor, h_0: torch.Tensor, k: int, cache: dict | None = None) -> torch.Tensor:
        """h_k of h_{k-1}: loop k, counted from 1. (B, T, C), (B, T, C) -> (B, T, C)"""
        x = self.carry(h, h_0) if k > 1 else h_0
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.setdefault((k, i), []))
        return x

    def states(self, idx: torch.Tensor, loops: int | None = None, cache: dict | None = None) -> list:
        """The states h_1 .. h_K, each (B, T, C), just as loop k left them, differentiable. idx (B, T) holds
        token ids; `loops` is any depth from 1 on, else cfg.loops. `cache`, for generation, is an empty dict
        that fills with keys and values: then give one new position per call. ValueError: out of range."""
        loops = self.cfg.loops if loops is None else loops
        past, T = cache[1, 0][0].size(2) if cache else 0, idx.size(1)  # positions in the cache, and new ones
        if not 1 <= past + T <= self.cfg.block_size or past and T > 1 or loops < 1:
            raise ValueError(f'loops must be at least 1 and positions 1 to block_size {self.cfg.block_size}, '
                             f'one at a time after the first call with a cache; got {loops} and {past} + {T}')
        h = h_0 = self.embed(idx, past)
        states = []
        for k in range(1, loops + 1):
            if self.checkpoint_loops and torch.is_grad_enabled():
                h = checkpoint(self.step, h, h_0, k, use_reentrant=False)
            else:
                h = self.step(h, h_0, k, cache)
            states.append(h)
        return states

    # The exposure: expose and readout, and the loss through them

    def expose(self, h: torch.Tensor, k: int | None = None) -> torch.Tensor:
        """What W is fed of a state at exit k, all that cross-entropy can see of it. (.., C) -> (.., C)"""
        return self.early_exit(h) if k is not None and k < self.cfg.loops else self.last_exit(h)

    def unembed(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of what is exposed: W · x, and the output bias. (.., C) -> (.., V)"""
        return F.linear(x, self.tok_emb.weight, self.output_bias)

    def readout(self, h: torch.Tensor, k: int | None = None) -> torch.Tensor:
        """Logits of a state at exit k as it was trained; without k, or from K on, at the last exit.
        (B, T, C) -> (B, T, V)"""
        return self.unembed(self.expose(h, k))

    def cross_entropy(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of each token, from what is exposed; 0 where the target is -100. (B, T, C), (B, T) -> (B, T)"""
        logits = self.unembed(x).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.flatten(), reduction='none').view_as(targets)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                loops: int | None = None) -> Output:
        """idx and targets (B, T) -> Output. The loss: cross-entropies of the exits, weighted by supervision,
        plus norm_penalty times the mean of h². The last loop that runs is read by the last exit.

        Backward computes the logits of each exit again, so memory does not grow with the number of exits.
        Twice differentiable where attention is: on the CPU, under sdpa_kernel(SDPBackend.MATH).
        """
        states = self.states(idx, loops)
        norms = torch.stack([h.detach().float().norm(dim=-1).mean() for h in states])
        if targets is None:
            return Output(None, None, norms, self.readout(states[-1]))
        weights = SUPERVISIONS[self.cfg.supervision](len(states))
        exits = [k for k, w in enumerate(weights, 1) if w or not self.training]  # in eval, all are reported
        ce = []  # of each token at each exit
        for k in exits:
            x = self.expose(states[k - 1], k if k < len(states) else None)
            ce.append(checkpoint(self.cross_entropy, x, targets, use_reentrant=False))
        losses = torch.stack(ce).flatten(1).sum(1) / (targets != -100).sum()
        loss = sum(weights[k - 1] * ce_k for k, ce_k in zip(exits, losses))
        if self.cfg.norm_penalty:
            loss = loss + self.cfg.norm_penalty * torch.stack([h.square().mean() for h in states]).mean()
        return Output(loss, losses.detach(), norms, None)

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, loops: int | None = None,
               temperature: float = 1.0, top_k: int | None = None) -> Iterator[torch.Tensor]:
        """Continue idx (B, T) token by token: yields (B, 1) ids. temperature 0 is greedy. model.eval() first.
        Every (loop, block) pair keeps its keys and values, so a new token costs one position. Past block_size
        the window slides, every token moves to another position, and a new one costs a whole window."""
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f'temperature must be >= 0 and top_k >= 1, got {temperature} and {top_k}')
        cache = {}
        for _ in range(max_new_tokens):
            if cache and idx.size(1) <= self.cfg.block_size:
                fed = idx[:, -1:]
            else:
                fed, cache = idx[:, -self.cfg.block_size:], {}
            logits = self.readout(self.states(fed, loops, cache)[-1][:, -1]).float()                  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature < 1e-6:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def generate(self, idx: torch.Tensor, max_new_tokens: int, loops: int | None = None,
                 temperature: float = 1.0, top_k: int | None = None) -> torch.Tensor:
        """idx (B, T) and its continuation by `stream`: (B, T + max_new_tokens)."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, loops, temperature, top_k)], dim=1)

    def compile_regions(self):
        """torch.compile one block, which every layer and loop reuses, and the cross-entropy of an exit: what
        is compiled grows neither with n_layer nor with loops, nor when inference runs at another depth."""
        from torch._functorch import config
        config.ban_recompute_materialized_backward = False  # 28% less to keep for backward, in bfloat16
        for block in self.blocks:
            block.compile()
        self.cross_entropy = torch.compile(self.cross_entropy)

    def flops_per_token(self) -> int:
        """Floating-point operations of a training step, forward and backward, per token: 6 for each weight of
        a matrix per visit, 12·C·T per visit for attention; recomputation is not counted."""
        C, visits = self.cfg.n_embd, self.cfg.loops * self.cfg.n_layer
        exits = sum(w > 0 for w in SUPERVISIONS[self.cfg.supervision](self.cfg.loops))
        return visits * (6 * 16 * C * C + 12 * C * self.cfg.block_size) + exits * 6 * C * self.cfg.vocab_size


def validate(config):
    """ValueError for the first field whose value is not allowed: its name, what is allowed, its value."""
    kinds = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text'}
    for f in fields(config):
        value, rule = getattr(config, f.name), f.metadata
        if f.type in kinds and type(value) is not f.type and not (f.type is float and type(value) is int):
            allowed = kinds[f.type]
        elif rule.get('choices') and value not in rule['choices']:
            allowed = f'one of {", ".join(rule["choices"])}'
        elif rule and f.type in (int, float) and not rule['low'] <= value <= rule['high']:
            allowed = f'from {rule["low"]} to {rule["high"]}'
        else:
            continue
        raise ValueError(f'{f.name} must be {allowed}, got {value!r}')
