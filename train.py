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
import json
import math
import re
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.utils._triton import has_triton

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
    learning_rate: float = flag(1e-3, 'constant after the warm-up')
    warmup_iters: int = flag(0, 'updates of linear warm-up')
    weight_decay: float = flag(0.01, 'decoupled, on matrices only')
    beta1: float = flag(0.9, 'of AdamW', high=0.99999)
    beta2: float = flag(0.999, 'of AdamW', high=0.99999)
    grad_clip: float = flag(1.0, 'largest norm of the gradient; 0 does not clip')
    seed: int = flag(1, 'of weights, batches and dropout', high=2 ** 32)
    device: str = flag('auto', 'auto is cuda, then mps, then cpu; also cuda:1', result=False)
    dtype: str = flag('auto', 'of products; auto: bfloat16 if cuda has it', ('auto', 'float32', 'bfloat16'))
    compile: str = flag('auto', 'torch.compile; auto: on cuda', ('auto', 'True', 'False'), result=False)
    checkpoint_loops: bool = flag(False, 'compute each loop again in backward: less memory', result=False)
    eval_interval: int = flag(200, 'updates between evaluations, which also save', low=1, result=False)
    eval_iters: int = flag(50, 'batches per split and evaluation', low=1, high=2 ** 20, result=False)
    log_interval: int = flag(20, 'updates between log lines', low=1, result=False)
    resume: bool = flag(False, 'continue the run in out_dir; other flags may change', result=False)
    overwrite: bool = flag(False, 'replace the run in out_dir', result=False)


class FlagParser(argparse.ArgumentParser):
    """A parser with a flag for each field of a dataclass. Errors are one line, and name the nearest flag."""

    def __init__(self, config, about):
        super().__init__(description=about, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
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
        near = unknown and difflib.get_close_matches(unknown[0], self._option_string_actions, 1, 0.7)
        self.exit(2, f'{self.prog}: {message}{f"; did you mean {near[0]}?" if near else ""} (see --help)\n')

    def parse(self, argv: list[str]):
        """(the config, the dict of what was typed). Exits with 2 where a value is not allowed."""
        switches = [name for name, action in self._option_string_actions.items() if action.const]
        argv = [f'{word}=True' if word in switches else word for word in argv]  # or it takes the next word
        typed, names = vars(self.parse_args(argv)), [f.name for f in fields(self.config)]
        try:
            return self.config(**{name: typed[name] for name in names if name in typed}), typed
        except ValueError as e:
            self.error(f'--{e}')


def one_line_errors(main):
    """Decorates main(argv): the user's mistakes are one line and exit code 1; a bug keeps its traceback."""
    def program(argv=None):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout.reconfigure(errors='replace')  # for a terminal that is not UTF-8
        try:
            sys.exit(main(sys.argv[1:] if argv is None else argv))
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as e:
            if isinstance(e, MemoryError) or re.search("out of memory|can't allocate memory", str(e)):
                e = 'out of memory: try a smaller batch or model (--batch_size, --n_embd, --checkpoint_loops)'
            elif not isinstance(e, (UserError, OSError)):
                raise
            sys.exit(f'{Path(main.__code__.co_filename).name}: {" ".join(str(e).split())[:600]}')
    return program


def pick_device(name: str, n_embd: int = 0) -> torch.device:
    """'auto' is CUDA, then MPS, then the CPU. UserError for a device that is not here."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        raise UserError(f'--device={name} does not work here, try --device=auto ({e})') from e
    if name.startswith('cpu') and 0 < n_embd <= 128 and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(1)  # a small model's threads wait for each other on a busy machine
    return torch.device(name)


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
    """Make and lock the run's folder. UserError: another process has it, or a run in it would be lost."""
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = open(out_dir / '.lock', 'a')
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
def writing(path: Path, mode: str = 'wb'):
    """Open a file that becomes `path` once it is whole; mode 'a' adds to path itself. UserError: no room."""
    temporary = path if mode == 'a' else path.with_name(path.name + '.tmp')
    try:
        with open(temporary, mode) as f:
            yield f
            f.flush()
            if temporary != path:
                os.fsync(f.fileno())
        if temporary != path:
            os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save makes a RuntimeError of a full disk
        if temporary != path:
            temporary.unlink(missing_ok=True)
        raise UserError(f'could not write {path} ({e.__context__ or e}): make room, what is saved stays')


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl but for a last one cut short. UserError: a line that train.py did not write."""
    try:
        lines = [json.loads(text) for text in path.read_bytes().split(b'\n')[:-1]]
        if {type(lines[0]['loops']), *(type(x['iter']) for x in lines[1:])} != {int}:
            raise ValueError
    except (ValueError, TypeError, LookupError, RecursionError) as e:
        raise UserError(f'{path} has a line that is not of train.py: mend it, or move the file away') from e
    return lines


def begin_log(path: Path, cfg: TrainConfig, start: int, changed: dict):
    """Write the flags and, at --resume, what was logged up to `start`, where an evaluation comes again."""
    lines = [asdict(cfg)]
    if cfg.resume and path.exists():
        lines += [x for x in read_log(path)[1:] if x['iter'] < start or x['iter'] == start and 'loss' in x]
    lines += [dict(iter=start, changed=changed)] if changed else []
    with writing(path, 'w') as f:
        f.writelines(json.dumps(line) + '\n' for line in lines)


def load_checkpoint(path: Path, given: dict | None = None) -> tuple[LoopedGPT, TrainConfig, dict]:
    """What a run saved, checked: the model (on the CPU, in eval mode), its flags with those `given` laid over
    them, the rest and `changed` in a dict. UserError: missing, damaged, or not of this code and flags."""
    try:
        state = dict(torch.load(path, map_location='cpu', weights_only=True))
        saved, it = TrainConfig(**state['config']), state['iter']
        cfg = replace(saved, **{'overwrite': False, **(given or {})})
        if type(it) is not int or not 0 <= it <= 10 ** 9 or type(state['corpus']) is not str:
            raise ValueError(f'iter is {it!r} and corpus {state["corpus"]!r}')
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f'no checkpoint {path} (yet): name the folder of a run that has been trained') from e
    except Exception as e:  # whatever a foreign file brings
        if getattr(e, 'filename', 0) or isinstance(e, MemoryError) or "can't allocate memory" in str(e):
            raise
        raise UserError(f'{path} cannot be read by this train.py and flags ({type(e).__name__}: {e})') from e
    state['changed'] = result_flags(cfg, saved)
    with torch.device('meta'):  # allocates nothing
        model = LoopedGPT(cfg)
    try:
        model.load_state_dict(state['model'], assign=True)
        params = [p for group in configure_optimizer(model, cfg).param_groups for p in group['params']]
        for i, moments in state['optimizer']['state'].items():  # a fused step trusts their shapes
            if any(m.shape != {'step': ()}.get(name, params[i].shape) for name, m in moments.items()):
                raise ValueError(f'the moments of parameter {i} have another shape')
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(f'{path} does not fit this code and {state["changed"] or "its flags"} ({e})') from e
    model = LoopedGPT(cfg).eval()
    model.load_state_dict(state.pop('model'))
    return model, cfg, state


def load_tokens(cfg: TrainConfig, corpus: str | None = None) -> tuple[dict, dict]:
    """({split: uint16 tokens}, meta), prepared if need be. UserError: not the text with the hash `corpus`."""
    meta = read_meta(folder := prepare(cfg.dataset, cfg.vocab_size, min_tokens=cfg.block_size + 1))
    if corpus not in (None, meta['hash']):
        raise UserError(f'{cfg.dataset} is not the text that this run was trained on: start another run')
    tokens = {split: np.memmap(folder / f'{split}.bin', np.uint16, 'r') for split in ('train', 'val')}
    if (largest := max(t.max() for t in tokens.values())) >= cfg.vocab_size:
        raise UserError(f'token {largest} is outside vocab_size {cfg.vocab_size}: delete the folder {folder}')
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


def say(line: str):
    try:
        print(line, flush=True)
    except BrokenPipeError:  # Ctrl-C has ended the tee that was reading, too
        sys.stdout = open(os.devnull, 'w')


def watch_signals() -> list:
    """The signals that came, Ctrl-C or SIGTERM: one asks for a stop, the second ends the process at once."""
    asked, (reader, writer) = [], socket.socketpair()

    def watch():  # in a thread: Python's own handlers wait for a long call into C to end
        reader.recv(1)
        say('stopping and saving (once more: at once, without saving)')
        os._exit(128 + reader.recv(1)[0])
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach())
    for s in signal.SIGINT, signal.SIGTERM:
        signal.signal(s, lambda signum, _: asked.append(signum))
    threading.Thread(target=watch, daemon=True).start()
    return asked


def configure_optimizer(model: LoopedGPT, cfg: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                             fused=matrices[0].device.type in ('cpu', 'cuda'))


@torch.no_grad()
def evaluate(model, cfg: TrainConfig, tokens: dict, meta: dict, autocast, asked=()) -> dict:
    """A line of the log: means over cfg.eval_iters batches, or over one at a stop; norms are of val."""
    model.eval()
    line = {}
    for split in 'train', 'val':
        outs = []
        for idx, targets in eval_batches(tokens[split], cfg, cfg.eval_iters, model.tok_emb.weight.device):
            with autocast:
                out = model(idx, targets)
            outs.append(torch.stack((out.losses, out.norms)))
            if asked:
                break
        line[f'{split}_losses'], line['norms'] = torch.stack(outs).mean(0).tolist()
    model.train()
    line['bpb'] = line['val_losses'][-1] / math.log(2) * meta['tokens']['val'] / meta['bytes']['val']
    return line


def check_finite(it: int, numbers: list, ckpt_path: Path):
    if not all(map(math.isfinite, numbers)):
        kept = f'{ckpt_path} is the last good checkpoint' if ckpt_path.exists() else 'nothing is saved yet'
        raise UserError(f'loss or weights are not finite by iteration {it}; {kept}: lower --learning_rate')


def train(cfg: TrainConfig, given: dict) -> int:
    """The recipe. `given` is what was typed, for --resume. Gives 0, or 128 + the signal that stopped it."""
    # The folder, the device, the corpus. Nothing of a run changes before all that can fail early has passed.
    out_dir, state = run_folder(cfg), None
    log_path, ckpt_path = out_dir / 'log.jsonl', out_dir / 'ckpt.pt'
    lock = claim(out_dir, cfg) if out_dir.exists() else None  # before it is read, and held to the end
    if cfg.resume:
        model, cfg, state = load_checkpoint(ckpt_path, given)
    device = pick_device(cfg.device, cfg.n_embd)
    if device.type == 'mps' and cfg.checkpoint_loops and cfg.dropout:
        raise UserError('on MPS, --checkpoint_loops with --dropout gives wrong gradients: leave one out')
    tokens, meta = load_tokens(cfg, state and state['corpus'])

    # Model and optimizer
    cuda = device.type == 'cuda'
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = cfg.dtype if cfg.dtype != 'auto' else 'bfloat16' if has_bf16 else 'float32'
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == 'bfloat16')
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
    if state:
        optimizer.load_state_dict({**optimizer.state_dict(), 'state': state['optimizer']['state']})
        start, changed, state = state['iter'], state['changed'], None
        say(f'resumed at iteration {start} of {cfg.max_iters}' + (f', changed: {changed}' if changed else ''))
    compiled = cfg.compile == 'True' or (cfg.compile == 'auto' and cuda and has_triton())
    if compiled:
        model.compile_regions()
    batch = train_batch(tokens['train'], cfg, start, device)
    next(eval_batches(tokens['val'], cfg, cfg.eval_iters, device))
    lock, asked = lock or claim(out_dir, cfg), watch_signals()
    say(f'{sum(p.numel() for p in model.parameters()):,} parameters, {meta["tokens"]["train"]:,} training '
        f'tokens; {device}, {dtype}, {"compiled" if compiled else "eager"}; run folder {out_dir}')
    if writes := start < cfg.max_iters or not changed:  # else what is finished stays as it is
        begin_log(log_path, cfg, start, changed)
    if not cfg.resume:
        ckpt_path.unlink(missing_ok=True)

    # The loop
    it = start
    while True:
        if it % cfg.eval_interval == 0 or it in (start, cfg.max_iters) or asked:
            line = evaluate(model, cfg, tokens, meta, autocast, asked)
            stop = asked[:1]  # a copy: what is asked from here on waits for the next round
            check_finite(it, line['val_losses'] + line['norms'], ckpt_path)
            if not stop:
                ce = ' '.join(f'{x:.3f}' for x in line['val_losses'])
                norms = ' '.join(f'{x:.1f}' for x in line['norms'])
                say(f'eval {it:>6}  val CE at exits 1..{cfg.loops}: {ce}  ({line["bpb"]:.3f} bits per byte)\n'
                    f'             state norm, loops 1..{cfg.loops}: {norms}')
                if writes:
                    with writing(log_path, 'a') as f:
                        f.write(json.dumps(dict(iter=it, **line)) + '\n')
            if it > start or stop and not cfg.resume:
                with writing(ckpt_path) as f:  # tensors and plain values only, for weights_only=True
                    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), iter=it,
                                    config=asdict(cfg), corpus=meta['hash']), f)
            clock, logged = time.perf_counter(), it
        if stop or it >= cfg.max_iters:
            break
        lr = min(cfg.learning_rate, cfg.learning_rate * (it + 1) / max(1, cfg.warmup_iters))
        for group in optimizer.param_groups:
            group['lr'] = lr
        torch.manual_seed(hash((cfg.seed, 0, it)) % 2 ** 63)  # dropout, too, is a function of these alone
        for idx, targets in zip(*(x.split(cfg.batch_size) for x in batch)):
            with autocast:
                out = model(idx, targets)
            (out.loss / cfg.gradient_accumulation_steps).backward()
        batch = train_batch(tokens['train'], cfg, it + 1, device)  # while the GPU is still busy
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        it += 1
        if it % cfg.log_interval == 0 or it == cfg.max_iters:
            loss, norms = out.loss.item(), out.norms.tolist()  # in a step, only this waits for the device
            check_finite(it, [loss, *norms], ckpt_path)
            seconds = (time.perf_counter() - clock) / (it - logged)
            clock, logged = time.perf_counter(), it
            rate = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size / seconds
            left = timedelta(seconds=round(seconds * (cfg.max_iters - it)))
            work = f'  {rate * model.flops_per_token() / 1e12:.0f} TFLOP/s' if cuda else ''
            say(f'iter {it:>6}/{cfg.max_iters}  loss {loss:.4f}  norm {norms[0]:.1f} -> {norms[-1]:.1f}  '
                f'{seconds * 1e3:.0f} ms  {rate:,.0f} tok/s{work}  {left} left')
            with writing(log_path, 'a') as f:
                f.write(json.dumps(dict(iter=it, loss=loss, norms=norms, lr=lr, ms=seconds * 1e3)) + '\n')
    if stop:
        say(f'stopped at iteration {it}; go on with: python train.py --resume --out_dir={out_dir}')
    return 128 + stop[0] if stop else 0


@one_line_errors
def main(argv):
    return train(*FlagParser(TrainConfig, __doc__).parse(argv))


if __name__ == '__main__':
    main()
