"""train.py through its command line: what is trained, runs and resuming, and every mistake in one line."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import looped
import train
from conftest import TINY
from data import prepare
from looped import READOUTS, RECURRENCES, LoopedConfig, LoopedGPT, flag
from train import TrainConfig, eval_batches, get_batch, load_checkpoint, main, parse_flags

TEXT = ['--dataset=text.txt', *TINY]
CPU, RUN = torch.device('cpu'), {'log.jsonl', 'ckpt.pt', '.lock'}
posix = pytest.mark.skipif(os.name != 'posix', reason='signals and locks as POSIX has them')


def log(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def steps(folder):
    return [x for x in log(folder) if 'loss' in x]


def evaluations(folder):
    return [x for x in log(folder) if 'bpb' in x]


def checkpoint(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)


def weights(folder):
    return checkpoint(folder)['model']


def distance(a, b):
    """The largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def tree(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def assert_one_line(result, *says, code=1):
    got, _, err = result
    assert got == code and err.count('\n') == 1 and (code == 2 or err.startswith('error: ')), result
    for part in says:
        assert part in err, err


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp('finished') / 'r'


@pytest.fixture
def trained(run, workplace, finished):
    """A run of six updates in the folder r: trained for the first test that asks, copied for the others."""
    if not finished.exists():
        assert run(main, *TEXT, '--out_dir=r')[0] == 0
        shutil.move(workplace / 'r', finished)
    return shutil.copytree(finished, workplace / 'r')


@pytest.fixture
def resume(run):
    """resume(flags…) goes on with the run in the folder r."""
    return lambda *flags: run(main, '--out_dir=r', '--resume', *flags)


# ------------------------------------------------------------------------------------------------------------
# What is trained


def adamw_by_hand(cfg, tokens, updates):
    """Weights, moments, losses and norms after some updates, with every formula of the recipe written out."""
    torch.manual_seed(cfg.seed)
    model = LoopedGPT(cfg).train()
    params = dict(model.named_parameters())
    m = {name: torch.zeros_like(p) for name, p in params.items()}
    v = {name: torch.zeros_like(p) for name, p in params.items()}
    losses, norms = [], []
    for it in range(updates):
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        loss, norm = 0.0, 0.0
        for micro_step in range(cfg.gradient_accumulation_steps):
            rng = np.random.default_rng((cfg.seed, micro_step, it))
            batch = get_batch(tokens, cfg, rng, CPU)
            torch.manual_seed(int(rng.integers(2 ** 63)))
            out = model(*batch)
            for (name, p), g in zip(params.items(), torch.autograd.grad(out.loss, list(params.values()))):
                total[name] += g / cfg.gradient_accumulation_steps
            loss += out.loss.item() / cfg.gradient_accumulation_steps
            norm = norm + out.norms / cfg.gradient_accumulation_steps
        losses.append(loss)
        norms.append(norm.tolist())
        length = torch.sqrt(sum((g ** 2).sum() for g in total.values())).item()
        factor = min(1.0, cfg.grad_clip / (length + 1e-6)) if cfg.grad_clip else 1.0
        lr = cfg.learning_rate * min(1, (it + 1) / max(1, cfg.warmup_iters))
        with torch.no_grad():
            for name, p in params.items():
                g = total[name] * factor
                m[name] = cfg.beta1 * m[name] + (1 - cfg.beta1) * g
                v[name] = cfg.beta2 * v[name] + (1 - cfg.beta2) * g ** 2
                p.mul_(1 - lr * cfg.weight_decay)
                step = m[name] / (1 - cfg.beta1 ** (it + 1))
                p.sub_(lr * step / (torch.sqrt(v[name] / (1 - cfg.beta2 ** (it + 1))) + 1e-8))
    return {name: p.detach() for name, p in params.items()}, m, v, losses, norms


@pytest.mark.parametrize('flags', [
    [], ['--gradient_accumulation_steps=3', '--grad_clip=0'], ['--grad_clip=0.01'], ['--grad_clip=0'],
    ['--beta1=0.5'], ['--beta2=0.9'], ['--weight_decay=5'], ['--warmup_iters=3'], ['--seed=7'],
    ['--norm_penalty=0.1'], ['--supervision=terminal', '--readout=raw'],
    ['--recurrence=damped', '--weight_decay=9', '--dropout=0.3', '--gradient_accumulation_steps=2']],
    ids=' '.join)
def test_updates_are_those_of_adamw_written_out_by_hand(run, workplace, flags):
    """Accumulation, clipping, betas, decay of every parameter, rate, seed, dropout; and what is logged."""
    assert run(main, *TEXT, '--warmup_iters=0', '--max_iters=3', *flags, '--out_dir=r')[0] == 0
    state = checkpoint(workplace / 'r')
    cfg = TrainConfig(**state['config'])
    tokens = train.load_tokens(cfg)[0]['train']
    want, m, v, losses, norms = adamw_by_hand(cfg, tokens, updates=3)
    for (name, p), moments in zip(want.items(), state['optimizer']['state'].values(), strict=True):
        torch.testing.assert_close(state['model'][name], p, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(moments['exp_avg'], m[name], atol=1e-5, rtol=1e-3)  # Adam hides a factor
        torch.testing.assert_close(moments['exp_avg_sq'], v[name], atol=1e-6, rtol=1e-3)
    assert [x['loss'] for x in steps(workplace / 'r')] == pytest.approx(losses, rel=1e-4)
    for line, norm in zip(steps(workplace / 'r'), norms):
        assert line['norms'] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize('flags, rates', [
    (['--warmup_iters=4'], [0.25, 0.5, 0.75, 1, 1, 1]),
    (['--warmup_iters=0'], [1] * 6),
    (['--lr_decay_iters=4'], [1, 0.853553, 0.5, 0.146447, 0, 0]),
    (['--lr_decay_iters=6', '--warmup_iters=2', '--min_lr=1e-5'],
     [0.5, 1, 1, 0.1 + 0.9 * 0.853553, 0.55, 0.1 + 0.9 * 0.146447])], ids=lambda x: ' '.join(map(str, x)))
def test_the_learning_rate_warms_up_stays_or_falls_as_a_cosine(run, workplace, flags, rates):
    run(main, *TEXT, '--learning_rate=1e-4', '--warmup_iters=0', *flags, '--out_dir=r')
    assert [x['lr'] for x in steps(workplace / 'r')] == pytest.approx([1e-4 * x for x in rates], abs=1e-9)


def test_in_40_updates_the_norm_of_rms_is_more_than_ten_times_that_of_raw(run, workplace):
    """The default model, whose flags are those of the lesson."""
    for readout in 'rms', 'raw':
        run(main, '--dataset=text.txt', f'--readout={readout}', '--max_iters=40', '--eval_iters=1',
            '--device=cpu', f'--out_dir={readout}')
    assert steps(workplace / 'rms')[-1]['norms'][-1] > 10 * steps(workplace / 'raw')[-1]['norms'][-1]


def test_evaluation_is_the_mean_without_dropout_over_windows_from_the_first_token_to_the_last(run, workplace):
    run(main, *TEXT, '--dropout=0.5', '--out_dir=r')
    model, cfg, _ = load_checkpoint(workplace / 'r' / 'ckpt.pt')
    tokens, _ = train.load_tokens(cfg)
    last = evaluations(workplace / 'r')[-1]
    for split in 'train', 'val':
        starts = np.linspace(0, len(tokens[split]) - 17, 8).astype(int)
        ids = torch.stack([torch.from_numpy(tokens[split][s:s + 17].astype(np.int64)) for s in starts])
        out = model(ids[:, :-1], ids[:, 1:])
        assert last[f'{split}_losses'] == pytest.approx(out.losses.tolist(), rel=1e-5)
        batches = list(eval_batches(tokens[split], cfg, 2, CPU))
        assert batches[0][0][0, 0] == tokens[split][0] and batches[-1][1][-1, -1] == tokens[split][-1]
    assert last['norms'] == pytest.approx(out.norms.tolist(), rel=1e-5)


def test_bits_per_byte_counts_the_bytes_of_a_token(run, workplace, monkeypatch):
    """With a tokenizer of 300 tokens, some of which are several bytes long."""
    ranks = {bytes([i]): i for i in range(256)}
    for merge in b'is', b'th', b'the', b're', b'squ':
        ranks[merge] = len(ranks)
    encoding = tiktoken.Encoding('few', pat_str=r' ?\w+|\s', mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(prepare, 'get_tokenizer', lambda vocab_size: encoding)
    run(main, *TEXT, '--vocab_size=300', '--out_dir=r')
    meta = json.loads(next((workplace / 'data').glob('*/meta.json')).read_text())
    tokens, size = meta['tokens']['val'], meta['bytes']['val']
    assert tokens < 0.95 * size
    line = evaluations(workplace / 'r')[-1]
    assert line['bpb'] == pytest.approx(line['val_losses'][-1] / math.log(2) * tokens / size)


def test_dtype_bfloat16_is_that_of_products_and_not_of_the_state(run, workplace, monkeypatch):
    seen, real = set(), F.scaled_dot_product_attention

    def attention(q, *args, **options):
        seen.add(q.dtype)
        return real(q, *args, **options)
    monkeypatch.setattr(looped.F, 'scaled_dot_product_attention', attention)
    for dtype, want in ('bfloat16', torch.bfloat16), ('float32', torch.float32), ('auto', torch.float32):
        run(main, *TEXT, f'--dtype={dtype}', f'--out_dir={dtype}')
        assert seen == {want}
        seen.clear()
    assert {t.dtype for t in weights(workplace / 'bfloat16').values()} == {torch.float32}


@pytest.mark.parametrize('flag, want', [('--seed=2', []), ('--checkpoint_loops', ['checkpoint']),
                                        ('--compile=True', ['compile'])])
def test_checkpoint_loops_and_compile_are_handed_to_the_model(run, monkeypatch, flag, want):
    calls, real = [], looped.checkpoint
    monkeypatch.setattr(looped, 'checkpoint', lambda *a, **kw: calls.append('checkpoint') or real(*a, **kw))
    monkeypatch.setattr(LoopedGPT, 'compile_regions', lambda self: calls.append('compile'))
    code, out, _ = run(main, *TEXT, flag)
    assert code == 0 and sorted({*calls}) == want and ('compiled' in out) == ('compile' in want)


@pytest.mark.parametrize('flags', [
    *([f'--readout={r}'] for r in READOUTS), *([f'--recurrence={r}'] for r in RECURRENCES),
    ['--inject=1'], ['--output_bias=learned'], ['--output_bias=unigram'],
    ['--supervision=terminal', '--norm_penalty=0.01', '--readout=alpha', '--alpha=0.2', '--init=gpt2'],
    ['--checkpoint_loops', '--dropout=0.1'], ['--loops=1', '--recurrence=rms']], ids=' '.join)
def test_every_option_trains_and_lowers_the_loss(run, workplace, flags):
    code, _, err = run(main, *TEXT, '--max_iters=30', '--eval_interval=30', '--learning_rate=1e-3', *flags,
                       '--out_dir=r')
    assert (code, err) == (0, '')
    folder = workplace / 'r'
    first, last = evaluations(folder)
    assert last['val_losses'][-1] < first['val_losses'][-1] - 0.5
    config = log(folder)[0]
    assert len(last['val_losses']) == len(last['train_losses']) == len(last['norms']) == config['loops']
    assert [x['iter'] for x in steps(folder)] == list(range(1, 31))
    assert steps(folder)[0].keys() == {'iter', 'loss', 'norms', 'lr', 'ms'}
    assert checkpoint(folder)['iter'] == 30 and checkpoint(folder)['config'] == config


def test_the_unigram_bias_is_the_log_frequency_of_each_token_and_is_not_trained(run, workplace):
    run(main, *TEXT, '--out_dir=r', '--output_bias=unigram')
    tokens = np.fromfile(next((workplace / 'data').glob('*/train.bin')), np.uint16)
    counts = np.bincount(tokens, minlength=256) + 1
    want = torch.from_numpy(np.log(counts / counts.sum())).float()
    torch.testing.assert_close(weights(workplace / 'r')['output_bias'], want)


# Batches


def test_a_batch_is_windows_drawn_from_end_to_end():
    def get(seed):
        cfg = TrainConfig(batch_size=4, block_size=8)
        return get_batch(np.arange(5000, dtype=np.uint16), cfg, np.random.default_rng(seed), CPU)
    idx, targets = get(7)
    assert idx.shape == targets.shape == (4, 8) and idx.dtype == torch.int64
    assert torch.equal(targets, idx + 1) and torch.equal(idx, idx[:, :1] + torch.arange(8))
    assert torch.equal(get(7)[0], idx) and not torch.equal(get(8)[0], idx)
    starts = torch.cat([get(seed)[0][:, 0] for seed in range(300)])
    assert starts.min() < 100 and starts.max() > 4891
    idx, targets = get_batch(np.arange(9), TrainConfig(block_size=8, batch_size=2), np.random.default_rng(1), CPU)
    assert idx[0].tolist() == list(range(8)) and targets[0, -1] == 8


# ------------------------------------------------------------------------------------------------------------
# Several processes


def torchrun(folder, *flags):
    """Two processes that train in the folder of a clone."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
    return subprocess.Popen([*command, 'train.py', *TEXT, *flags], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@posix
def test_two_processes_train_what_one_does_with_all_the_micro_steps(clone, run, workplace):
    flags = ['--gradient_accumulation_steps=4', '--dropout=0.2']
    process = torchrun(clone.folder, *flags, '--out_dir=two')
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count('iter      6/6') == 1 and '2 x cpu' in out  # the first process alone prints
    assert run(main, *TEXT, *flags, '--out_dir=one')[0] == 0
    assert distance(weights(workplace / 'one'), weights(workplace / 'two')) < 1e-6
    for a, b in zip(steps(workplace / 'one'), steps(workplace / 'two'), strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-5)
        assert a['norms'] == pytest.approx(b['norms'], rel=1e-5)
    assert {p.name for p in (workplace / 'two').iterdir()} == RUN


@posix
def test_ctrl_c_stops_two_processes_before_the_same_step_and_an_error_in_one_ends_both(clone, resume):
    process = torchrun(clone.folder, '--gradient_accumulation_steps=2', '--max_iters=1000000',
                       '--eval_interval=1000000', '--out_dir=r')
    wait_for(process, 'iter')
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and 'stopped at iteration' in out
    it = checkpoint(clone.folder / 'r')['iter']
    assert it > 0 and f'stopped at iteration {it};' in out
    assert resume(f'--max_iters={it + 2}')[0] == 0  # with one process

    source = (clone.folder / 'train.py').read_text()
    broken = source.replace('            optimizer.step()\n', '            optimizer.step()\n'
                            '            assert first or it < 3, "a bug in the second process"\n')
    assert broken != source
    (clone.folder / 'train.py').write_text(broken)
    process = torchrun(clone.folder, '--gradient_accumulation_steps=2', '--max_iters=1000000', '--out_dir=b')
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and 'a bug in the second process' in err


def test_micro_steps_that_processes_cannot_share_are_refused(run, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(train.dist, 'init_process_group', lambda backend: None)
    assert_one_line(run(main, *TEXT, '--gradient_accumulation_steps=3'), 'give a multiple of 2')


# ------------------------------------------------------------------------------------------------------------
# Flags


def test_help_lists_every_flag_in_groups_with_default_and_meaning(run):
    code, out, _ = run(main, '--help')
    assert code == 0
    groups = dict(zip(['model', 'training', 'machine and output'], re.split(r'\n\n[a-z ]+:\n', out)[-3:]))
    for f in fields(TrainConfig):
        group = 'model' if f.name in LoopedConfig.__dataclass_fields__ else \
            'training' if f.metadata['result'] else 'machine and output'
        entry = next(x for x in ('\n' + groups[group]).split('\n  --') if re.match(f.name + r'\s', x))
        assert f.metadata['help'].split('\n')[0] in entry and f'(default: {f.default!r})' in entry
        assert all(choice in entry for choice in f.metadata['choices'] or [])


@pytest.mark.parametrize('typed, want', [
    ('--loops=5', 5), ('--loops 5', 5), ('--compile=False', 'False'), ('--resume', True),
    ('--resume=False', False), ('--learning_rate=3e-4', 3e-4), ('--readout raw', 'raw')])
def test_flags_are_typed_as_in_nanogpt(typed, want):
    cfg, given = parse_flags(TrainConfig, '', typed.split())
    assert list(given.values()) == [want] and getattr(cfg, *given) == want


@pytest.mark.parametrize('typed, says', [
    ('--redout=rms', '--redout=rms (see --help)'), ('--n-layer=3', '(see --help)'), ('--loop=3', '(see --help)'),
    ('--readout=rsm', 'layernorm'), ('--loops=0', 'from 1 to'),
    ('--loops=two', "'two'"), ('--n_head=5', 'multiple of n_head'), ('--alpha=2', 'from 0 to 1'),
    ('--resume=perhaps', 'True or False'), ('--learning_rate=nan', 'must be a number'),
    (f'--batch_size={10 ** 400}', 'to 1048576')])
def test_a_mistyped_flag_ends_in_one_line_that_names_it(run, workplace, typed, says):
    before = tree(workplace)
    result = run(main, typed)
    assert_one_line(result, says, code=2)
    assert result[1] == '' and typed.split('=')[0].strip('-').split('-')[0] in result[2]
    assert tree(workplace) == before and not (workplace / 'out').exists()


@dataclass
class Forked(TrainConfig):
    gate: bool = False                                  # a plain field, as a forker writes it
    mode: 'str | None' = None                           # of any type
    widths: tuple = (1, 2)
    sandwich: float = flag(0.0, '50% of nothing')       # and one with a meaning
    note: str = flag('', 'changes nothing', result=False)


def test_a_field_of_a_fork_is_in_help_folder_and_run_by_itself(run, resume, workplace, monkeypatch):
    monkeypatch.setattr(train, 'TrainConfig', Forked)
    out = run(main, '--help')[1]
    assert re.search(r'--gate .*\(default: False\)', out) and '50% of nothing (default: 0.0)' in out
    cfg = Forked(gate=True, sandwich=0.5, note='x')
    assert train.run_folder(cfg).name == 'python-rms-residual-per_loop-gate-sandwich0.5'
    assert run(main, *TEXT, '--gate', '--mode=x', '--widths=(3, 4)', '--out_dir=r')[0] == 0
    config = checkpoint(workplace / 'r')['config']
    assert (config['gate'], config['mode'], config['widths']) == (True, 'x', (3, 4))
    code, out, _ = resume('--max_iters=7', '--gate=False')
    assert code == 0 and "'gate': False" in out.splitlines()[0]


def test_ablations_land_side_by_side_by_themselves():
    names = [train.run_folder(TrainConfig(**f)).name for f in (
        {}, dict(norm_penalty=0.01), dict(loops=4), dict(seed=20240101), dict(seed=20240102),
        dict(learning_rate=1e-4), dict(readout='raw'), dict(recurrence='damped'), dict(init_from='out/x'),
        dict(dataset='a/x.txt'), dict(dataset='b/x.md'), dict(dataset='../-texts'), dict(dataset='.hidden'))]
    assert len(set(names)) == len(names) and not [name for name in names if name[0] in '-.']
    assert names[:3] == [f'python-rms-residual-per_loop{flags}' for flags in ('', '-pen0.01', '-k4')]
    assert train.run_folder(TrainConfig(device='cpu', log_interval=1, resume=True)).name == names[0]


@pytest.mark.parametrize('n_embd, user_says, want', [(64, None, [1]), (512, None, []), (64, '2', [])])
def test_a_small_model_on_the_cpu_takes_one_thread(monkeypatch, n_embd, user_says, want):
    threads = []
    monkeypatch.setattr(torch, 'set_num_threads', threads.append)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    if user_says:
        monkeypatch.setenv('OMP_NUM_THREADS', user_says)
    train.pick_device('cpu', n_embd)
    assert threads == want


# ------------------------------------------------------------------------------------------------------------
# A run


def test_what_a_person_reads_while_it_trains(run):
    _, out, _ = run(main, *TEXT, '--gradient_accumulation_steps=3', '--log_interval=6')
    step = r'iter      6/6  loss \d.*  norm [\d.]+ -> [\d.]+  (\d+) ms  ([\d,]+) tok/s  0:00:00 left\n'
    ms, rate = re.search(step, out).groups()
    tokens = float(rate.replace(',', '')) * float(ms) / 1e3  # of an update
    assert tokens == pytest.approx(4 * 3 * 16, rel=0.5 / float(ms) + 0.01)
    assert 'val CE at exits 1..3' in out and 'bits per byte' in out and 'state norm, loops 1..3' in out
    assert '1 x cpu, float32, eager' in out and "preparing 'text.txt'" in out
    assert 'run folder out/text.txt-rms-residual-per_loop-' in out


def test_a_terminal_that_is_not_utf8_and_a_folder_that_is_not_ascii_train(run, workplace, monkeypatch):
    monkeypatch.setenv('HOME', str(workplace))
    monkeypatch.setenv('USERPROFILE', str(workplace))
    sys.stdout.reconfigure(encoding='ascii', errors='strict')  # PYTHONIOENCODING=ascii
    code, out, err = run(main, '--dataset=~/text.txt', *TINY, '--out_dir=~/un été')
    assert (code, err) == (0, '') and 'un ?t?' in out and (workplace / 'un été' / 'ckpt.pt').exists()


def test_a_notebook_calls_main_and_goes_on(workplace, monkeypatch):
    """Its stdout has nothing but write, success raises nothing, and nothing of the training stays behind."""
    class Plain(io.TextIOBase):
        reconfigure = property()

        def write(self, text):
            return len(text)
    for stdout in Plain(), None:
        monkeypatch.setattr(sys, 'stdout', stdout)
        before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        assert main([*TEXT, '--overwrite', '--out_dir=r']) is None
        assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert checkpoint(workplace / 'r')['iter'] == 6


def test_init_from_starts_another_run_from_the_weights_and_flags_of_a_run(run, trained, workplace):
    before = tree(trained)
    code, out, _ = run(main, '--init_from=r', '--norm_penalty=0.5', '--learning_rate=0')
    assert code == 0 and tree(trained) == before
    folder = next((workplace / 'out').iterdir())
    assert 'pen0.5' in folder.name and 'init_from=r' in folder.name
    assert distance(weights(folder), weights(trained)) == 0
    assert log(folder)[0]['n_embd'] == 16 and log(folder)[0]['norm_penalty'] == 0.5
    assert [x['iter'] for x in evaluations(folder)] == [0, 3, 6]
    assert evaluations(folder)[0]['val_losses'] == evaluations(trained)[-1]['val_losses']
    assert run(main, '--resume', f'--out_dir={folder}', '--max_iters=7', '--learning_rate=0')[0] == 0
    assert_one_line(run(main, '--init_from=nowhere'), 'no checkpoint nowhere/ckpt.pt')


# Resuming


def interrupt(patch, name, call, signum=signal.SIGINT):
    """Send this process a signal in that call of train.NAME, counted from 1."""
    real, calls = getattr(train, name), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return real(*args)
    patch.setattr(train, name, interrupted)


@posix
@pytest.mark.parametrize('flags', [[], ['--dropout=0.2', '--gradient_accumulation_steps=2',
                                        '--output_bias=unigram']], ids=' '.join)
@pytest.mark.parametrize('name, stops_at', [('get_batch', 1), ('get_batch', 5), ('get_batch', 6),
                                            ('eval_batches', 1), ('eval_batches', 4)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(run, resume, workplace, monkeypatch, flags, name,
                                                    stops_at):
    """Ctrl-C in the middle of a step or of an evaluation, after which comes one more step."""
    folder, whole = workplace / 'r', workplace / 'whole'
    run(main, *TEXT, *flags, '--out_dir=whole')
    with monkeypatch.context() as patch:
        # one batch is read for the step that is thrown away; an evaluation has two splits
        call = 1 + stops_at * (2 if flags else 1) if name == 'get_batch' else 1 + stops_at // 3 * 2
        interrupt(patch, name, call)
        code, out, err = run(main, *TEXT, *flags, '--out_dir=r')
    assert code == 130 and err == ''
    assert f'stopped at iteration {stops_at}; go on with: python train.py --resume --out_dir="r"' in out
    assert checkpoint(folder)['iter'] == stops_at not in [x['iter'] for x in evaluations(folder)]
    code, out, _ = resume()
    assert code == 0 and f'resumed at iteration {stops_at} of 6' in out
    assert distance(weights(whole), weights(folder)) == 0
    a, b = (checkpoint(path)['optimizer']['state'] for path in (whole, folder))
    torch.testing.assert_close(a, b, rtol=0, atol=0)

    def timeless(path):
        return [{k: v for k, v in x.items() if k not in ('ms', 'out_dir', 'resume')} for x in log(path)]
    assert timeless(whole) == timeless(folder)


@pytest.mark.parametrize('how', ['killed', 'finished'])
def test_a_resume_that_ends_before_it_has_anything_new_changes_nothing(resume, trained, monkeypatch, how):
    before = tree(trained)
    if how == 'killed':  # in its second update
        real = train.get_lr
        monkeypatch.setattr(train, 'get_lr', lambda it, cfg: 1 / 0 if it > 6 else real(it, cfg))
        with pytest.raises(ZeroDivisionError):
            resume('--max_iters=9', '--norm_penalty=1')
    else:
        for flag in '--max_iters=6', '--loops=2':
            code, out, _ = resume(flag)
            assert code == 0 and 'resumed at iteration 6 of 6' in out
    assert tree(trained) == before


def test_a_run_can_be_made_longer_also_after_a_kill_between_checkpoint_and_log(resume, run, workplace):
    run(main, *TEXT, '--out_dir=long', '--max_iters=9')
    run(main, *TEXT, '--out_dir=r', '--max_iters=5')
    (workplace / 'r' / 'log.jsonl').unlink()
    resume('--max_iters=9')
    assert distance(weights(workplace / 'long'), weights(workplace / 'r')) == 0
    assert [x['iter'] for x in evaluations(workplace / 'r')] == [0, 3, 5, 6, 9]
    assert [x['iter'] for x in steps(workplace / 'r')] == list(range(1, 10))
    assert checkpoint(workplace / 'r')['log'] == log(workplace / 'r')


@pytest.mark.parametrize('typed', [
    '--norm_penalty=1', '--alpha=0.1', '--dropout=0.5', '--n_head=1', '--loops=5', '--inject=1', '--seed=2',
    '--supervision=terminal', '--weight_decay=9'])
def test_a_flag_that_changes_at_resume_acts_and_is_printed_and_logged(run, resume, workplace, typed):
    run(main, *TEXT, '--readout=alpha', '--out_dir=r')
    before = log(workplace / 'r')[0]
    shutil.copytree(workplace / 'r', workplace / 'unchanged')
    run(main, '--out_dir=unchanged', '--resume', '--max_iters=8')
    code, out, err = resume('--max_iters=8', typed)
    name, value = typed[2:].split('=')
    value = type(before[name])(value)
    assert (code, err) == (0, '') and f"'{name}': {value!r}" in out.splitlines()[0]
    change = next(x for x in log(workplace / 'r') if 'changed' in x)
    assert change == dict(iter=6, changed={name: value, 'max_iters': 8})
    after = checkpoint(workplace / 'r')
    assert after['config'] == before | {'resume': True, 'max_iters': 8, name: value}
    assert after['optimizer']['param_groups'][0]['weight_decay'] == after['config']['weight_decay']
    assert distance(weights(workplace / 'r'), weights(workplace / 'unchanged')) > 0


@pytest.mark.parametrize('typed, says', [
    ('--init=gpt2', '--init only acts on new weights'),
    ('--output_bias=unigram', '--output_bias only acts on new weights'),
    ('--init_from=x', 'leave out --overwrite and --init_from'), ('--overwrite', 'leave out --overwrite'),
    ('--n_embd=32', "r/ckpt.pt does not fit this code and {'n_embd': 32} "),
    ('--readout=raw', 'exposure.weight'), ('--n_layer=2', 'blocks.1.norm_attn.weight'),
    ('--n_head=64', 'n_embd must be a multiple of n_head (64)')])
def test_resume_refuses_by_name_a_flag_that_cannot_change(run, resume, trained, workplace, typed, says):
    before = tree(trained)
    assert_one_line(resume(typed), says)
    if 'acts on' in says:
        assert_one_line(run(main, '--init_from=r', typed), says)
    assert tree(trained) == before and not (workplace / 'out').exists()


def test_resume_refuses_another_text_and_takes_the_same_one_from_elsewhere(resume, trained, workplace):
    shutil.move(workplace / 'text.txt', workplace / 'moved.txt')
    (workplace / 'text.txt').write_text('another text ' * 1000)
    assert_one_line(resume(), 'text.txt is not the text that this run was trained on', 'edited', '--dataset=')
    assert resume('--dataset=moved.txt', '--max_iters=7')[0] == 0


# ------------------------------------------------------------------------------------------------------------
# Mistakes: one line, exit code 1, nothing changed on disk


def test_a_folder_that_holds_a_run_or_its_log_is_not_overwritten_silently(run, workplace):
    run(main, *TEXT)
    folder = next((workplace / 'out').iterdir())
    for _ in range(2):
        before = tree(workplace)
        assert_one_line(run(main, *TEXT), 'out/text.txt-rms-', 'holds a run', '--resume, --overwrite')
        assert tree(workplace) == before
        (folder / 'ckpt.pt').unlink(missing_ok=True)  # to make room
    assert run(main, *TEXT, '--overwrite')[0] == 0


@pytest.mark.parametrize('flag, says', [
    ('--dataset=nowhere.txt', 'python, shakespeare, wikitext103'), ('--dataset=short.txt', 'at least 17'),
    ('--device=cuda:77', '--device=auto'), ('--device=toaster', '--device=auto'), ('--device=meta', 'auto'),
    ('--vocab_size=100', '256 (bytes) or 257 to 50257'), ('--batch_size=1000000000000', '--batch_size'),
    ('--out_dir=text.txt', 'text.txt cannot hold a run (File exists): give another --out_dir'),
    ('--out_dir=' + 'x' * 300, 'File name too long'), ('--resume', 'name the folder of a trained run')])
def test_what_cannot_work_is_named_and_changes_nothing(run, trained, workplace, flag, says):
    def files():  # but for corpora, which may be prepared on the way
        return {path: data for path, data in tree(workplace).items() if '/data/' not in path}
    (workplace / 'short.txt').write_text('too short for sixteen')
    before = files()
    code = 2 if 'batch_size' in flag else 1
    assert_one_line(run(main, *TEXT, flag), says, code=code)
    if flag != '--resume':
        assert_one_line(run(main, *TEXT, '--overwrite', '--out_dir=r', flag), says, code=code)
    assert files() == before
    assert not (workplace / 'out').exists()


def test_what_fails_in_the_first_step_leaves_the_run_that_it_would_overwrite(run, trained, monkeypatch):
    real = LoopedGPT.forward

    def forward(self, *args):
        if self.training:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return real(self, *args)
    monkeypatch.setattr(LoopedGPT, 'forward', forward)
    before = tree(trained)
    with pytest.raises(torch.OutOfMemoryError):
        run(main, *TEXT, '--overwrite', '--out_dir=r')
    assert tree(trained) == before


@pytest.mark.parametrize('bug', [ValueError, RuntimeError, FileNotFoundError])
@pytest.mark.parametrize('where', ['__init__', 'forward', 'state_dict'])
def test_a_bug_in_a_fork_keeps_its_traceback_also_at_resume(run, trained, monkeypatch, bug, where):
    def broken(*args, **kwargs):
        raise bug('in the fork')
    monkeypatch.setattr(LoopedGPT, where, broken)
    for flags in [*TEXT, '--out_dir=fork'], ['--out_dir=r', '--resume', '--max_iters=7']:
        with pytest.raises(bug, match='in the fork'):
            run(main, *flags)


def test_what_is_wrong_on_mps_is_refused(run, workplace, monkeypatch):
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.12.1'))
    assert_one_line(run(main, *TEXT, '--device=mps'), 'MPS', 'torch 2.13', '--device=cpu')
    monkeypatch.setattr(train, 'pick_device', lambda *args: torch.device('mps'))
    assert_one_line(run(main, *TEXT, '--checkpoint_loops', '--dropout=0.1'), '--checkpoint_loops', 'MPS')
    assert not (workplace / 'out').exists()


# The log and the checkpoint


@pytest.mark.parametrize('flags', [['--resume', '--max_iters=9'], [*TEXT, '--overwrite']],
                         ids=['resume', 'overwrite'])
def test_a_full_disk_names_the_file_and_keeps_what_was_saved(run, resume, trained, flags):
    resource = pytest.importorskip('resource')
    resume()  # prepares the corpus
    before = tree(trained)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, limits[1]))
    try:
        result = run(main, '--out_dir=r', *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_one_line(result, 'could not write r/ckpt.pt (File too large)', 'what was saved before stays')
    assert tree(trained) == before
    assert resume('--max_iters=9')[0] == 0 and [x['iter'] for x in steps(trained)] == list(range(1, 10))


ODD = dict(shape=torch.zeros(3, 3), sparse=torch.zeros(256, 16).to_sparse(), text='weights',
           meta=torch.zeros(256, 16, device='meta'))
SPOILT = dict(  # what is wrong in a checkpoint, and what is said of it
    no_optimizer=(lambda state: state.pop('optimizer'), 'r/ckpt.pt is of another optimizer'),
    no_moments=(lambda state: state['optimizer'].update(state={}), 'there are none'),
    one_number=(lambda state: state['optimizer']['state'][0].update(exp_avg=torch.tensor(1.0)), 'exp_avg'),
    step=(lambda state: state['optimizer']['state'][1].update(step=torch.zeros(1000)), 'step of shape'),
    iteration=(lambda state: state.update(iter='x'), 'r/ckpt.pt cannot be read'),
    nan=(lambda state: state['model']['pos_emb.weight'].fill_(math.nan), 'not finite at iteration 7'),
    loops=(lambda state: state['config'].update(loops=10 ** 9), 'loops must be from 1 to 10000'),
    flag_of_a_fork=(lambda state: state['config'].update(gate=True), "'gate'"),
    corpus=(lambda state: state.update(corpus=7), 'is not the text that this run was trained on'),
    name=(lambda state: state['model'].update(w=state['model'].pop('pos_emb.weight')), 'pos_emb.weight'),
    code=(lambda state: state.update(model=Path('x')), 'cannot be read by this train.py and flags (not'),
    **{f'weight: {kind}': (lambda state, odd=odd: state['model'].update({'tok_emb.weight': odd}),
                           'does not fit this code and') for kind, odd in ODD.items()},
    **{f'moment: {kind}': (lambda state, odd=odd: state['optimizer']['state'][0].update(exp_avg=odd),
                           'of another optimizer') for kind, odd in ODD.items()})


@pytest.mark.parametrize('spoil', ['truncated', 'empty', *SPOILT])
def test_a_checkpoint_that_is_damaged_or_does_not_fit_is_refused(resume, trained, spoil):
    """A fused step would read beyond a moment of another shape; and torch advises to trust code in files."""
    path, state = trained / 'ckpt.pt', checkpoint(trained)
    change, says = SPOILT.get(spoil, (None, 'r/ckpt.pt cannot be read'))
    if change:
        change(state)
        torch.save(state, path)
    else:
        path.write_bytes(path.read_bytes()[:-1000] if spoil == 'truncated' else b'')
    before = tree(trained)
    result = resume('--max_iters=9')
    assert_one_line(result, says)
    assert tree(trained) == before and 'weights_only' not in result[2]


@pytest.mark.parametrize('odd', ['expanded', 'transposed', 'bfloat16'])
def test_values_are_copied_whatever_their_strides_and_dtype_are_in_the_file(resume, trained, workplace, odd):
    """Fused steps read memory as it lies; a file must not choose how."""
    change = dict(expanded=lambda t: t.flatten()[:1].expand_as(t), bfloat16=lambda t: t.bfloat16(),
                  transposed=lambda t: t.t().contiguous().t() if t.dim() == 2 else t)[odd]
    plain, state = checkpoint(trained), checkpoint(trained)
    for odd_tensors, tensors in [(state['model'], plain['model'])] + [
            (state['optimizer']['state'][i], moments) for i, moments in plain['optimizer']['state'].items()]:
        for name in tensors.keys() - {'step'}:
            odd_tensors[name] = change(tensors[name])
            tensors[name] = odd_tensors[name].float().contiguous()
    for notes in state['model']._metadata.values():  # by which torch takes tensors as they are
        notes['assign_to_params_buffers'] = True
    shutil.copytree(trained, workplace / 'plain')
    torch.save(state, trained / 'ckpt.pt')
    torch.save(plain, workplace / 'plain' / 'ckpt.pt')
    assert resume('--max_iters=9')[0] == 0
    assert main(['--resume', '--out_dir=plain', '--max_iters=9']) is None
    assert distance(weights(trained), weights(workplace / 'plain')) == 0
    assert {(t.dtype, t.is_contiguous()) for t in weights(trained).values()} == {(torch.float32, True)}


@posix
@pytest.mark.parametrize('flags, at', [
    (['--eval_interval=1'], 4), ([], 5), (['--eval_interval=7', '--log_interval=100'], 7), (['SIGTERM'], 4)],
    ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_a_run_that_diverges_keeps_the_last_good_checkpoint(resume, run, workplace, monkeypatch, flags, at):
    """Weights of 1e25 after one step: their squares are infinite, so is the next loss."""
    run(main, *TEXT, '--out_dir=r', '--max_iters=3')
    before = tree(workplace / 'r')
    with monkeypatch.context() as patch:
        if flags == ['SIGTERM']:  # in the very update that ruins the weights
            interrupt(patch, 'get_batch', 2, signal.SIGTERM)
            flags = ['--log_interval=100']
        result = resume('--max_iters=30', '--learning_rate=1e25', '--eval_interval=100', *flags)
    assert_one_line(result, f'not finite at iteration {at}; what was saved stays', '--learning_rate')
    assert tree(workplace / 'r') == before
    assert resume('--max_iters=6')[0] == 0


# ------------------------------------------------------------------------------------------------------------
# Kills, signals and races


@posix
def test_a_kill_during_save_keeps_the_old_checkpoint(resume, clone):
    """SIGKILL when the third checkpoint is written and has not got its name yet."""
    (clone.folder / 'kill.py').write_text('''
import os, sys, train
real, saves = os.replace, []
def replace(old, new):
    saves.extend([new] if str(new).endswith("ckpt.pt") else [])
    if len(saves) == 3:
        os.kill(os.getpid(), 9)
    real(old, new)
os.replace = replace
train.main(sys.argv[1:])
''')
    process = clone('kill.py', *TEXT, '--out_dir=r')
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and checkpoint(clone.folder / 'r')['iter'] == 3
    assert resume()[0] == 0
    assert checkpoint(clone.folder / 'r')['iter'] == 6
    assert {p.name for p in (clone.folder / 'r').iterdir()} == RUN


def wait_for(process, start):
    return next(line for line in process.stdout if line.startswith(start))


@posix
def test_of_two_trainers_in_one_folder_the_second_gets_a_line(run, workplace, clone):
    """And one that was killed holds nothing."""
    endless = [*TEXT, '--max_iters=1000000', '--eval_interval=100', '--out_dir=r']
    first = clone('train.py', *endless)
    wait_for(first, 'iter    101')
    for flags in [], ['--resume'], ['--overwrite']:
        assert_one_line(run(main, *endless, *flags), 'another process trains in r', '--out_dir')
    assert first.poll() is None
    first.kill()
    first.wait()
    logged = [x['iter'] for x in steps(workplace / 'r')]
    assert logged == list(range(1, len(logged) + 1)) and len(logged) >= 100
    assert run(main, *TEXT, '--out_dir=r', '--overwrite')[0] == 0


@posix
@pytest.mark.parametrize('signum, reader', [(signal.SIGTERM, 'stays'), (signal.SIGINT, 'leaves')])
def test_ctrl_c_and_sigterm_save_a_checkpoint_and_say_so(clone, signum, reader):
    process = clone('train.py', *TEXT, '--max_iters=1000000', '--eval_interval=1000000', '--out_dir=r')
    wait_for(process, 'iter')
    if reader == 'leaves':  # python train.py 2>&1 | tee log: the same Ctrl-C ends tee
        process.stdout.close()
        process.stderr.close()
    process.send_signal(signum)
    assert process.wait(120) == 128 + signum
    iteration = checkpoint(clone.folder / 'r')['iter']
    if reader == 'stays':
        assert f'stopped at iteration {iteration};' in process.stdout.read()
        assert process.stderr.read() == 'stopping and saving (once more: at once, without saving)\n'
    assert log(clone.folder / 'r')[-1]['iter'] == iteration > 0


@posix
def test_a_second_ctrl_c_ends_the_process_at_once_also_inside_a_long_call_into_c(clone):
    (clone.folder / 'long.py').write_text('''
import hashlib, os, signal, sys, train
real, calls = train.get_batch, []
def get_batch(*args):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGINT)
        print("a long call", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2 ** 30)
    return real(*args)
train.get_batch = get_batch
train.main(sys.argv[1:])
''')
    process = clone('long.py', *TEXT, '--out_dir=r')
    wait_for(process, 'a long call')
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == -signal.SIGINT and 'Traceback' not in process.stderr.read()


# The GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('flags', [['--dtype=bfloat16'], ['--compile=False'], ['--checkpoint_loops']],
                         ids=' '.join)
def test_on_a_gpu_every_precision_trains(run, workplace, flags):
    code, out, err = run(main, *TEXT, '--device=cuda', '--max_iters=30', *flags, '--out_dir=r')
    assert code == 0 and 'cuda' in out
    first, *_, last = evaluations(workplace / 'r')
    assert last['bpb'] < first['bpb'] - 0.5
