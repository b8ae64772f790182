"""
Train a looped language model on one GPU, or on the CPU of a laptop.

    python train.py --readout=rms --loops=8

A run is a folder: log.jsonl (the flags, then one line per logged step or evaluation) and ckpt.pt.
"""

import os
import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while torch is imported

import argparse
import difflib
import hashlib
import json
import math
import re
import socket
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from data.prepare import BUILTIN, UserError, prepare, read_meta
from looped import LoopedConfig, LoopedGPT, flag


@dataclass
class TrainConfig(LoopedConfig):
    """Every flag of train.py: the model's, then these."""
    dataset: str = flag('python', f'{", ".join(BUILTIN)}, or a file or folder of your own text')
    out_dir: str = flag('', 'folder of the run; named after the flags if left out', result=False)
    batch_size: int = flag(8, 'sequences per micro-step', low=1, high=2 ** 20)
    gradient_accumulation_steps: int = flag(1, 'micro-steps per update', low=1, high=2 ** 20)
    max_iters: int = flag(1600, 'updates in all', low=1)
    learning_rate: float = flag(1e-3, 'learning rate after warm-up')
    lr_schedule: str = flag('constant', 'after warm-up', ('constant', 'cosine'))
    min_lr: float = flag(0.0, 'where --lr_schedule=cosine ends')
    warmup_iters: int = flag(0, 'updates of linear warm-up')
    weight_decay: float = flag(0.01, 'decoupled, on matrices only')
    beta1: float = flag(0.9, 'of AdamW', high=0.99999)
    beta2: float = flag(0.999, 'of AdamW', high=0.99999)
    grad_clip: float = flag(1.0, 'largest norm of the gradient; 0 does not clip')
    seed: int = flag(1, 'of weights, batches and dropout', high=2 ** 32)
    device: str = flag('auto', 'auto is cuda, then mps, then cpu; also cuda:1', result=False)
    dtype: str = flag('auto', 'of matrix products, not of the state; auto is float32, on cuda bfloat16\n'
                      '(float16 where there is none)', ('auto', 'float32', 'bfloat16', 'float16'))
    compile: str = flag('auto', 'torch.compile; auto: on cuda', ('auto', 'True', 'False'), result=False)
    checkpoint_loops: bool = flag(False, 'compute each loop again in backward: less memory', result=False)
    eval_interval: int = flag(200, 'updates between evaluations, which also save', low=1, result=False)
    eval_iters: int = flag(50, 'batches per split and evaluation', low=1, high=2 ** 20, result=False)
    log_interval: int = flag(20, 'updates between log lines', low=1, result=False)
    resume: bool = flag(False, 'continue the run in out_dir; other flags may change', result=False)
    overwrite: bool = flag(False, 'replace the run in out_dir', result=False)
    eval_only: bool = flag(False, 'evaluate once and stop; with --resume, the checkpoint', result=False)


# --- Flags, errors and devices, shared with sample.py and plot_norms.py -------------------------------------


class FlagParser(argparse.ArgumentParser):
    """A parser with a flag for each field of a dataclass. Errors are one line, and name the nearest flag."""
    largest = 'batch_size'  # the flag to make smaller where memory does not suffice

    def __init__(self, config, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawTextHelpFormatter)
        self.config, words = config, dict(true=True, false=False)
        for f in fields(config):
            choices = f.metadata.get('choices') or ()
            kind = (lambda text: words.get(text.lower(), text)) if f.type is bool else f.type
            switch = dict(nargs='?', const=True) if f.type is bool or 'True' in choices else {}
            meaning = f'{f.metadata.get("help", "")} (default: {f.default!r})'.replace('%', '%%')
            self.add_argument(f'--{f.name}', type=kind, default=argparse.SUPPRESS, help=meaning, **switch,
                              metavar='{' + ','.join(choices) + '}' if choices else f.type.__name__.upper())

    def error(self, message):
        unknown = re.findall('unrecognized arguments: ([^ =]+)', message)
        near = unknown and difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
        self.exit(2, f'{self.prog}: {message}{f"; did you mean {near[0]}?" if near else ""} (see --help)\n')

    def parse(self, argv=None):
        """(the config, the dict of what was typed). Exits with 2 where a value is not allowed."""
        switches = [name for name, action in self._option_string_actions.items() if action.const]
        argv = [f'{word}=True' if word in switches else word  # so that it does not take the next word
                for word in (sys.argv[1:] if argv is None else argv)]
        given = vars(self.parse_args(argv))
        flags = {f.name: f.default for f in fields(self.config) if f.name in given}
        sizes = [x for x in flags if x.endswith(('size', 'layer', 'embd', 'loops', 'eval_iters'))]
        FlagParser.largest = max(sizes, key=lambda x: given[x] // max(1, flags[x]), default='batch_size')
        try:
            return self.config(**{name: given[name] for name in flags}), given
        except ValueError as e:
            self.error(f'--{e}')


def one_line_errors(main):
    """Decorates a program's main(argv): what its user may cause ends in one line on stderr and exit code 1,
    Ctrl-C in 130. Anything else is a bug, perhaps of a fork, and keeps its traceback."""
    def program(argv=None):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout.reconfigure(errors='replace')  # for a terminal that is not UTF-8
        try:
            sys.exit(main(argv))
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as e:
            if isinstance(e, MemoryError) or re.search("out of memory|can't allocate memory", str(e)):
                e = f'out of memory: try a smaller --{FlagParser.largest}, or --checkpoint_loops to train'
            elif not isinstance(e, (UserError, OSError)):
                raise
            sys.exit(f'{Path(main.__code__.co_filename).name}: {e}')
    return program


def pick_device(name: str, n_embd: int = 0) -> torch.device:
    """'auto' is CUDA, then MPS, then the CPU, where a small model takes one thread: several wait for each
    other as soon as the machine is busy. UserError for a device that is not here."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        probe = torch.zeros(1, device=name)
        probe.item()
    except (RuntimeError, AssertionError, ImportError) as e:
        why = str(e).splitlines()[0]
        raise UserError(f'--device={name} does not work here ({why}): try --device=auto') from e
    if probe.is_cuda:
        torch.cuda.set_device(probe.device)
    elif probe.is_cpu and 0 < n_embd <= 128 and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(1)
    return probe.device


# --- A run's folder: its name, its lock, its log, its checkpoint --------------------------------------------


def result_flags(cfg: TrainConfig, base: TrainConfig | None = None) -> dict:
    """The flags that change the result of a run, where they differ from `base`, else from their defaults."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata.get('result', True)
            and getattr(cfg, f.name) != (getattr(base, f.name) if base else f.default)}


def run_folder(cfg: TrainConfig) -> Path:
    """cfg.out_dir, or a name made of the flags that change the result: ablations land side by side."""
    name = f'{cfg.dataset}-{cfg.readout}-{cfg.recurrence}-{cfg.supervision}'
    short = dict(norm_penalty='pen', loops='k', learning_rate='lr', seed='s', max_iters='i')
    for key, value in result_flags(cfg).items():
        if key not in ('dataset', 'readout', 'recurrence', 'supervision'):
            text = f'={value}' if isinstance(value, str) else '' if value is True else f'{value}'
            name += f'-{short.get(key, key)}{text}'
    return Path(cfg.out_dir or 'out/' + re.sub(r'[^\w.=+-]+', '_', name).lstrip('-._'))


def claim(out_dir: Path, cfg: TrainConfig):
    """A lock on the run's folder, gone when the process is. Its file lies elsewhere: no folder is made before
    all is checked. UserError: another process has the lock, or the folder holds a run that would be lost."""
    name = hashlib.sha256(os.fsencode(out_dir.resolve())).hexdigest()[:16]
    lock = open(Path(tempfile.gettempdir(), f'looped-{name}.lock'), 'a')
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f'another process trains in {out_dir}: wait for it, or give another --out_dir') from e
    except (ImportError, OSError):  # Windows, or a file system without locks: nothing is locked
        pass
    saved, logged = (out_dir / 'ckpt.pt').exists(), (out_dir / 'log.jsonl').exists()
    if (saved and cfg.resume == cfg.overwrite) or (logged and not saved and not cfg.overwrite):
        way = '--resume continues it' if saved else 'it has saved no checkpoint'
        raise UserError(f'{out_dir} holds a run: {way}, --overwrite replaces it, or give another --out_dir')
    return lock


@contextmanager
def replacing(path: Path, mode: str = 'wb'):
    """Open a temporary file that becomes `path` in the end: whatever interrupts that, `path` is whole, the
    new one or the old. UserError where it cannot be written."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        why = e.__context__ or e  # torch.save makes a RuntimeError of a full disk
        kept = 'the old one stays' if path.exists() else 'none is there'
        raise UserError(f'could not write {path} ({why}); {kept}: make room and try again') from e
    finally:
        temporary.unlink(missing_ok=True)


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl: the flags, then lines that have `iter`. A last line that a kill cut short is
    left out. UserError: any other line that train.py did not write."""
    *whole, _ = path.read_bytes().split(b'\n')
    lines = []
    for i, text in enumerate(whole or [b'']):
        try:
            lines.append(json.loads(text))
            if type(lines[i]['iter' if i else 'loops']) is not int:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise UserError(f'{path}: line {i + 1} is not of train.py; mend it, or move the file away') from e
    return lines


def begin_log(path: Path, cfg: TrainConfig, start: int, changed: dict):
    """Write the flags and, at --resume, what was logged up to `start`, where an evaluation may come again."""
    lines, due = [asdict(cfg)], start % cfg.eval_interval == 0 or start == cfg.max_iters
    if cfg.resume and path.exists():
        lines += [x for x in read_log(path)[1:] if x['iter'] < start or x['iter'] == start
                  and ('loss' in x or 'bpb' in x and not due)]
    if changed:
        lines.append(dict(iter=start, changed=changed))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, 'w') as f:
        f.writelines(json.dumps(line) + '\n' for line in lines)
    if not cfg.resume:
        path.with_name('ckpt.pt').unlink(missing_ok=True)


def append(path: Path, line: dict):
    try:
        with open(path, 'a') as f:
            f.write(json.dumps(line) + '\n')
    except OSError as e:
        raise UserError(f'could not write {path} ({e}): make room, and go on with --resume') from e


def load_checkpoint(path: Path, given: dict | None = None) -> tuple[LoopedGPT, TrainConfig, dict]:
    """What a run saved, checked: the model (on the CPU, in eval mode), its flags with those `given` laid over
    them, and the dict with iter, optimizer, scaler, corpus, and `changed`, the given ones that change the
    result. UserError: missing, damaged, or with other parameters than this code builds with these flags."""
    try:
        state = dict(torch.load(path, map_location='cpu', weights_only=True))
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f'no checkpoint {path} (yet): name the folder of a run that has been trained '
                        f'(train.py: --out_dir)') from e
    except Exception as e:  # whatever a foreign file brings
        if isinstance(e, (OSError, MemoryError)) or "can't allocate memory" in str(e):
            raise
        raise UserError(f'{path} is truncated or is no checkpoint ({type(e).__name__})') from e
    try:
        saved, it, corpus = TrainConfig(**state['config']), state['iter'], state['corpus']
        cfg = replace(saved, **{'overwrite': False, 'eval_only': False, **(given or {})})
        if type(it) is not int or not 0 <= it <= 10 ** 9 or type(corpus) is not str:
            raise ValueError(f'iter is {it!r} and corpus {corpus!r}')
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f'{path} does not fit this train.py and these flags ({type(e).__name__}: {e})') from e
    state['changed'] = result_flags(cfg, saved)
    with torch.device('meta'):  # allocates nothing
        model = LoopedGPT(cfg)
    try:
        model.load_state_dict(state['model'], assign=True)
        params = [p for group in configure_optimizer(model, cfg).param_groups for p in group['params']]
        for i, moments in state['optimizer']['state'].items():
            for name, moment in moments.items():  # a fused step would write beyond the end of a smaller one
                if moment.shape != {'step': ()}.get(name, params[i].shape):
                    raise ValueError(f'{name} of parameter {i} has the shape {tuple(moment.shape)}')
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        flags = ' '.join(f'--{key}={value}' for key, value in state['changed'].items()) or 'its flags'
        why = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
        raise UserError(f'{path} is not of the model that this code builds with {flags} ({why})') from e
    model = LoopedGPT(cfg).eval()
    model.load_state_dict(state.pop('model'))
    return model, cfg, state


# --- Batches ------------------------------------------------------------------------------------------------


def load_tokens(cfg: TrainConfig, corpus: str | None = None) -> tuple[dict, dict]:
    """({'train': tokens, 'val': tokens}, meta): memory-mapped uint16, prepared first if need be.
    UserError where `corpus`, the hash that a run keeps, is of another text."""
    folder = prepare(cfg.dataset, cfg.vocab_size, min_tokens=cfg.block_size + 1)
    meta = read_meta(folder)
    if corpus not in (None, meta['hash']):
        raise UserError(f'{cfg.dataset} is not the text that this run was trained on: start another run')
    tokens = {split: np.memmap(folder / f'{split}.bin', np.uint16, 'r') for split in ('train', 'val')}
    if (largest := max(t.max() for t in tokens.values())) >= cfg.vocab_size:
        raise UserError(f'{folder} holds token {largest}, outside vocab_size {cfg.vocab_size}: delete that '
                        f'folder, and the corpus is prepared again')
    return tokens, meta


def windows(tokens, starts, block_size: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """idx and targets, each (len(starts), block_size) int64, in one read of the memory map."""
    ids = torch.from_numpy(tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    ids = (ids.pin_memory() if device.type == 'cuda' else ids).to(device, non_blocking=True)
    return ids[:, :-1], ids[:, 1:]


def train_batch(tokens, cfg: TrainConfig, it: int, device, rank=0) -> tuple[torch.Tensor, torch.Tensor]:
    """All micro-steps of iteration `it`: a function of (seed, rank, it) alone. Rank 0 is the only process."""
    rng = np.random.default_rng((cfg.seed, rank, it))
    starts = rng.integers(len(tokens) - cfg.block_size, size=cfg.gradient_accumulation_steps * cfg.batch_size)
    return windows(tokens, starts, cfg.block_size, device)


def eval_batches(tokens, cfg: TrainConfig, count: int, device):
    """`count` batches of (idx, targets): evenly spaced windows, the same whatever the seed."""
    starts = np.linspace(0, len(tokens) - cfg.block_size - 1, count * cfg.batch_size).astype(np.int64)
    for batch in starts.reshape(count, -1):
        yield windows(tokens, batch, cfg.block_size, device)


# --- The parts of the recipe --------------------------------------------------------------------------------


def say(line: str):
    try:
        print(line, flush=True)
    except BrokenPipeError:  # Ctrl-C has ended the tee that was reading, too
        sys.stdout = open(os.devnull, 'w')


def watch_signals() -> list:
    """[0], which becomes [signal] when Ctrl-C or SIGTERM asks for a stop before the next step. The second one
    ends the process: a thread waits for it, as Python's own handlers wait for a long call into C to end."""
    asked, (reader, writer) = [0], socket.socketpair()

    def ask(signum, _):
        asked[0] = asked[0] or signum

    def watch():
        reader.recv(1)
        say('stopping and saving (once more: at once, without saving)')
        os._exit(128 + reader.recv(1)[0])
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach())
    for s in signal.SIGINT, signal.SIGTERM:
        signal.signal(s, ask)
    threading.Thread(target=watch, daemon=True).start()
    return asked


def learning_rate(cfg: TrainConfig, it: int) -> float:
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / cfg.warmup_iters
    if cfg.lr_schedule == 'constant':
        return cfg.learning_rate
    done = (it - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1, done)))


def configure_optimizer(model: LoopedGPT, cfg: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                             fused=matrices[0].device.type in ('cpu', 'cuda'))


@torch.no_grad()
def evaluate(model, cfg: TrainConfig, tokens: dict, meta: dict, autocast, asked=(0,)) -> dict:
    """Cross-entropy at every exit, of both splits; of val also the norm at every loop, and bits per byte at
    the last exit: means over cfg.eval_iters batches, or over one where a stop is asked for."""
    model.eval()
    mean = {}
    for split in 'train', 'val':
        outs = []
        for idx, targets in eval_batches(tokens[split], cfg, cfg.eval_iters, model.tok_emb.weight.device):
            with autocast:
                out = model(idx, targets)
            outs.append(torch.stack((out.losses, out.norms)))
            if asked[0]:
                break
        mean[split] = torch.stack(outs).mean(0).tolist()
    model.train()
    (train_losses, _), (val_losses, norms) = mean['train'], mean['val']
    bpb = val_losses[-1] / math.log(2) * meta['tokens']['val'] / meta['bytes']['val']
    return dict(train_losses=train_losses, val_losses=val_losses, norms=norms, bpb=bpb)


def check_finite(good: int, it: int, numbers: list, ckpt_path: Path):
    """UserError where not all went well up to iteration `it`, or where one of the numbers is not finite."""
    if good < it or not all(map(math.isfinite, numbers)):
        kept = f'{ckpt_path} is the last good checkpoint' if ckpt_path.exists() else 'nothing is saved yet'
        raise UserError(f'the loss, its gradient or a weight is not finite at iteration {good}; {kept}. '
                        f'Try a smaller --learning_rate')


def save_checkpoint(path: Path, model, optimizer, scaler, it: int, cfg: TrainConfig, meta: dict):
    """Tensors and plain values only, so that torch.load(path, weights_only=True) reads it."""
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                 iter=it, config=asdict(cfg), corpus=meta['hash'])
    with replacing(path) as f:
        torch.save(state, f)


def train(cfg: TrainConfig, given: dict) -> int:
    """The recipe. `given` holds the flags that were typed; --resume lays them over the run's own.
    Gives the exit code: 0, or 128 + the signal that stopped the run."""
    # The folder, the device, the corpus. Nothing on disk changes before all that can fail early has passed.
    out_dir, state = run_folder(cfg), None
    log_path, ckpt_path = out_dir / 'log.jsonl', out_dir / 'ckpt.pt'
    lock = None if cfg.resume and cfg.eval_only else claim(out_dir, cfg)  # held to the end
    if cfg.resume:
        model, cfg, state = load_checkpoint(ckpt_path, given)
    device = pick_device(cfg.device, cfg.n_embd)
    if device.type == 'mps' and cfg.checkpoint_loops and cfg.dropout:
        raise UserError('--checkpoint_loops with --dropout gives wrong gradients on MPS, where PyTorch does '
                        'not restore the random state: leave one of them out')
    tokens, meta = load_tokens(cfg, state and state['corpus'])

    # Model and optimizer
    cuda = device.type == 'cuda'
    half = 'bfloat16' if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    dtype = cfg.dtype if cfg.dtype != 'auto' else half if cuda else 'float32'
    autocast = nullcontext() if dtype == 'float32' else torch.autocast(device.type, getattr(torch, dtype))
    torch.set_float32_matmul_precision('high')  # TF32 on CUDA
    if not state:
        torch.manual_seed(cfg.seed)
        model = LoopedGPT(cfg)
        if cfg.output_bias == 'unigram':  # every token counts once more than it occurs
            counts = 1 + np.bincount(tokens['train'], minlength=cfg.vocab_size)
            model.output_bias.data = torch.from_numpy(counts / counts.sum()).log().float()
    model.checkpoint_loops = cfg.checkpoint_loops
    model.to(device).train()
    optimizer, start, changed = configure_optimizer(model, cfg), 0, {}
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
    if state:
        optimizer.load_state_dict({**optimizer.state_dict(), 'state': state['optimizer']['state']})
        if state.get('scaler') and scaler.is_enabled():
            scaler.load_state_dict(state['scaler'])
        start, changed, state = state['iter'], state['changed'], None
        say(f'resumed at iteration {start} of {cfg.max_iters}'
            + ''.join(f', {name} is now {value}' for name, value in changed.items())
            + (', so nothing is left to do: raise --max_iters' if start >= cfg.max_iters else ''))
    compiled = cfg.compile == 'True' or (cfg.compile == 'auto' and cuda and find_spec('triton')
                                         and torch.cuda.get_device_capability(device) >= (7, 0))
    if compiled:
        model.compile_regions()
    say(f'{sum(p.numel() for p in model.parameters()):,} parameters, {cfg.n_layer} blocks x {cfg.loops} '
        f'loops, readout {cfg.readout}, recurrence {cfg.recurrence}, supervision {cfg.supervision}\n'
        f'{device}, {dtype}, {"compiled" if compiled else "eager"}; {cfg.dataset}: '
        f'{meta["tokens"]["train"]:,} training tokens; run folder {out_dir}')
    batch = train_batch(tokens['train'], cfg, start, device)
    next(eval_batches(tokens['val'], cfg, cfg.eval_iters, device))
    asked, writes = watch_signals(), not cfg.eval_only
    if writes:
        begin_log(log_path, cfg, start, changed)

    # The loop
    it, stop, clock, logged = start, 0, time.perf_counter(), start
    good = torch.tensor(start, device=device)  # counts with `it` while loss and gradient are finite
    while True:
        if it % cfg.eval_interval == 0 or it == cfg.max_iters or cfg.eval_only or asked[0]:
            line = evaluate(model, cfg, tokens, meta, autocast, asked)
            stop = asked[0]
            check_finite(good.item(), it, line['val_losses'] + line['norms'], ckpt_path)
            if not stop:
                ce = ' '.join(f'{x:.3f}' for x in line['val_losses'])
                norms = ' '.join(f'{x:.1f}' for x in line['norms'])
                say(f'eval {it:>6}  val CE at exits 1..{cfg.loops}: {ce}  ({line["bpb"]:.3f} bits per byte)\n'
                    f'             state norm, loops 1..{cfg.loops}: {norms}')
                if writes:
                    append(log_path, dict(iter=it, **line))
            if writes and (stop or it > start):
                save_checkpoint(ckpt_path, model, optimizer, scaler, it, cfg, meta)
            clock, logged = time.perf_counter(), it
        if stop or it >= cfg.max_iters or cfg.eval_only:
            break

        lr = learning_rate(cfg, it)
        for group in optimizer.param_groups:
            group['lr'] = lr
        torch.manual_seed(hash((cfg.seed, 0, it)) % 2 ** 63)  # dropout, too, is a function of these alone
        loss = 0.0
        for idx, targets in zip(*(x.split(cfg.batch_size) for x in batch)):
            with autocast:
                out = model(idx, targets)
            scaler.scale(out.loss / cfg.gradient_accumulation_steps).backward()
            loss += out.loss.detach() / cfg.gradient_accumulation_steps
        batch = train_batch(tokens['train'], cfg, it + 1, device)  # while the GPU is still busy
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        finite = torch.isfinite(loss) & (torch.isfinite(norm) | scaler.is_enabled())  # the scaler skips those
        good += finite & (good == it)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        it += 1

        if it % cfg.log_interval == 0 or it == cfg.max_iters:
            loss, norms = loss.item(), out.norms.tolist()  # the device is waited for here, and nowhere above
            stuck = scaler.get_scale() < 2 ** -10  # float16 skips every step
            check_finite(good.item(), it + stuck, norms, ckpt_path)
            seconds = (time.perf_counter() - clock) / (it - logged)
            clock, logged = time.perf_counter(), it
            rate = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size / seconds
            left = timedelta(seconds=round(seconds * (cfg.max_iters - it)))
            work = f'  {rate * model.flops_per_token() / 1e12:.0f} TFLOP/s' if cuda else ''
            say(f'iter {it:>6}/{cfg.max_iters}  loss {loss:.4f}  norm {norms[0]:.1f} -> {norms[-1]:.1f}  '
                f'{seconds * 1e3:.0f} ms  {rate:,.0f} tok/s{work}  {left} left')
            append(log_path, dict(iter=it, loss=loss, norms=norms, lr=lr, ms=seconds * 1e3))

    if stop and writes:
        say(f'stopped at iteration {it}; go on with: python train.py --resume --out_dir={out_dir}')
    return 128 + stop if stop else 0


@one_line_errors
def main(argv=None):
    return train(*FlagParser(TrainConfig, __doc__).parse(argv))


if __name__ == '__main__':
    main()
