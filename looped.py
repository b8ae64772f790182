"""
A looped language model, whole: one stack of transformer blocks run K times, every state decoded and fed back.

    h_0 = tok_emb[idx] + pos_emb        h_1 = blocks(h_0)        h_k = blocks(carry(h_{k-1}))  for k > 1
    z_k = readout(h_k) = W · expose(h_k), the logits of exit k

Two methods carry the argument of "Dense Supervision Is Not Enough: The Readout Blind Spot in Looped
Language Models" (arXiv:2606.24898): `readout` is what the loss can see of a state, `carry` is what the next
loop is fed. Per-loop cross-entropy controls the first. If the readout hides the scale of h (RMSNorm,
LayerNorm) while the carry keeps it (residual), nothing holds the scale, and training drives it up.

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
# The two objects of the paper, as rows. A new row is a new choice of --readout or --recurrence by itself.


class PowerNorm(nn.Module):
    """h · RMS(h)^(alpha - 1): the direction, and the scale to the power alpha. (.., C) -> (.., C)"""

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def forward(self, h):
        return h * (h.square().mean(-1, keepdim=True) + EPS) ** ((self.alpha - 1) / 2)


class Damping(nn.Module):
    """sigmoid(a) · h with one learned scalar a. (.., C) -> (.., C)"""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0))

    def forward(self, h):
        return torch.sigmoid(self.a) * h


READOUTS = {  # what stands between h_k and W; a pair is (the intermediate exits, the last exit)
    'rms':       lambda cfg: nn.RMSNorm(cfg.n_embd, EPS),                     # direction only
    'layernorm': lambda cfg: nn.LayerNorm(cfg.n_embd, EPS, bias=False),       # direction without its mean
    'raw':       lambda cfg: nn.Identity(),                                   # everything
    'final_rms': lambda cfg: (nn.Identity(), nn.RMSNorm(cfg.n_embd, EPS)),    # all; at K, direction
    'alpha':     lambda cfg: PowerNorm(cfg.alpha),                            # a dial from blind to raw
}

RECURRENCES = {  # what loop k + 1 is fed of h_k
    'residual':  lambda cfg: nn.Identity(),                                   # scale is carried, and grows
    'rms':       lambda cfg: nn.RMSNorm(cfg.n_embd, EPS),                     # scale is removed
    'damped':    lambda cfg: Damping(),                                       # scale is contracted
}

# ------------------------------------------------------------------------------------------------------------


def flag(default, help: str, choices=(), low=None, high=None):
    """A dataclass field that is also a command-line flag: default, one line of meaning, what is allowed."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


def validate(config):
    """ValueError for the first field whose value is not allowed: the name, what is allowed, the value."""
    for f in fields(config):
        value, rule = getattr(config, f.name), f.metadata
        if f.type is int and type(value) is not int:
            raise ValueError(f'{f.name} must be a whole number, got {value!r}')
        if rule['choices'] and value not in rule['choices']:
            raise ValueError(f'{f.name} must be one of {", ".join(rule["choices"])}, got {value!r}')
        if rule['low'] is not None and not rule['low'] <= value < math.inf:
            raise ValueError(f'{f.name} must be at least {rule["low"]} and finite, got {value!r}')
        if rule['high'] is not None and value > rule['high']:
            raise ValueError(f'{f.name} must be at most {rule["high"]}, got {value!r}')


@dataclass
class LoopedConfig:
    """Everything that makes a model. ValueError names the field, its value and what is allowed."""
    block_size: int = flag(64, 'context length in tokens', low=1)
    vocab_size: int = flag(256, '256 is bytes; 257 to 50257 is that much of the GPT-2 BPE', low=2)
    n_layer: int = flag(2, 'blocks in the stack that is looped', low=1)
    n_head: int = flag(4, 'attention heads', low=1)
    n_embd: int = flag(64, 'channels of the state', low=1)
    dropout: float = flag(0.0, 'dropout probability', low=0, high=0.999)
    loops: int = flag(8, 'K, how often the stack runs', low=1)
    readout: str = flag('rms', 'what the loss sees of a state', READOUTS)
    alpha: float = flag(0.5, 'for --readout=alpha: 0 is blind to scale, 1 is raw', low=0, high=1)
    recurrence: str = flag('residual', 'what the next loop is fed of a state', RECURRENCES)
    supervision: str = flag('per_loop', 'loss at every exit or at the last', ('per_loop', 'terminal'))
    norm_penalty: float = flag(0.0, 'weight of mean(h^2) in the loss', low=0)

    def __post_init__(self):
        validate(self)
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd must be a multiple of n_head ({self.n_head}), got {self.n_embd}')


class Block(nn.Module):
    """x = x + attn(norm(x)); x = x + swiglu(norm(x)).  (B, T, C) -> (B, T, C)

    Pre-norm: each update sees the direction of x alone, so its size does not depend on the size of x.
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
    losses: torch.Tensor | None    # (K,) cross-entropy at each exit, detached
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
        self.between = RECURRENCES[cfg.recurrence](cfg)
        exits = READOUTS[cfg.readout](cfg)
        self.early_exit, self.last_exit = exits if isinstance(exits, tuple) else (exits, exits)
        self.exit_chunk = exit_chunk
        self.checkpoint_loops = False  # True: keep one state a loop for backward and recompute the rest
        for name, p in self.named_parameters():
            if p.dim() == 2:
                updates = 2 * cfg.n_layer * cfg.loops if name.endswith(('proj.weight', 'w2.weight')) else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(updates))  # so that all updates together stay small

    # Four methods to read: states and carry are the transition, readout is the exposure, forward is the loss.

    def states(self, idx: torch.Tensor, loops: int | None = None, cache: list | None = None) -> list:
        """The states h_1 .. h_K, each (B, T, C), just as loop k left them, differentiable.

        idx (B, T) holds token ids, T at most block_size. `loops` is any depth from 1 on, else cfg.loops.
        `cache`, for generation, is a list of loops · n_layer empty lists, which fill with keys and values.
        ValueError: T or loops out of range. IndexError (on the CPU): an id outside the vocabulary.
        """
        loops = self.cfg.loops if loops is None else loops
        past = cache[0][0].size(2) if cache and cache[0] else 0  # positions that are in the cache already
        T = idx.size(1)
        if not 1 <= past + T <= self.cfg.block_size:
            raise ValueError(f'idx must have 1 to block_size {self.cfg.block_size} positions, got {past + T}')
        if loops < 1:
            raise ValueError(f'loops must be at least 1, got {loops}')
        h = self.drop(self.tok_emb(idx) + self.pos_emb(torch.arange(past, past + T, device=idx.device)))
        states = []
        for k in range(loops):
            h = self.carry(h) if k else h
            if self.checkpoint_loops and torch.is_grad_enabled():
                h = checkpoint(self.loop, h, use_reentrant=False)
            else:
                h = self.loop(h, cache[k * self.cfg.n_layer:(k + 1) * self.cfg.n_layer] if cache else None)
            states.append(h)
        return states

    def loop(self, h, cache=None):
        """One loop: all blocks, once. (B, T, C) -> (B, T, C)"""
        for i, block in enumerate(self.blocks):
            h = block(h, cache[i] if cache else None)
        return h

    def carry(self, h: torch.Tensor) -> torch.Tensor:
        """What the next loop is fed of a state. (B, T, C) -> (B, T, C)"""
        return self.between(h)

    def expose(self, h: torch.Tensor, final: bool = True) -> torch.Tensor:
        """What W is fed of a state, and all that cross-entropy can see of it. (.., C) -> (.., C)"""
        return self.last_exit(h) if final else self.early_exit(h)

    def readout(self, h: torch.Tensor, final: bool = True) -> torch.Tensor:
        """Logits of a state, (B, T, C) -> (B, T, V); `final` says whether it is the last loop's."""
        return F.linear(self.expose(h, final), self.tok_emb.weight)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                loops: int | None = None) -> Output:
        """idx and targets (B, T) -> Output. Loss: mean of CE_k over the exits (per_loop) or CE_K (terminal),
        plus norm_penalty times the mean of h². Terminal supervision pays for no other exit while it trains.

        In training, the exits go through ExitCrossEntropy. At the 44M size, on two CPU cores, it is as fast
        as keeping the logits and 6% faster than recomputing them (python tests/bench.py exits).
        Its price is two (K, B, T, C) buffers, one of them until backward, and one (V, C). It can be
        differentiated once: for second derivatives, call eval() first.
        """
        states = self.states(idx, loops)
        norms = torch.stack([torch.linalg.vector_norm(h.detach(), dim=-1, dtype=torch.float32).mean()
                             for h in states])
        if targets is None:
            return Output(None, None, norms, self.readout(states[-1]))
        terminal = self.cfg.supervision == 'terminal'
        exits = states[-1:] if terminal and self.training else states  # in eval, every exit is reported
        if self.training and torch.is_grad_enabled():
            x = torch.stack([self.expose(h, h is states[-1]) for h in exits])                   # (K, B, T, C)
            loss, losses = ExitCrossEntropy.apply(x.flatten(1, 2), self.tok_emb.weight, targets.flatten(),
                                                  self.exit_chunk)
            losses = losses.view(len(exits), -1).mean(1)
        else:
            losses = torch.stack([F.cross_entropy(self.readout(h, h is states[-1]).flatten(0, 1).float(),
                                                  targets.flatten()) for h in exits])
            loss, losses = losses[-1] if terminal else losses.mean(), losses.detach()
        if self.cfg.norm_penalty:
            loss = loss + self.cfg.norm_penalty * torch.stack([h.square().mean() for h in states]).mean()
        return Output(loss, losses, norms, None)

    def compile_regions(self):
        """torch.compile one block, which every layer and loop reuses, and one chunk of an exit: compile time
        does not grow with n_layer or loops, and another depth at inference compiles nothing new."""
        # what feeds a matrix product of backward may be recomputed there: 28% less to keep, in bfloat16
        from torch._functorch import config
        config.ban_recompute_materialized_backward = False
        for block in self.blocks:
            block.compile()
        self.exit_chunk = torch.compile(exit_chunk)

    def flops_per_token(self) -> int:
        """Floating-point operations of a training step, forward and backward, per token: 6 for each weight
        of a matrix each visit, 12·C·T a visit for attention; recomputation is not counted."""
        C, visits = self.cfg.n_embd, self.cfg.loops * self.cfg.n_layer
        exits = self.cfg.loops if self.cfg.supervision == 'per_loop' else 1
        return visits * (6 * 16 * C * C + 12 * C * self.cfg.block_size) + exits * 6 * C * self.cfg.vocab_size

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, loops: int | None = None,
               temperature: float = 1.0, top_k: int | None = None) -> Iterator[torch.Tensor]:
        """Continue idx (B, T) token by token: yields (B, 1) ids. temperature 0 is greedy. model.eval() first.

        Every (loop, block) pair keeps its keys and values, so a new token costs one position. Past block_size
        the window slides: every token moves to another position, so nothing remembered holds, and each new
        token costs a whole window. Raises ValueError for a negative temperature or top_k < 1.
        """
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f'temperature must be >= 0 and top_k >= 1, got {temperature} and {top_k}')
        loops = self.cfg.loops if loops is None else loops
        cache = []
        for _ in range(max_new_tokens):
            if cache and idx.size(1) <= self.cfg.block_size:
                fed = idx[:, -1:]
            else:
                fed, cache = idx[:, -self.cfg.block_size:], [[] for _ in range(loops * self.cfg.n_layer)]
            logits = self.readout(self.states(fed, loops, cache)[-1][:, -1]).float()       # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def generate(self, idx: torch.Tensor, max_new_tokens: int, loops: int | None = None,
                 temperature: float = 1.0, top_k: int | None = None) -> torch.Tensor:
        """idx (B, T) and its continuation by `stream`: (B, T + max_new_tokens)."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, loops, temperature, top_k)], dim=1)


# ------------------------------------------------------------------------------------------------------------
# The exits in training: what F.cross_entropy over readout would give, with less memory


def exit_chunk(x, weight, targets):
    """Cross-entropy of some rows, with its gradients. x (n, C), weight (V, C), targets (n,) ->
    losses (n,), d(sum of losses)/dx (n, C), d(sum of losses)/dweight (V, C)."""
    z = x @ weight.T                                                                                 # (n, V)
    logp, dtype = F.log_softmax(z.float(), dim=-1), z.dtype
    del z  # the largest tensor there is, and of no more use
    losses = -logp.gather(1, targets[:, None])
    onehot = torch.arange(len(weight), device=x.device) == targets[:, None]
    grad = logp.exp_().add_(onehot, alpha=-1).to(dtype)             # dCE/dz = softmax(z) - onehot(targets)
    return losses[:, 0], grad @ weight, grad.T @ x


class ExitCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of every exit, without keeping any logits for backward.

    The gradient of cross-entropy is known as soon as the logits are, so both are taken in one pass over
    chunks of positions: memory holds the logits of one exit or of ROWS positions, whichever is less.
    """
    ROWS = 4096

    @staticmethod
    def forward(ctx, x, weight, targets, chunk):  # (K, N, C), (V, C), (N,) -> mean (), losses (K·N,)
        K, N, _ = x.shape
        x, targets = x.flatten(0, 1), targets.repeat(K)
        step = min(N, ExitCrossEntropy.ROWS)
        losses = torch.empty(len(x), device=x.device)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        for i in range(0, len(x), step):
            rows = slice(i, i + step)
            losses[rows], dx[rows], dw = chunk(x[rows], weight, targets[rows])
            dweight += dw
        ctx.save_for_backward(dx.view(K, N, -1), dweight)
        ctx.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(ctx, dmean, _):
        dx, dweight = ctx.saved_tensors
        scale = dmean / (dx.size(0) * dx.size(1))  # not in the chunks, where float16 would lose it
        return dx * scale, dweight * scale, None, None
