"""
Train a looped language model on the CPU of a laptop, on one GPU or on several.

    python train.py --readout=rms --loops=8
    torchrun --standalone --nproc_per_node=4 train.py --gradient_accumulation_steps=4

A run is a folder: ckpt.pt, and log.jsonl (the flags, then one line per logged step or evaluation).
"""

import argparse
import ast
import io
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data.prepare import BUILTIN, UserError, prepare
from looped import LoopedConfig, LoopedGPT, flag


@dataclass
class TrainConfig(LoopedConfig):
    """Every flag of train.py: the model's, then these."""
    dataset: str = flag('python', f'{", ".join(BUILTIN)}, or a file or folder of your own text')
    init_from: str = flag('', 'folder of a run whose weights and flags this one starts from')
    batch_size: int = flag(8, 'sequences per micro-step', low=1, high=2 ** 20)
    gradient_accumulation_steps: int = flag(1, 'micro-steps per update, shared by all processes', low=1)
    max_iters: int = flag(1600, 'updates in all', low=1)
    learning_rate: float = flag(1e-2, 'after the warm-up')
    warmup_iters: int = flag(0, 'updates of linear warm-up')
    lr_decay_iters: int = flag(0, 'where a cosine reaches min_lr; 0: the rate is constant, as in the paper')
    min_lr: float = flag(0.0, 'learning rate at lr_decay_iters')
    weight_decay: float = flag(0.01, 'decoupled, on every parameter, as in the paper')
    beta1: float = flag(0.9, 'of AdamW', high=0.99999)
    beta2: float = flag(0.999, 'of AdamW', high=0.99999)
    grad_clip: float = flag(1.0, 'largest norm of the gradient; 0 does not clip')
    seed: int = flag(1, 'of weights, batches and dropout', high=2 ** 32)
    dtype: str = flag('auto', 'of matrix products; auto: bfloat16 on a GPU that has it',
                      ('auto', 'float32', 'bfloat16'))
    # from here on: without influence on the result, so not in the name of the run
    device: str = flag('auto', 'auto is cuda, then mps, then cpu; also cuda:1', result=False)
    compile: str = flag('auto', 'torch.compile; auto: cuda on Linux', ('auto', 'True', 'False'), result=False)
    checkpoint_loops: bool = flag(False, 'less memory: compute loops again in backward', result=False)
    out_dir: str = flag('', 'folder of the run; named after the flags if left out', result=False)
    eval_interval: int = flag(200, 'updates between evaluations, which also save', low=1, result=False)
    eval_iters: int = flag(50, 'batches per split and evaluation', low=1, high=2 ** 20, result=False)
    log_interval: int = flag(20, 'updates between log lines', low=1, result=False)
    resume: bool = flag(False, 'continue the run in out_dir; other flags may change', result=False)
    overwrite: bool = flag(False, 'replace the run in out_dir', result=False)


# ------------------------------------------------------------------------------------------------------------
# The command line. sample.py and plot_norms.py use it, too.


def parse_flags(config_class, about: str, argv: list[str] | None, **positional) -> tuple:
    """The config, and the dict of what was typed: a flag for each field of a dataclass, and `positional`
    arguments. A mistake ends in one line that names the flag, and exit code 2."""
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: parser.exit(2, f'{parser.prog}: {message} (see --help)\n')
    for name, options in positional.items():
        parser.add_argument(name, **options)
    model, training, machine = map(parser.add_argument_group, ('model', 'training', 'machine and output'))
    defaults = config_class()
    for f in fields(config_class):
        group = parser  # sample.py and plot_norms.py have one group
        if issubclass(config_class, TrainConfig):
            group = training if f.metadata.get('result', True) else machine
            if f.name in LoopedConfig.__dataclass_fields__:
                group = model
        choices = f.metadata.get('choices') or None
        metavar = None if choices else getattr(f.type, '__name__', 'value').upper()
        bare = dict(nargs='?', const=True) if f.type is bool else {}  # --resume is --resume=True
        text = f'{f.metadata.get("help", "")} (default: {getattr(defaults, f.name)!r})'
        group.add_argument(f'--{f.name}', type=str if f.type is str else literal, choices=choices, **bare,
                           metavar=metavar, default=argparse.SUPPRESS, help=text.replace('%', '%%'))
    typed = vars(parser.parse_args(argv))
    try:
        return config_class(**{name: typed[name] for name in typed if name not in positional}), typed
    except ValueError as e:  # its message begins with the name of the field
        parser.error(f'--{e}')


def literal(text: str):
    """3, 1e-2, True, (1, 2): a value as Python writes it, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def one_line_errors(main):
    """Decorates main(argv): a user's mistake is one line and exit code 1, a bug keeps its traceback."""
    def program(argv=None):
        with suppress(AttributeError):  # a notebook's stdout can do nothing but write
            sys.stdout.reconfigure(errors='replace')  # for a terminal that is not UTF-8
        try:
            code = main(argv)
        except UserError as e:
            code = f'error: {" ".join(str(e).split())[:600]}'
        except KeyboardInterrupt:
            code = 130
        except BrokenPipeError:  # python sample.py ... | head -1
            sys.stdout = open(os.devnull, 'w')
            code = 141
        if code:
            sys.exit(code)
    return program


def say(line: str):
    """Print a line. If its reader is gone (Ctrl-C ends the tee of `train.py | tee log`, too), go on without
    printing, so that the run is still saved."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, 'w')


# ------------------------------------------------------------------------------------------------------------
# Batches


def load_tokens(cfg: TrainConfig, corpus: str | None = None) -> tuple[dict, dict]:
    """({split: uint16 tokens}, meta), prepared if need be. `corpus` is the hash that a checkpoint has of its
    text. UserError: this is another text."""
    folder, meta = prepare(cfg.dataset, cfg.vocab_size, min_tokens=cfg.block_size + 1)
    if corpus not in (None, meta['hash']):
        raise UserError(f'{cfg.dataset} is not the text that this run was trained on: it was edited, is of '
                        f'another Python, or the text has moved (then --dataset= says where it is)')
    tokens = {split: np.memmap(folder / f'{split}.bin', np.uint16, 'r') for split in ('train', 'val')}
    return tokens, meta


def windows(tokens, starts, block_size: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """idx and targets, each (len(starts), block_size) int64, in one read of the memory map."""
    ids = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    ids = torch.from_numpy(ids)
    if device.type == 'cuda':
        ids = ids.pin_memory().to(device, non_blocking=True)
    else:
        ids = ids.to(device)  # on MPS a copy that does not block would read freed memory
    return ids[:, :-1], ids[:, 1:]


def get_batch(tokens, cfg: TrainConfig, rng: np.random.Generator, device):
    """idx and targets (batch_size, block_size): windows that rng draws."""
    starts = rng.integers(len(tokens) - cfg.block_size, size=cfg.batch_size)
    return windows(tokens, starts, cfg.block_size, device)


def eval_batches(tokens, cfg: TrainConfig, count: int, device):
    """`count` batches of (idx, targets): windows spread evenly from end to end, the same for every seed."""
    starts = np.linspace(0, len(tokens) - cfg.block_size - 1, count * cfg.batch_size).astype(np.int64)
    for batch in starts.reshape(count, -1):
        yield windows(tokens, batch, cfg.block_size, device)


@torch.no_grad()
def evaluate(model, cfg: TrainConfig, tokens: dict, meta: dict, autocast) -> dict:
    """Means over cfg.eval_iters batches per split; the norms are of val."""
    model.eval()
    line = {}
    for split in 'train', 'val':
        losses, norms = [], []
        for idx, targets in eval_batches(tokens[split], cfg, cfg.eval_iters, model.tok_emb.weight.device):
            with autocast:
                out = model(idx, targets)
            losses.append(out.losses)
            norms.append(out.norms)
        line[f'{split}_losses'] = torch.stack(losses).mean(0).tolist()
    line['norms'] = torch.stack(norms).mean(0).tolist()
    nats_per_byte = line['val_losses'][-1] * meta['tokens']['val'] / meta['bytes']['val']
    line['bpb'] = nats_per_byte / math.log(2)
    model.train()
    return line


# ------------------------------------------------------------------------------------------------------------
# The optimizer


def configure_optimizer(model: LoopedGPT, cfg: TrainConfig) -> torch.optim.Optimizer:
    params = list(model.parameters())  # one group, as the authors have it: gains decay like matrices
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.AdamW(params, cfg.learning_rate, betas, weight_decay=cfg.weight_decay, fused=True)


def get_lr(it: int, cfg: TrainConfig) -> float:
    """Linear warm-up, then constant, or a cosine down to min_lr, which is reached at lr_decay_iters."""
    if it + 1 < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / cfg.warmup_iters
    if not cfg.lr_decay_iters:
        return cfg.learning_rate
    progress = (it - cfg.warmup_iters) / max(1, cfg.lr_decay_iters - cfg.warmup_iters)
    progress = min(max(progress, 0.0), 1.0)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# ------------------------------------------------------------------------------------------------------------
# The folder of a run


def result_flags(cfg: TrainConfig, base: TrainConfig | None = None) -> dict:
    """The flags that change the result and differ from those of `base`; without it, from their defaults."""
    base = base or type(cfg)()
    names = [f.name for f in fields(cfg) if f.metadata.get('result', True)]
    return {name: getattr(cfg, name) for name in names if getattr(cfg, name) != getattr(base, name)}


def run_folder(cfg: TrainConfig) -> Path:
    """cfg.out_dir, or a name made of the flags that change the result: ablations land side by side."""
    if cfg.out_dir:
        return Path(cfg.out_dir).expanduser()
    name = f'{cfg.dataset}-{cfg.readout}-{cfg.recurrence}-{cfg.supervision}'
    short = dict(norm_penalty='pen', loops='k', learning_rate='lr', seed='s', max_iters='i')
    for key, value in result_flags(cfg).items():
        if key not in ('dataset', 'readout', 'recurrence', 'supervision'):
            text = '' if value is True else f'={value}' if isinstance(value, str) else f'{value}'
            name += f'-{short.get(key, key)}{text}'
    return Path('out', re.sub(r'[^\w.=+-]+', '_', name).lstrip('-._'))


def claim(out_dir: Path, cfg: TrainConfig):
    """Make and lock the run's folder; the lock is held as long as what is returned. UserError: another
    process has it, or a run in it would be lost."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / '.lock', 'a')
    except OSError as e:
        raise UserError(f'{out_dir} cannot hold a run ({e.strerror}): give another --out_dir') from e
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f'another process trains in {out_dir}: wait for it, or give another --out_dir') from e
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks: nothing is locked
    holds_run = (out_dir / 'ckpt.pt').exists() or (out_dir / 'log.jsonl').exists()
    if holds_run and not cfg.resume and not cfg.overwrite:
        raise UserError(f'{out_dir} holds a run: give --resume, --overwrite or another --out_dir')
    return lock


def write_file(path: Path, data: bytes):
    """Put data at path, whole or not at all. UserError: no room, or not allowed."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f'could not write {path} ({e.strerror}); what was saved before stays') from e


def check_finite(numbers: list, it: int):
    """UserError where a number is inf or nan."""
    if not all(math.isfinite(x) for x in numbers):
        raise UserError(f'loss not finite at iteration {it}; what was saved stays: lower --learning_rate')


def save(out_dir: Path, log: list[dict], model, optimizer, it: int, cfg: TrainConfig, corpus: str):
    """Tensors and plain values only, so that the checkpoint loads without running code. It holds the log,
    too: one rename saves the whole run, and log.jsonl is a copy to read. UserError: weights that are not
    finite, or a full disk."""
    check_finite([p.square().sum().item() for p in model.parameters()], it)
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), iter=it, log=log,
                 config=asdict(cfg), corpus=corpus)
    buffer = io.BytesIO()
    torch.save(state, buffer)  # in memory first: what fails below is only the disk
    write_file(out_dir / 'ckpt.pt', buffer.getbuffer())
    write_file(out_dir / 'log.jsonl', ''.join(json.dumps(line) + '\n' for line in log).encode())


def load_checkpoint(path: Path, given: dict | None = None) -> tuple[LoopedGPT, TrainConfig, dict]:
    """What a run saved: the model (on the CPU, in eval mode), its flags with those `given` laid over them,
    and the rest. UserError: missing, damaged, or not of this code and these flags."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        saved = TrainConfig(**state['config'])
        # how that run was started is not inherited
        cfg = replace(saved, **{'resume': False, 'overwrite': False, **(given or {})})
        # a plain dict: a file's _metadata could make torch adopt its tensors instead of copying them
        weights = dict(state['model'])
        state['iter'] = int(state['iter'])
    except OSError as e:
        raise UserError(f'no checkpoint {path} ({e.strerror}): name the folder of a trained run') from e
    except Exception as e:  # a foreign file can raise anything, and torch's message advises to trust it
        reason = 'not a file of train.py' if 'weights_only' in str(e) else f'{type(e).__name__}: {e}'
        raise UserError(f'{path} cannot be read by this train.py and flags ({reason})') from e
    state['changed'] = result_flags(cfg, saved)
    for name in state['changed']:
        if not TrainConfig.__dataclass_fields__[name].metadata.get('resume', True):
            raise UserError(f'--{name} only acts on new weights: leave it out')
    model = LoopedGPT(cfg).eval()
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise UserError(f'{path} does not fit this code and {state["changed"] or "its flags"} ({e})') from e
    return model, cfg, state


def load_moments(optimizer, state: dict, path: Path):
    """Go on with the moments of a checkpoint. UserError: they are not those of these parameters."""
    try:
        # the moments of the file, the rate and decay of the flags
        optimizer.load_state_dict({**optimizer.state_dict(), 'state': state['optimizer']['state']})
        if state['iter'] and not optimizer.state:
            raise ValueError('there are none')
        for p, moments in optimizer.state.items():
            for name, t in moments.items():
                # A fused step trusts shape and strides: a file must not choose where it reads and writes.
                fresh = torch.empty((), device=t.device) if name == 'step' else torch.empty_like(p)
                if t.shape != fresh.shape:
                    raise ValueError(f'{name} of shape {list(t.shape)} for weights of shape {list(p.shape)}')
                moments[name] = fresh.copy_(t)
    except Exception as e:  # a foreign file can raise anything
        raise UserError(f'{path} is of another optimizer ({type(e).__name__}: {e}): try --init_from') from e


# ------------------------------------------------------------------------------------------------------------
# Device, signals, processes


def pick_device(name: str, n_embd: int = 0) -> torch.device:
    """'auto' is CUDA, then MPS, then the CPU, where a model of few channels gets one thread. UserError for a
    device that does not work here."""
    mps_is_right = torch.__version__ >= (2, 13)  # before, attention there is wrong (pytorch issue 195910)
    if name == 'auto':
        mps = torch.backends.mps.is_available() and mps_is_right
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    if name.startswith('mps') and not mps_is_right:
        raise UserError('on MPS, attention is wrong before torch 2.13: give --device=cpu')
    if name.startswith('cuda') and 'LOCAL_RANK' in os.environ:
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        raise UserError(f'--device={name} does not work here, try --device=auto ({e})') from e
    device = torch.device(name)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    elif device.type == 'cpu' and 0 < n_embd <= 128 and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(1)  # a small model's threads wait for each other on a busy machine
    return device


@contextmanager
def stop_signals():
    """A list that fills with the signals that arrive. Ctrl-C or SIGTERM asks for a stop; a second one is not
    caught, and ends the process at once."""
    signals = []

    def ask(signum, frame):
        signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        with suppress(OSError):  # the same Ctrl-C has ended the reader of `2>&1 | tee log`
            os.write(2, b'stopping and saving (once more: at once, without saving)\n')

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def agree(number: int, world: int) -> int:
    """The largest of the numbers that the processes bring. All wait here for each other."""
    if world == 1:
        return number
    numbers = torch.tensor([number])  # on the CPU, so no GPU is waited for
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


# ------------------------------------------------------------------------------------------------------------
# The recipe


@one_line_errors
def main(argv):
    """The recipe, top to bottom. Gives 0, or 128 + the signal that stopped it."""
    # `given` is what was typed: with --resume and --init_from, all other flags are those of the earlier run
    cfg, given = parse_flags(TrainConfig, __doc__, argv)
    if cfg.resume and (cfg.overwrite or cfg.init_from):
        raise UserError('--resume continues the run in --out_dir: leave out --overwrite and --init_from')

    # Processes: torchrun sets these. All train, the first one alone prints and writes.
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    first = rank == 0
    if not first:
        sys.stdout = open(os.devnull, 'w')

    # What to go on from: nothing, the weights of another run, or the run in out_dir
    model, state = None, dict(iter=0, changed={}, log=[], corpus=None)
    if cfg.init_from:
        path = Path(cfg.init_from).expanduser() / 'ckpt.pt'
        model, cfg, _ = load_checkpoint(path, {'out_dir': '', **given})  # '': not the folder of that run
    out_dir = run_folder(cfg)
    if cfg.resume:
        model, cfg, state = load_checkpoint(out_dir / 'ckpt.pt', given)

    # Device and precision
    device = pick_device(cfg.device, cfg.n_embd)
    cuda = device.type == 'cuda'
    if world > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if cuda else 'gloo')  # gloo for what `agree` agrees on
    micro_steps = cfg.gradient_accumulation_steps
    if micro_steps % world:
        raise UserError(f'{world} processes share --gradient_accumulation_steps: give a multiple of {world}')
    if device.type == 'mps' and cfg.checkpoint_loops and cfg.dropout:
        raise UserError('on MPS, --checkpoint_loops with --dropout gives wrong gradients: leave one out')
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = cfg.dtype == 'bfloat16' or cfg.dtype == 'auto' and has_bf16
    if cuda and cfg.dtype == 'auto' and not bf16:
        say('this GPU has no bfloat16 and trains in float32')
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    torch.set_float32_matmul_precision('high')  # TF32 on CUDA

    # Data: the first process prepares it, the others wait
    if not first:
        agree(0, world)
    tokens, meta = load_tokens(cfg, state['corpus'])
    if first:
        agree(0, world)

    # Model and optimizer
    if model is None:
        torch.manual_seed(cfg.seed)
        model = LoopedGPT(cfg)
        if cfg.output_bias == 'unigram':
            # 1 +: a token that never occurs must not get -inf
            counts = 1 + np.bincount(tokens['train'], minlength=cfg.vocab_size)
            model.output_bias.data = torch.from_numpy(counts / counts.sum()).log().float()
    model.to(device).train()
    if cfg.checkpoint_loops:
        model.recompute()
    optimizer = configure_optimizer(model, cfg)
    it, changed = state['iter'], state['changed']
    if cfg.resume:
        load_moments(optimizer, state, out_dir / 'ckpt.pt')
        say(f'resumed at iteration {it} of {cfg.max_iters}, changed flags: {changed or "none"}')
    compiled = cfg.compile == 'True' or cfg.compile == 'auto' and cuda and sys.platform == 'linux'
    if compiled:
        model.compile_regions()

    # The folder, made only now that all flags are known to work, and its log
    lock = claim(out_dir, cfg) if first else None  # held to the end
    log = [asdict(cfg), *state['log'][1:]]  # its first line is the flags, as they are now
    if changed:
        log.append(dict(iter=it, changed=changed))
    evaluated = [line['iter'] for line in log if 'val_losses' in line]
    parameters = sum(p.numel() for p in model.parameters())
    say(f'{parameters:,} parameters, {meta["tokens"]["train"]:,} training tokens; {world} x {device}, '
        f'{"bfloat16" if bf16 else "float32"}, {"compiled" if compiled else "eager"}; run folder {out_dir}')

    # One step whose gradient is thrown away. What is compiled is compiled here, and not in the first timed
    # step, and what does not fit in memory fails here, before a file changes.
    rng = np.random.default_rng(0)
    with autocast:
        out = model(*get_batch(tokens['train'], cfg, rng, device))
    out.loss.backward()
    optimizer.zero_grad(set_to_none=True)

    # The loop
    clock, clock_it = time.perf_counter(), it
    with stop_signals() as signals:
        while True:
            # evaluate and save
            stop = agree(max(signals, default=0), world)  # so that all stop before the same step
            due = (it % cfg.eval_interval == 0 or it == cfg.max_iters) and it not in evaluated
            if due and not stop:
                line = evaluate(model, cfg, tokens, meta, autocast)
                log.append(dict(iter=it, **line))
                exits = ' '.join(f'{ce:.3f}' for ce in line['val_losses'])
                loops = ' '.join(f'{norm:.1f}' for norm in line['norms'])
                say(f'eval {it:>6}  val CE at exits 1..{cfg.loops}: {exits}  ({line["bpb"]:.3f} bits per '
                    f'byte)\n             state norm, loops 1..{cfg.loops}: {loops}')
            if first and (due or stop):
                save(out_dir, log, model, optimizer, it, cfg, meta['hash'])
            if stop or it >= cfg.max_iters:
                break
            if due:
                clock, clock_it = time.perf_counter(), it

            # one update: the mean gradient of all micro-steps, of which each process does its share
            lr = get_lr(it, cfg)
            for group in optimizer.param_groups:
                group['lr'] = lr
            loss, norms = 0.0, 0.0
            for micro_step in range(rank, micro_steps, world):
                # of these three alone: neither a resume nor the number of processes changes what is trained
                rng = np.random.default_rng((cfg.seed, micro_step, it))
                idx, targets = get_batch(tokens['train'], cfg, rng, device)
                torch.manual_seed(int(rng.integers(2 ** 63)))  # of dropout
                with autocast:
                    out = model(idx, targets)
                (out.loss / micro_steps).backward()
                loss = loss + out.loss.detach() / micro_steps
                norms = norms + out.norms / micro_steps
            if world > 1:
                # Why not DistributedDataParallel: looped weights have their whole gradient only when backward
                # ends, so there is nothing that their exchange could overlap with.
                for p in model.parameters():
                    if p.grad is not None:
                        dist.all_reduce(p.grad)  # the sum
            if cfg.grad_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            it += 1

            # log
            if it % cfg.log_interval == 0 or it == cfg.max_iters:
                if world > 1:
                    dist.all_reduce(loss)
                    dist.all_reduce(norms)
                loss, norms = loss.item(), norms.tolist()  # CPU-GPU sync points; a step has no others
                check_finite([loss, *norms], it)
                seconds = (time.perf_counter() - clock) / (it - clock_it)
                clock, clock_it = time.perf_counter(), it
                rate = cfg.batch_size * micro_steps * cfg.block_size / seconds
                left = timedelta(seconds=round(seconds * (cfg.max_iters - it)))
                tflops = f'  {rate * model.flops_per_token() / 1e12:.0f} TFLOP/s' if cuda else ''
                say(f'iter {it:>6}/{cfg.max_iters}  loss {loss:.4f}  norm {norms[0]:.1f} -> {norms[-1]:.1f}  '
                    f'{seconds * 1e3:.0f} ms  {rate:,.0f} tok/s{tflops}  {left} left')
                log.append(dict(iter=it, loss=loss, norms=norms, lr=lr, ms=seconds * 1e3))

    if stop:
        say(f'stopped at iteration {it}; go on with: python train.py --resume --out_dir="{out_dir}"')
    code = 128 + stop if stop else 0
    if world > 1:
        agree(0, world)  # no process leaves while another still talks to it
        dist.destroy_process_group()
        # skip Python's clean-up, which gloo's threads may abort (pytorch issue 179291)
        os._exit(code)
    return code


if __name__ == '__main__':
    main()
