"""
Benchmarks: ratios within one run, and the device they were measured on. Not tests: nothing here can fail.

    python tests/bench.py                                       # all sections at the 44M size
    python tests/bench.py exits memory --n_embd=64 --n_layer=2  # some of them, another size
"""

import gc
import math
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from looped import LoopedConfig, LoopedGPT, flag  # noqa: E402
from train import FlagParser, TrainConfig, configure_optimizer, pick_device  # noqa: E402


@dataclass
class BenchConfig(TrainConfig):
    """The 44M model, at a batch that two CPU cores step in seconds; on a GPU, --batch_size=64."""
    block_size: int = flag(256, 'context length', low=1)
    vocab_size: int = flag(20000, 'tokens', low=2)
    n_layer: int = flag(8, 'blocks', low=1)
    n_head: int = flag(8, 'heads', low=1)
    n_embd: int = flag(512, 'channels', low=1)
    loops: int = flag(4, 'K', low=1)
    batch_size: int = flag(2, 'sequences a step', low=1)
    rounds: int = flag(5, 'measured steps of each contestant, in turn', low=1)


def sync(device):
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()


def in_turn(device, rounds: int, **contestants) -> dict[str, float]:
    """Median seconds of each callable, run A B A B … after one warm-up of each."""
    times = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, run in contestants.items():
            sync(device)
            start = time.perf_counter()
            run()
            sync(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def data(cfg, device):
    ids = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size + 1), device=device)
    return ids[:, :-1], ids[:, 1:]


def autocast(cfg, device):
    half = cfg.dtype == 'bfloat16' or cfg.dtype == 'auto' and device.type == 'cuda'
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def make(cfg, device, **other):
    torch.manual_seed(0)
    return LoopedGPT(replace(cfg, **other)).to(device).train()


def stepper(model, cfg, device, loss=None, fused=True):
    """A callable that trains one step."""
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate)
    if fused:
        optimizer = configure_optimizer(model, cfg)
    idx, targets = data(cfg, device)

    def step():
        with autocast(cfg, device):
            (loss(model, idx, targets) if loss else model(idx, targets).loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


# The alternatives that looped.py was measured against


def live_loss(model, idx, targets):
    """Every exit's logits stay until backward."""
    losses = [F.cross_entropy(model.readout(h).flatten(0, 1), targets.flatten()) for h in model.states(idx)]
    return torch.stack(losses).mean()


class Fused(torch.autograd.Function):
    """The gradient of cross-entropy is known as soon as the logits are: both are taken in one pass over
    chunks of 4096 rows, and no logits are computed twice. Differentiable once; all exits weigh the same."""

    @staticmethod
    def forward(ctx, x, weight, targets):  # (K · N, C), (V, C), (K · N,) -> mean ()
        dx, dweight, total = torch.empty_like(x), torch.zeros_like(weight), 0
        for i in range(0, len(x), 4096):
            rows = slice(i, i + 4096)
            z = x[rows] @ weight.T
            logp, dtype = F.log_softmax(z.float(), dim=-1), z.dtype
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
    x = torch.stack([model.expose(h) for h in model.states(idx)]).flatten(0, 2)
    return Fused.apply(x, model.tok_emb.weight, targets.flatten().repeat(len(x) // targets.numel()))


def plain_loss(model, idx, targets):
    """As the authors' release does it: K live logit tensors and a norm read from the device at every loop."""
    states = model.states(idx)
    [h.norm(dim=-1).mean().item() for h in states]
    logits = [model.readout(h) for h in states]
    return sum(F.cross_entropy(z.flatten(0, 1), targets.flatten()) for z in logits) / len(logits)


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


# What is measured. Each section prints its lines.


def exits(cfg, device, say):
    for loops in sorted({1, cfg.loops, 2 * cfg.loops, 4 * cfg.loops}):
        t = in_turn(device, cfg.rounds, ours=stepper(make(cfg, device, loops=loops), cfg, device),
                    fused=stepper(make(cfg, device, loops=loops), cfg, device, fused_loss),
                    live=stepper(make(cfg, device, loops=loops), cfg, device, live_loss))
        say(f'exits at K = {loops}: {t["ours"]:.3f} s per step; a hand-written gradient takes '
            f'{t["fused"] / t["ours"]:.2f} x that, live logits {t["live"] / t["ours"]:.2f} x')


def plain(cfg, device, say):
    compiled = make(cfg, device)
    compiled.compile_regions()
    n, times = (8192, 10) if device.type == 'cuda' else (4096, 1)
    matrix = torch.randn(n, n, device=device)
    with autocast(cfg, device):
        matrix = matrix.to((matrix @ matrix).dtype)
    plain_step = stepper(make_plain(cfg, device), cfg, device, plain_loss, fused=False)
    t = in_turn(device, cfg.rounds, plain=plain_step,
                eager=stepper(make(cfg, device), cfg, device), compiled=stepper(compiled, cfg, device),
                product=lambda: [matrix @ matrix for _ in range(times)])
    flops = compiled.flops_per_token() * cfg.batch_size * cfg.block_size / t['compiled'] / 1e12
    ceiling = times * 2 * n ** 3 / t['product'] / 1e12
    say(f'plain: {t["plain"]:.3f} s per plain eager step; ours is {t["plain"] / t["eager"]:.2f} x as fast '
        f'eager and {t["plain"] / t["compiled"]:.2f} x compiled; compiled against eager '
        f'{t["eager"] / t["compiled"]:.2f} x; compiled does {flops:.3f} TFLOP/s, {flops / ceiling:.0%} of '
        f'the {ceiling:.3f} of one matrix product')


def child(function, *args):
    """function(*args) in a fresh process without compiler caches."""
    os.environ['TORCHINDUCTOR_FORCE_DISABLE_CACHES'] = '1'
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(function, args)


def compile_one(cfg, loops, whole):
    device = pick_device(cfg.device)
    model = make(cfg, device, loops=loops)
    if whole:
        wrapped = torch.compile(model)
        step = stepper(model, cfg, device, lambda _, idx, targets: wrapped(idx, targets).loss)
    else:
        model.compile_regions()
        step = stepper(model, cfg, device)
    start = time.perf_counter()
    step()
    sync(device)
    first = time.perf_counter() - start
    return first, in_turn(device, cfg.rounds, step=step)['step']


def compile(cfg, device, say):
    for loops in 2, 16:
        (block, block_step), (whole, whole_step) = (child(compile_one, cfg, loops, w) for w in (False, True))
        say(f'compile at K = {loops}: first step after {block:.1f} s by regions, {whole:.1f} s as a whole '
            f'({whole / block:.1f} x); then {block_step:.3f} s and {whole_step:.3f} s per step '
            f'({block_step / whole_step:.2f} x)')


def peak_memory(device) -> int:
    """Bytes at the highest so far: of the GPU's allocator, or of this process (Linux)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    status = Path('/proc/self/status').read_text()
    return 1024 * int(status.split('VmHWM:')[1].split()[0])


def memory_one(cfg, loops, variant):
    device = pick_device(cfg.device)
    model = make(cfg, device, loops=loops)
    model.checkpoint_loops = variant == 'checkpointed'
    loss = dict(live=live_loss, fused=fused_loss).get(variant)
    idx, targets = data(cfg, device)

    def run(idx, targets):
        with autocast(cfg, device):
            (loss(model, idx, targets) if loss else model(idx, targets).loss).backward()
    run(idx[:1, :8], targets[:1, :8])  # what torch imports and allocates once
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    else:
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from here
    before = peak_memory(device)
    try:
        run(idx, targets)
    except torch.OutOfMemoryError:
        return math.nan
    return peak_memory(device) - before


def memory(cfg, device, say):
    variants = 'ours', 'fused', 'live', 'checkpointed'
    for loops in 1, 4, 8, 16:
        peak = {v: child(memory_one, cfg, loops, v) / 2 ** 20 for v in variants}
        say(f'memory at K = {loops}: forward and backward take {peak["ours"]:,.0f} MiB over the weights; '
            f'with a hand-written gradient {peak["fused"] / peak["ours"]:.2f} x that, with live logits '
            f'{peak["live"] / peak["ours"]:.2f} x, with --checkpoint_loops '
            f'{peak["checkpointed"] / peak["ours"]:.2f} x')


@torch.no_grad()
def generate(cfg, device, say):
    config = LoopedConfig(n_layer=4, n_embd=256, n_head=4, loops=8, block_size=256)
    model = LoopedGPT(config).to(device).eval()
    idx = torch.randint(256, (1, 8), device=device)

    def recompute():
        x = idx
        for _ in range(200):
            x = torch.cat((x, model(x).logits[:, -1:].argmax(-1)), 1)
        return x
    assert torch.equal(model.generate(idx, 200, temperature=0), recompute())
    t = in_turn(device, min(3, cfg.rounds), recomputed=recompute,
                cached=lambda: model.generate(idx, 200, temperature=0))
    say(f'generate: 200 tokens in {t["cached"]:.2f} s with keys and values kept, '
        f'{t["recomputed"] / t["cached"]:.1f} x as fast as recomputing (4 blocks, C 256, K 8, T 256)')


SECTIONS = dict(exits=exits, plain=plain, compile=compile, memory=memory, generate=generate)


def main():
    parser = FlagParser(BenchConfig, __doc__)
    parser.add_argument('sections', nargs='*', help=f'of {", ".join(SECTIONS)} (default: all)')
    cfg, given = parser.parse(sys.argv[1:])
    device = pick_device(cfg.device)
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
