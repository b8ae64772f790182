"""
Train a looped language model on one device, or on several with torchrun.

    python train.py --readout=rms --loops=8
    torchrun --standalone --nproc_per_node=2 train.py --readout=rms --loops=8

A run is a folder: log.jsonl (the flags, then a line a logged step or evaluation) and ckpt.pt.
"""

import argparse
import difflib
import gc
import importlib.util
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data.prepare import BUILTIN, UserError, prepare, read_meta
from looped import LoopedConfig, LoopedGPT, flag

PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'RTX 4090': 165e12}  # bf16


@dataclass
class TrainConfig(LoopedConfig):
    """Every flag of train.py: the model's, then these."""
    dataset: str = flag('python', f'{", ".join(BUILTIN)}, or a file or folder of your own text')
    out_dir: str = flag('', 'folder of the run; named after the flags if left out')
    batch_size: int = flag(8, 'sequences a micro-step and process', low=1)
    gradient_accumulation_steps: int = flag(1, 'micro-steps an update', low=1)
    max_iters: int = flag(1600, 'updates in all', low=1)
    learning_rate: float = flag(6e-3, 'learning rate after warm-up', low=0)
    lr_schedule: str = flag('constant', 'after warm-up', ('constant', 'cosine'))
    min_lr: float = flag(0.0, 'where --lr_schedule=cosine ends', low=0)
    warmup_iters: int = flag(50, 'iterations of linear warm-up', low=0)
    weight_decay: float = flag(0.01, 'decoupled, on matrices only', low=0)
    beta1: float = flag(0.9, 'AdamW', low=0, high=0.99999)
    beta2: float = flag(0.95, 'AdamW', low=0, high=0.99999)
    grad_clip: float = flag(1.0, 'largest norm of the gradient; 0 does not clip', low=0)
    seed: int = flag(1, 'of weights, batches and dropout', low=0, high=2 ** 32)
    device: str = flag('auto', 'auto is cuda, then mps, then cpu; also cuda:1')
    dtype: str = flag('auto', 'of matrix products, not of the state; auto is float32, on cuda bfloat16 '
                      '(float16 where there is none)', ('auto', 'float32', 'bfloat16', 'float16'))
    compile: str = flag('auto', 'torch.compile; auto is True on cuda, else False', ('auto', 'True', 'False'))
    checkpoint_loops: bool = flag(False, 'recompute inside each loop in backward: less memory, more time')
    eval_interval: int = flag(200, 'iterations between evaluations, which also save', low=1)
    eval_iters: int = flag(50, 'batches of a split an evaluation', low=1)
    log_interval: int = flag(20, 'iterations between log lines', low=1)
    resume: bool = flag(False, 'continue the run in out_dir')
    overwrite: bool = flag(False, 'replace the run in out_dir')
    eval_only: bool = flag(False, 'evaluate once and stop; with --resume, the checkpoint')


# ------------------------------------------------------------------------------------------------------------
# Flags, shared with sample.py and plot_norms.py


def parse_bool(text: str) -> bool:
    if text.lower() not in ('true', 'false', '1', '0'):
        raise argparse.ArgumentTypeError(f'must be True or False, got {text!r}')
    return text.lower() in ('true', '1')


class FlagParser(argparse.ArgumentParser):
    """A parser with a flag for each field of a dataclass. Errors are one line, and name the nearest flag."""

    def __init__(self, config, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawTextHelpFormatter)
        self.config = config
        for f in fields(config):
            choices = f.metadata['choices']
            switch = dict(nargs='?', const=True) if f.type is bool or 'True' in choices else {}
            self.add_argument(f'--{f.name}', type=parse_bool if f.type is bool else f.type,
                              metavar='{' + ','.join(choices) + '}' if choices else f.type.__name__.upper(),
                              help=f'{f.metadata["help"]} (default: {f.default!r})',
                              default=argparse.SUPPRESS, **switch)

    def error(self, message):
        if message.startswith('unrecognized arguments: '):
            typed = message.split(': ', 1)[1].split()[0].split('=')[0]
            near = difflib.get_close_matches(typed, self._option_string_actions, 1)
            message = f'unknown argument {typed}' + (f'; did you mean {near[0]}?' if near else '')
        self.exit(2, f'{self.prog}: {message} (--help lists all flags)\n')

    def parse(self, argv=None):
        """(the config, the dict of what was typed). Exits with 2 where a value is not allowed."""
        switches = [name for name, action in self._option_string_actions.items() if action.const]
        argv = [f'{word}=True' if word in switches else word  # so that it does not take the next word
                for word in (sys.argv[1:] if argv is None else argv)]
        given = vars(self.parse_args(argv))
        names = {f.name for f in fields(self.config)}
        try:
            return self.config(**{k: v for k, v in given.items() if k in names}), given
        except ValueError as e:
            self.error(f'--{e}')


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA, then MPS, then the CPU. UserError for a device that is not here."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0]
        raise UserError(f'--device={name} does not work here ({why}); try --device=auto') from e
    return torch.device('cuda', torch.cuda.current_device()) if name == 'cuda' else device


# ------------------------------------------------------------------------------------------------------------
# A run's folder and its checkpoint


def run_folder(cfg: TrainConfig) -> Path:
    """cfg.out_dir, or a name made of the flags by which ablations differ, so that they land side by side."""
    if cfg.out_dir:
        return Path(cfg.out_dir)
    default = TrainConfig()
    readout = f'alpha{cfg.alpha:g}' if cfg.readout == 'alpha' else cfg.readout
    name = f'{Path(cfg.dataset).stem}-{readout}-{cfg.recurrence}-{cfg.supervision}'
    for key, short in ('norm_penalty', 'pen'), ('loops', 'k'), ('learning_rate', 'lr'), ('seed', 's'):
        if getattr(cfg, key) != getattr(default, key):
            name += f'-{short}{getattr(cfg, key):g}'
    return Path('out') / name


def save_checkpoint(path: Path, state: dict):
    """Write, flush, rename: whatever interrupts it, `path` holds a whole checkpoint, the new or the old."""
    temporary = path.with_suffix('.tmp')
    try:
        with open(temporary, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        kept = 'the old one stays' if path.exists() else 'none is there'
        raise UserError(f'could not save {path} ({e}); {kept}: make room and go on with --resume') from e


def load_checkpoint(path: Path) -> tuple[LoopedGPT, TrainConfig, dict]:
    """What a run saved: the model (on the CPU, in eval mode), its flags, and the dict with iter, optimizer,
    scaler and corpus. UserError if the file is missing, truncated or something else."""
    try:
        state = dict(torch.load(path, map_location='cpu', weights_only=True))
        cfg = TrainConfig(**state['config'])
        model = LoopedGPT(cfg).eval()
        model.load_state_dict(state['model'])
        return model, cfg, {key: state[key] for key in ('iter', 'optimizer', 'scaler', 'corpus')}
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f'no checkpoint {path} (yet): give the folder of a run that has been trained') from e
    except Exception as e:  # whatever a foreign file brings
        raise UserError(f'{path} is truncated or is no checkpoint of this train.py ({type(e).__name__}): '
                        f'delete it, or give another folder') from e


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl, up to one that was cut off."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


# ------------------------------------------------------------------------------------------------------------
# Batches


def load_tokens(cfg: TrainConfig) -> tuple[dict, dict]:
    """({'train': tokens, 'val': tokens}, meta): memory-mapped uint16, prepared first if need be."""
    folder = prepare(cfg.dataset, cfg.vocab_size, min_tokens=cfg.block_size + 1)
    tokens = {split: np.memmap(folder / f'{split}.bin', np.uint16, 'r') for split in ('train', 'val')}
    for split, t in tokens.items():
        if t.max() >= cfg.vocab_size:
            raise UserError(f'{folder}/{split}.bin holds token {t.max()}, outside vocab_size '
                            f'{cfg.vocab_size}: delete the folder, and it is prepared again')
    return tokens, read_meta(folder)


def windows(tokens, starts, block_size: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """idx and targets, each (len(starts), block_size) int64, in one read of the memory map."""
    ids = torch.from_numpy(tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    if device.type == 'cuda':
        ids = ids.pin_memory().to(device, non_blocking=True)
    ids = ids.to(device)
    return ids[:, :-1], ids[:, 1:]


def train_batch(tokens, cfg: TrainConfig, rank: int, it: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """All micro-steps of iteration `it`: a function of (seed, rank, it) alone."""
    rng = np.random.default_rng((cfg.seed, rank, it))
    starts = rng.integers(len(tokens) - cfg.block_size, size=cfg.gradient_accumulation_steps * cfg.batch_size)
    return windows(tokens, starts, cfg.block_size, device)


def eval_batches(tokens, cfg: TrainConfig, count: int, device):
    """`count` batches of (idx, targets): evenly spaced windows, the same whatever the seed."""
    starts = np.linspace(0, len(tokens) - cfg.block_size - 1, count * cfg.batch_size).astype(np.int64)
    for batch in starts.reshape(count, -1):
        yield windows(tokens, batch, cfg.block_size, device)


# ------------------------------------------------------------------------------------------------------------


def learning_rate(cfg: TrainConfig, it: int) -> float:
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / cfg.warmup_iters
    if cfg.lr_schedule == 'constant':
        return cfg.learning_rate
    done = (it - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1, done)))


def configure_optimizer(model: LoopedGPT, cfg: TrainConfig, device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                             fused=device.type in ('cpu', 'cuda'))


def train(cfg: TrainConfig, given: dict) -> int:
    """The recipe. `given` holds the flags that were typed; --resume lays them over the run's own.
    Gives the exit code: 0, or 128 + the signal that stopped the run."""
    # One process, or one of torchrun's
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    master = rank == 0

    def say(line):
        if master:
            try:
                print(line, flush=True)
            except BrokenPipeError:  # Ctrl-C has ended the tee that was reading, too
                sys.stdout = open(os.devnull, 'w')

    # The folder, and what is in it
    out_dir, state = run_folder(cfg), None
    log_path, ckpt_path = out_dir / 'log.jsonl', out_dir / 'ckpt.pt'
    if cfg.resume and cfg.overwrite:
        raise UserError('--resume continues a run and --overwrite replaces it: give one of them')
    if cfg.resume:
        model, saved, state = load_checkpoint(ckpt_path)
        for f in fields(LoopedConfig):
            if f.name in given and given[f.name] != getattr(saved, f.name):
                raise UserError(f'--{f.name}={given[f.name]} contradicts {ckpt_path}, which was trained with '
                                f'{getattr(saved, f.name)}: leave the flag out, or start another run')
        cfg = replace(saved, **{'overwrite': False, 'eval_only': False, **given})
    elif master and not cfg.overwrite and (log_path.exists() or ckpt_path.exists()):
        raise UserError(f'{out_dir} holds a run: continue it with --resume, replace it with --overwrite, '
                        f'or give another --out_dir')

    # The device of this process, and the corpus
    own_gpu = world > 1 and cfg.device in ('auto', 'cuda') and torch.cuda.is_available()
    device = pick_device(f'cuda:{os.environ["LOCAL_RANK"]}' if own_gpu else cfg.device)
    if device.type == 'mps' and cfg.checkpoint_loops and cfg.dropout:
        raise UserError('--checkpoint_loops with --dropout gives wrong gradients on MPS, where PyTorch does '
                        'not restore the random state: leave one of them out')
    cuda = device.type == 'cuda'
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:  # a large corpus may take rank 0 an hour to fetch and prepare
        dist.init_process_group('cpu:gloo,cuda:nccl' if cuda else 'gloo', timeout=timedelta(hours=2))
        if not master:
            dist.barrier()
    tokens, meta = load_tokens(cfg)
    if world > 1 and master:
        dist.barrier()
    if state and state['corpus'] != meta['hash']:
        raise UserError(f'{cfg.dataset} is not the text that {ckpt_path} was trained on: start another run')

    # Model and optimizer
    dtype = cfg.dtype
    if dtype == 'auto':
        half = 'bfloat16' if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        dtype = half if cuda else 'float32'
    autocast = nullcontext() if dtype == 'float32' else torch.autocast(device.type, getattr(torch, dtype))
    torch.set_float32_matmul_precision('high')  # TF32 on CUDA
    if not state:
        torch.manual_seed(cfg.seed)
        model = LoopedGPT(cfg)
    model.to(device).train()
    optimizer = configure_optimizer(model, cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
    start = 0
    if state:
        optimizer.load_state_dict({**optimizer.state_dict(), 'state': state['optimizer']['state']})
        if state['scaler'] and scaler.is_enabled():
            scaler.load_state_dict(state['scaler'])
        start, state = state['iter'], None
        say(f'resumed at iteration {start} of {cfg.max_iters}'
            + (', so nothing is left to do: raise --max_iters' if start >= cfg.max_iters else ''))
    model.checkpoint_loops = cfg.checkpoint_loops
    compiled = cfg.compile == 'True' or (cfg.compile == 'auto' and cuda and importlib.util.find_spec('triton')
                                         and torch.cuda.get_device_capability(device) >= (7, 0))
    if compiled:
        model.compile_regions()
        torch._dynamo.config.optimize_ddp = False  # it would cut each block in pieces, to overlap nothing
    wrapped = model
    if world > 1:  # with one loop, the recurrence has parameters that nothing uses
        wrapped = DistributedDataParallel(model, find_unused_parameters=cfg.loops == 1)
    peak = next((flops for name, flops in PEAK_FLOPS.items()
                 if cuda and dtype != 'float32' and name in torch.cuda.get_device_name(device)), None)
    count = sum(p.numel() for p in model.parameters())
    say(f'{count:,} parameters, {cfg.n_layer} blocks x {cfg.loops} loops, readout {cfg.readout}, '
        f'recurrence {cfg.recurrence}, supervision {cfg.supervision}'
        + (f', norm penalty {cfg.norm_penalty:g}' if cfg.norm_penalty else ''))
    say(f'{device} x {world}, {dtype}, {"compiled" if compiled else "eager"}; {cfg.dataset}: '
        f'{meta["tokens"]["train"]:,} training tokens; run folder {out_dir}')

    # What the loop below does now and then, at its iteration `it`
    it = start
    good = torch.tensor(start, device=device)  # counts with `it` while loss and gradient are finite
    asked = [0]  # the signal that asks for a stop; no tensor, as it may come while dynamo traces

    def diverged(at):
        kept = f'{ckpt_path} is the last good checkpoint' if ckpt_path.exists() else 'none was saved yet'
        raise UserError(f'the loss, its gradient or a weight is not finite at iteration {at}; {kept}. '
                        f'Try a smaller --learning_rate, or --grad_clip=1')

    def check():  # waits for the device, so only where something else does
        if good.item() < it or scaler.get_scale() < 2 ** -10:  # float16 that skips every step
            diverged(good.item())

    def save():
        save_checkpoint(ckpt_path, dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                                        scaler=scaler.state_dict(), iter=it, config=asdict(cfg),
                                        corpus=meta['hash']))

    @torch.no_grad()
    def evaluate() -> dict | None:
        """Print and return cross-entropy at every exit, of both splits; of val also the state norm at every
        loop, and bits per byte at the last exit. None where a stop is asked for meanwhile."""
        model.eval()
        mean = {}
        for split in 'train', 'val':
            outs = []
            for idx, targets in eval_batches(tokens[split], cfg, cfg.eval_iters, device):
                if asked[0]:
                    return None
                with autocast:
                    out = model(idx, targets)
                outs.append(torch.stack((out.losses, out.norms)))
            mean[split] = torch.stack(outs).mean(0).tolist()
        model.train()
        (train_losses, _), (val_losses, norms) = mean['train'], mean['val']
        if not all(map(math.isfinite, val_losses + norms)):
            diverged(it)
        bpb = val_losses[-1] / math.log(2) * meta['tokens']['val'] / meta['bytes']['val']
        say(f'eval {it:>6}  val CE at exits 1..{cfg.loops}: {" ".join(f"{x:.3f}" for x in val_losses)}  '
            f'({bpb:.3f} bits per byte)\n'
            f'             state norm, loops 1..{cfg.loops}: {" ".join(f"{x:.1f}" for x in norms)}')
        return dict(iter=it, train_losses=train_losses, val_losses=val_losses, norms=norms, bpb=bpb)

    if cfg.eval_only:
        if master:
            evaluate()
        return 0

    if master:
        out_dir.mkdir(parents=True, exist_ok=True)
        lines = [asdict(cfg)]
        if cfg.resume:  # what was logged after the checkpoint happens again, as does an evaluation due at it
            due = start % cfg.eval_interval == 0 or start == cfg.max_iters
            lines += [x for x in read_log(log_path)[1:]
                      if x['iter'] < start or x['iter'] == start and ('loss' in x or not due)]
        else:
            ckpt_path.unlink(missing_ok=True)
        temporary = log_path.with_suffix('.tmp')
        temporary.write_text(''.join(json.dumps(line) + '\n' for line in lines))
        os.replace(temporary, log_path)
        log = open(log_path, 'a', buffering=1)  # a line at a time

    # Ctrl-C and SIGTERM ask for a stop before the next step; a second one does not wait
    def ask(signum, _):
        if asked[0]:
            os._exit(128 + signum)
        asked[0] = signum
        if master:
            with suppress(OSError):
                os.write(1, b'stopping and saving (once more: at once, without saving)\n')
    for s in signal.SIGINT, signal.SIGTERM:
        signal.signal(s, ask)

    # The loop
    clock, logged = time.perf_counter(), start
    batch = train_batch(tokens['train'], cfg, rank, it, device)
    while True:
        if master and (it % cfg.eval_interval == 0 or it == cfg.max_iters):
            check()
            if line := evaluate():
                log.write(json.dumps(line) + '\n')
                if it > start:
                    save()
            clock, logged = time.perf_counter(), it
        stop = torch.tensor(asked)
        if world > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX)  # on the CPU: all ranks stop before the same step
        if stop.item():
            if master:
                check()
                save()
            launch = 'python' if world == 1 else 'torchrun …'
            say(f'stopped at iteration {it}; go on with: {launch} train.py --resume --out_dir={out_dir}')
        if stop.item() or it >= cfg.max_iters:
            break

        lr = learning_rate(cfg, it)
        for group in optimizer.param_groups:
            group['lr'] = lr
        torch.manual_seed(hash((cfg.seed, rank, it)) % 2 ** 63)  # dropout, too, is a function of these alone
        loss = 0.0
        for i, (idx, targets) in enumerate(zip(*(x.split(cfg.batch_size) for x in batch)), 1):
            last = i == cfg.gradient_accumulation_steps  # only then do the gradients of all processes meet
            with autocast, nullcontext() if last or world == 1 else wrapped.no_sync():
                out = wrapped(idx, targets)
                scaler.scale(out.loss / cfg.gradient_accumulation_steps).backward()
            loss += out.loss.detach() / cfg.gradient_accumulation_steps
        batch = train_batch(tokens['train'], cfg, rank, it + 1, device)  # while the GPU is still busy
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        finite = torch.isfinite(loss) & (torch.isfinite(norm) | scaler.is_enabled())  # the scaler skips those
        good += finite & (good == it)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        it += 1

        if master and (it % cfg.log_interval == 0 or it == cfg.max_iters):
            loss, norms = loss.item(), out.norms.tolist()
            check()
            seconds = (time.perf_counter() - clock) / (it - logged)
            clock, logged = time.perf_counter(), it
            rate = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size * world / seconds
            left = timedelta(seconds=round(seconds * (cfg.max_iters - it)))
            mfu = f'  mfu {rate / world * model.flops_per_token() / peak:.1%}' if peak else ''
            say(f'iter {it:>6}/{cfg.max_iters}  loss {loss:.4f}  norm {norms[0]:.1f} -> {norms[-1]:.1f}  '
                f'{seconds * 1e3:.0f} ms  {rate:,.0f} tok/s{mfu}  {left} left')
            log.write(json.dumps(dict(iter=it, loss=loss, norms=norms, lr=lr, ms=seconds * 1e3)) + '\n')

    if world > 1:
        dist.barrier()  # no rank leaves while another still talks to it
    return 128 + stop.item() if stop.item() else 0


def main(argv=None):
    cfg, given = FlagParser(TrainConfig, __doc__).parse(argv)
    try:
        code = train(cfg, given)
    except (UserError, OSError) as e:
        code = f'train.py: {e}'
    except (torch.OutOfMemoryError, MemoryError) as e:
        code = (f'train.py: out of memory ({str(e).splitlines()[0]}): try --checkpoint_loops, or a smaller '
                f'--batch_size with more --gradient_accumulation_steps')
    except KeyboardInterrupt:  # before the loop, where there is nothing to save
        code = 130
    if dist.is_initialized():
        if isinstance(code, str):  # NCCL would wait here for the other ranks, and they wait for this one
            print(code, file=sys.stderr, flush=True)
            os._exit(1)
        gc.collect()  # DDP is a cycle that holds the group, whose threads must end before the interpreter
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == '__main__':
    main()
