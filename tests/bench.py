"""
Benchmarks: what a step takes and keeps, as ratios within one run. Not tests: nothing here can fail.

    python tests/bench.py                                       # all sections at the 44M size
    python tests/bench.py exits memory --n_embd=64 --n_layer=2  # some of them, another size
"""

import gc
import math
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from looped import LoopedGPT, flag  # noqa: E402
from train import TrainConfig, configure_optimizer, parse_flags, pick_device  # noqa: E402

DEPTHS = 1, 4, 8, 16


@dataclass
class BenchConfig(TrainConfig):
    """The 44M model, at a batch that two CPU cores step in seconds; on a GPU, --batch_size=64."""
    block_size: int = flag(256, 'context length', low=1)
    vocab_size: int = flag(20000, 'tokens', low=2)
    n_layer: int = flag(8, 'blocks', low=1)
    n_head: int = flag(8, 'heads', low=1)
    n_embd: int = flag(512, 'channels', low=1)
    loops: int = flag(4, 'K; exits and memory are measured at 1, 4, 8 and 16', low=1)
    batch_size: int = flag(2, 'sequences per step', low=1)
    rounds: int = flag(5, 'turns of each contestant', low=1)


def data(cfg, device):
    ids = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size + 1), device=device)
    return ids[:, :-1], ids[:, 1:]


def autocast(cfg, device):
    half = cfg.dtype == 'bfloat16' or cfg.dtype == 'auto' and device.type == 'cuda'
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def make(cfg, device, **other):
    cfg = replace(cfg, **other)
    torch.manual_seed(0)
    model = LoopedGPT(cfg).to(device).train()
    if cfg.checkpoint_loops:
        model.recompute()
    return model


def backward(model, cfg, idx, targets, loss=None):
    with autocast(cfg, idx.device):
        mean = loss(model, idx, targets) if loss else model(idx, targets).loss
    mean.backward()


def stepper(model, cfg, device, loss=None, fused=True):
    """A callable that trains one step."""
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate)
    if fused:
        optimizer = configure_optimizer(model, cfg)
    idx, targets = data(cfg, device)

    def step():
        backward(model, cfg, idx, targets, loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


# The clock


def seconds(device, run, times=1) -> float:
    """Per call of run."""
    sync = getattr(torch, device.type).synchronize
    sync()
    start = time.perf_counter()
    for _ in range(times):
        run()
    sync()
    return (time.perf_counter() - start) / times


def in_turn(device, rounds: int, **contestants) -> dict[str, list[float]]:
    """Seconds per call in every round. In a round each contestant has one turn of at least 0.2 seconds, so
    what else the machine does meets all of them, and the ratios within a round say more than the seconds."""
    times = {}
    for name, run in contestants.items():
        seconds(device, run)  # compiles, and allocates
        times[name] = math.ceil(0.2 / seconds(device, run))
    measured = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            measured[name].append(seconds(device, run, times[name]))
    return measured


def ratio(a: list[float], b: list[float]) -> str:
    """a / b: the median of the rounds, and their range."""
    ratios = sorted(x / y for x, y in zip(a, b))
    return f'{median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})'


# Other ways to the same loss


class Fused(torch.autograd.Function):
    """The gradient of cross-entropy is known as soon as the logits are: both are taken in one pass over
    chunks of 4096 rows, and no logits are kept. Differentiable once; all exits weigh the same."""

    @staticmethod
    def forward(ctx, x, weight, targets):  # (K · N, C), (V, C), (K · N,) -> mean ()
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight)
        total = 0.0
        for i in range(0, len(x), 4096):
            rows = slice(i, i + 4096)
            z = x[rows] @ weight.T
            dtype = z.dtype
            logp = F.log_softmax(z.float(), dim=-1)
            del z
            total = total - logp.gather(1, targets[rows, None]).sum()
            onehot = torch.arange(len(weight), device=x.device) == targets[rows, None]
            grad = logp.exp_().add_(onehot, alpha=-1).to(dtype)
            dx[rows] = grad @ weight
            dweight += grad.T @ x[rows]
        ctx.save_for_backward(dx, dweight)
        return total / len(x)

    @staticmethod
    def backward(ctx, dmean):
        dx, dweight = ctx.saved_tensors
        scale = dmean / len(dx)
        return dx * scale, dweight * scale, None


def fused_loss(model, idx, targets):
    states = model.states(idx)
    x = torch.stack([model.exposure(h) for h in states]).flatten(0, 2)
    return Fused.apply(x, model.tok_emb.weight, targets.flatten().repeat(len(states)))


def plain_loss(model, idx, targets):
    """As the authors' release does it: a norm is read from the device in every loop."""
    h = h_0 = model.embed(idx)
    losses = []
    for k in range(1, model.cfg.loops + 1):
        h = model.step(h, h_0, k)
        h.detach().float().norm(dim=-1).mean().item()
        z = model.readout(h, k)
        losses.append(F.cross_entropy(z.flatten(0, 1), targets.flatten()))
    return sum(losses) / len(losses)


def make_plain(cfg, device):
    """Our weights under attention that builds the T x T matrix and masks it."""
    model = make(cfg, device)
    mask = torch.triu(torch.ones(cfg.block_size, cfg.block_size, dtype=torch.bool, device=device), 1)
    for block in model.blocks:
        def attn(x, past, block=block):
            B, T, C = x.shape
            q, k, v = block.qkv(x).view(B, T, 3, block.n_head, -1).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(C // block.n_head)
            y = scores.masked_fill(mask, -math.inf).softmax(-1).to(v.dtype) @ v
            return block.proj(y.transpose(1, 2).reshape(B, T, C))
        block.attn = attn
    return model


# The sections. Each prints its lines.

# Contestants: whether loops and exits are computed again in backward, and the loss, if not the model's own
VARIANTS = {'ours': (False, None), 'checkpointed': (True, None), 'fused': (False, fused_loss)}


def exits(cfg, device, say):
    for loops in DEPTHS:
        steps = {}
        for name, (checkpointed, loss) in VARIANTS.items():
            model = make(cfg, device, loops=loops, checkpoint_loops=checkpointed)
            steps[name] = stepper(model, cfg, device, loss)
        t = in_turn(device, cfg.rounds, **steps)
        say(f'exits at K = {loops}: {median(t["ours"]):.4g} s per step; '
            f'--checkpoint_loops takes {ratio(t["checkpointed"], t["ours"])} that, '
            f'a hand-written gradient {ratio(t["fused"], t["ours"])}')


def plain(cfg, device, say):
    compiled = make(cfg, device)
    compiled.compile_regions()
    t = in_turn(device, cfg.rounds,
                plain=stepper(make_plain(cfg, device), cfg, device, plain_loss, fused=False),
                eager=stepper(make(cfg, device), cfg, device),
                compiled=stepper(compiled, cfg, device))
    rate = compiled.flops_per_token() * cfg.batch_size * cfg.block_size / median(t['compiled']) / 1e12
    say(f'plain: {median(t["plain"]):.4g} s per step as the authors have it; '
        f'that is {ratio(t["plain"], t["eager"])} ours, and {ratio(t["plain"], t["compiled"])} ours compiled, '
        f'which does {rate:.3f} TFLOP/s and takes {ratio(t["compiled"], t["eager"])} eager')


def child(function, *args):
    """function(*args) in a fresh process without compiler caches."""
    os.environ['TORCHINDUCTOR_FORCE_DISABLE_CACHES'] = '1'
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(function, args)


def compile_one(cfg, loops, whole):
    device = pick_device(cfg.device, cfg.n_embd)
    model = make(cfg, device, loops=loops)
    if whole:
        wrapped = torch.compile(model)
        step = stepper(model, cfg, device, lambda _, idx, targets: wrapped(idx, targets).loss)
    else:
        model.compile_regions()
        step = stepper(model, cfg, device)
    first = seconds(device, step)
    return first, median(in_turn(device, cfg.rounds, step=step)['step'])


def compile(cfg, device, say):
    for loops in 2, 16:
        regions_first, regions = child(compile_one, cfg, loops, False)
        whole_first, whole = child(compile_one, cfg, loops, True)
        say(f'compile at K = {loops}: by regions the first step takes {regions_first:.1f} s and a later one '
            f'{regions:.4g} s; as a whole {whole_first:.1f} s and {whole:.4g} s')


def peak_memory(device) -> int:
    """Bytes at the highest so far: of the GPU's allocator, or of this process (Linux)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    status = Path('/proc/self/status').read_text()
    return 1024 * int(status.split('VmHWM:')[1].split()[0])


def memory_one(cfg, loops, name):
    device = pick_device(cfg.device, cfg.n_embd)
    checkpointed, loss = VARIANTS[name]
    model = make(cfg, device, loops=loops, checkpoint_loops=checkpointed)
    idx, targets = data(cfg, device)
    backward(model, cfg, idx[:1, :8], targets[:1, :8], loss)  # what torch imports and allocates once
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    else:
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from here
    before = peak_memory(device)
    try:
        backward(model, cfg, idx, targets, loss)
    except torch.OutOfMemoryError:
        return math.nan
    return peak_memory(device) - before


def memory(cfg, device, say):
    for loops in DEPTHS:
        mib = {name: child(memory_one, cfg, loops, name) / 2 ** 20 for name in VARIANTS}
        say(f'memory at K = {loops}: forward and backward take {mib["ours"]:,.1f} MiB beside weights and gradients; '
            f'with --checkpoint_loops {mib["checkpointed"]:,.1f} ({mib["checkpointed"] / mib["ours"]:.2f} x), '
            f'with a hand-written gradient {mib["fused"]:,.1f} ({mib["fused"] / mib["ours"]:.2f} x)')


SECTIONS = dict(exits=exits, plain=plain, compile=compile, memory=memory)


def main():
    sections = dict(nargs='*', help=f'of {", ".join(SECTIONS)} (default: all)')
    cfg, given = parse_flags(BenchConfig, __doc__, sys.argv[1:], sections=sections)
    device = pick_device(cfg.device, cfg.n_embd)
    name = f'{torch.get_num_threads()} CPU threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)

    def say(line):
        print(f'[{name}, torch {torch.__version__}] {line}', flush=True)
    say(f'n_layer {cfg.n_layer}, n_embd {cfg.n_embd}, block_size {cfg.block_size}, '
        f'vocab_size {cfg.vocab_size}, loops {cfg.loops}, batch_size {cfg.batch_size}, dtype {cfg.dtype}')
    for section in given['sections'] or SECTIONS:
        SECTIONS[section](cfg, device, say)


if __name__ == '__main__':
    main()
