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
import threading
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import looped
import train
from conftest import REPO, TINY
from data import prepare
from looped import READOUTS, RECURRENCES, LoopedConfig, LoopedGPT, flag
from train import FlagParser, TrainConfig, eval_batches, get_batch, load_checkpoint, main

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
    assert got == code and err.count('\n') == 1 and (code == 2 or err.startswith('train.py: ')), result
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
            out = model(*get_batch(tokens, cfg, it, micro_step, CPU))
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
    [], ['--gradient_accumulation_steps=3', '--grad_clip=0'], ['--grad_clip=0.01'], ['--grad_clip=0'], ['--beta1=0.5'],
    ['--beta2=0.9'], ['--weight_decay=5'], ['--warmup_iters=3'], ['--seed=7'], ['--norm_penalty=0.1'],
    ['--recurrence=damped', '--weight_decay=9', '--dropout=0.3', '--gradient_accumulation_steps=2'],
    ['--supervision=terminal', '--readout=raw']], ids=' '.join)
def test_updates_are_those_of_adamw_written_out_by_hand(run, workplace, flags):
    """Accumulation, clipping, betas, decay of every parameter, rate, seed, dropout; and what is logged of it."""
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


def test_a_rate_of_zero_leaves_the_weights_that_the_seed_gives(run, workplace):
    for seed in 1, 2:
        run(main, *TEXT, '--learning_rate=0', f'--seed={seed}', f'--out_dir=r{seed}')
        torch.manual_seed(seed)
        want = LoopedGPT(TrainConfig(**checkpoint(workplace / f'r{seed}')['config'])).state_dict()
        assert distance(weights(workplace / f'r{seed}'), want) == 0


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


def test_evaluation_is_the_mean_over_windows_from_the_first_token_to_the_last(trained):
    model, cfg, _ = load_checkpoint(trained / 'ckpt.pt')
    tokens, meta = train.load_tokens(cfg)
    for split in 'train', 'val':
        starts = np.linspace(0, len(tokens[split]) - 17, 8).astype(int)
        ids = torch.stack([torch.from_numpy(tokens[split][s:s + 17].astype(np.int64)) for s in starts])
        out = model(ids[:, :-1], ids[:, 1:])
        assert evaluations(trained)[-1][f'{split}_losses'] == pytest.approx(out.losses.tolist(), rel=1e-5)
        batches = list(eval_batches(tokens[split], cfg, 2, CPU))
        assert batches[0][0][0, 0] == tokens[split][0] and batches[-1][1][-1, -1] == tokens[split][-1]
    assert evaluations(trained)[-1]['norms'] == pytest.approx(out.norms.tolist(), rel=1e-5)


def test_evaluation_has_no_dropout_and_training_has(run, workplace):
    run(main, *TEXT, '--dropout=0.5', '--out_dir=r', '--max_iters=3')
    model, cfg, _ = load_checkpoint(workplace / 'r' / 'ckpt.pt')
    tokens, _ = train.load_tokens(cfg)
    losses = [model(*batch).losses for batch in eval_batches(tokens['val'], cfg, 2, CPU)]
    assert evaluations(workplace / 'r')[-1]['val_losses'] == pytest.approx(torch.stack(losses).mean(0).tolist())
    batch = get_batch(tokens['train'], cfg, 0, 0, CPU)
    assert model.train()(*batch).loss != model.eval()(*batch).loss


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


def test_tokens_per_second_count_what_an_update_reads(run):
    _, out, _ = run(main, *TEXT, '--gradient_accumulation_steps=3', '--log_interval=6')
    ms, rate = re.search(r'iter      6/6 .* (\d+) ms  ([\d,]+) tok/s', out).groups()
    assert float(rate.replace(',', '')) * float(ms) / 1e3 == pytest.approx(4 * 3 * 16, rel=0.5 / float(ms) + 0.01)


def test_dtype_bfloat16_is_that_of_products_and_not_of_the_state(run, workplace, monkeypatch):
    seen = set()
    real = F.scaled_dot_product_attention

    def attention(q, k, v, **options):
        seen.add(q.dtype)
        return real(q, k, v, **options)
    monkeypatch.setattr(looped.F, 'scaled_dot_product_attention', attention)
    for dtype, want in ('bfloat16', torch.bfloat16), ('float32', torch.float32), ('auto', torch.float32):
        run(main, *TEXT, f'--dtype={dtype}', f'--out_dir={dtype}')
        assert seen == {want}
        seen.clear()
    assert {t.dtype for t in weights(workplace / 'bfloat16').values()} == {torch.float32}


def test_checkpoint_loops_and_compile_are_handed_to_the_model(run, monkeypatch):
    calls = []
    real = looped.checkpoint
    monkeypatch.setattr(looped, 'checkpoint', lambda *args, **kw: calls.append('checkpoint') or real(*args, **kw))
    monkeypatch.setattr(LoopedGPT, 'compile_regions', lambda self: calls.append('compile'))
    for flags, want in ([], set()), (['--checkpoint_loops'], {'checkpoint'}), (['--compile'], {'compile'}), \
            (['--compile=False', '--checkpoint_loops=False'], set()):
        calls.clear()
        code, out, _ = run(main, *TEXT, *flags, '--overwrite', '--out_dir=r')
        assert code == 0 and set(calls) == want and ('compiled' in out) == ('compile' in want)


@pytest.mark.parametrize('flags', [
    *([f'--readout={r}'] for r in READOUTS), *([f'--recurrence={r}'] for r in RECURRENCES),
    ['--inject=1'], ['--output_bias=learned'], ['--output_bias=unigram'],
    ['--supervision=terminal', '--norm_penalty=0.01', '--readout=alpha', '--alpha=0.2', '--init=gpt2'],
    ['--checkpoint_loops', '--dropout=0.1'], ['--loops=1', '--recurrence=rms']], ids=' '.join)
def test_every_option_trains_and_lowers_the_loss(run, workplace, flags):
    code, _, err = run(main, *TEXT, '--max_iters=30', '--eval_interval=30', '--learning_rate=1e-3', *flags, '--out_dir=r')
    assert (code, err) == (0, '')
    first, last = evaluations(workplace / 'r')
    assert last['val_losses'][-1] < first['val_losses'][-1] - 0.5
    loops = log(workplace / 'r')[0]['loops']
    assert len(last['val_losses']) == len(last['train_losses']) == len(last['norms']) == loops
    assert [x['iter'] for x in steps(workplace / 'r')] == list(range(1, 31))
    assert steps(workplace / 'r')[0].keys() == {'iter', 'loss', 'norms', 'lr', 'ms'}
    assert checkpoint(workplace / 'r')['iter'] == 30 and checkpoint(workplace / 'r')['config'] == log(workplace / 'r')[0]


def test_the_unigram_bias_is_the_log_frequency_of_each_token_and_is_not_trained(run, workplace):
    run(main, *TEXT, '--out_dir=r', '--output_bias=unigram')
    tokens = np.fromfile(next((workplace / 'data').glob('*/train.bin')), np.uint16)
    counts = np.bincount(tokens, minlength=256) + 1
    want = torch.from_numpy(np.log(counts / counts.sum())).float()
    torch.testing.assert_close(weights(workplace / 'r')['output_bias'], want)


# Batches


def test_a_micro_step_is_a_function_of_seed_and_iteration_and_its_number():
    def get(micro_step, it, seed=1):
        cfg = TrainConfig(seed=seed, batch_size=4, block_size=8)
        idx, targets = get_batch(np.arange(5000, dtype=np.uint16), cfg, it, micro_step, CPU)
        return idx, targets, torch.rand(3)  # what dropout would draw
    idx, targets, drawn = get(0, 7)
    assert idx.shape == targets.shape == (4, 8) and idx.dtype == torch.int64
    assert torch.equal(targets, idx + 1) and torch.equal(idx, idx[:, :1] + torch.arange(8))
    assert torch.equal(get(0, 7)[0], idx) and torch.equal(get(0, 7)[2], drawn)
    for other in get(1, 7), get(0, 8), get(0, 7, seed=2):
        assert not torch.equal(other[0], idx) and not torch.equal(other[2], drawn)
    starts = torch.cat([get(0, it)[0][:, 0] for it in range(300)])
    assert starts.min() < 100 and starts.max() > 4891  # from end to end


def test_the_shortest_corpus_has_one_window():
    idx, targets = get_batch(np.arange(9), TrainConfig(block_size=8, batch_size=2), 0, 0, CPU)
    assert idx[0].tolist() == list(range(8)) and targets[0, -1] == 8


# ------------------------------------------------------------------------------------------------------------
# Several processes


def torchrun(folder, *flags):
    """Two processes that train in the folder of a clone."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py']
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
    return subprocess.Popen([*command, *TEXT, *flags], cwd=folder, env=env, text=True,
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
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-5) and a['norms'] == pytest.approx(b['norms'], rel=1e-5)
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

    text = (clone.folder / 'train.py').read_text()
    broken = text.replace('            optimizer.step()\n', '            optimizer.step()\n'
                          '            assert rank == 0 or it < 3, "a bug in the second process"\n')
    assert broken != text
    (clone.folder / 'train.py').write_text(broken)
    process = torchrun(clone.folder, '--gradient_accumulation_steps=2', '--max_iters=1000000', '--out_dir=b')
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and 'a bug in the second process' in err


def test_micro_steps_that_processes_cannot_share_are_refused(run, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(train.dist, 'init_process_group', lambda backend: None)
    assert_one_line(run(main, *TEXT, '--gradient_accumulation_steps=3'),
                    '2 processes cannot share --gradient_accumulation_steps=3: give a multiple of 2')


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
    ('--loops=5', 5), ('--loops 5', 5), ('--compile=False', 'False'), ('--compile False', 'False'),
    ('--compile', 'True'), ('--compile auto', 'auto'), ('--resume', True), ('--resume=False', False),
    ('--resume false', False), ('--learning_rate=3e-4', 3e-4), ('--readout raw', 'raw')])
def test_flags_are_typed_as_in_nanogpt(typed, want):
    cfg, given = FlagParser(TrainConfig, '').parse(typed.split())
    assert list(given.values()) == [want] and getattr(cfg, *given) == want


@pytest.mark.parametrize('typed, says', [
    ('--redout=rms', 'did you mean --readout?'), ('--n-layer=3', 'did you mean --n_layer?'),
    ('--loop=3', '--loops'), ('--readout=rsm', 'one of rms, layernorm, raw'), ('--loops=0', 'from 1 to'),
    ('--loops=two', "'two'"), ('--n_head=5', 'multiple of n_head'), ('--alpha=2', 'from 0 to 1'),
    ('--norm_penalty=-1', 'from 0'), ('--compile=maybe', 'auto, True, False'),
    ('--resume=perhaps', 'True or False'), ('--batch_size=0', 'from 1'), ('--learning_rate=nan', 'from 0'),
    ('--max_iters=1e20', "'1e20'"), ('--max_iters=100000000000000000000', 'to'),
    ('--n_embd=1000000', 'to 65536'), ('--loops=1000000000', 'to 10000'),
    (f'--batch_size={10 ** 400}', 'to 1048576'), ('--eval_iters=1000000000000', 'to 1048576')])
def test_a_mistyped_flag_ends_in_one_line_that_names_it(run, workplace, typed, says):
    before = tree(workplace)
    result = run(main, typed)
    assert_one_line(result, says, code=2)
    assert result[1] == '' and typed.split('=')[0].strip('-').split('-')[0] in result[2]
    assert tree(workplace) == before and not (workplace / 'out').exists()


def test_the_readme_names_no_flag_that_does_not_exist():
    known = {f.name for f in fields(TrainConfig)}
    for line in (REPO / 'README.md').read_text().splitlines():
        for command in re.findall(r'train\.py ([^`]*)', line):
            assert set(re.findall(r'--([a-z0-9_]+)', command)) <= known | {'help'}, line


@dataclass
class Forked(TrainConfig):
    gate: bool = False                                  # a plain field, as a forker writes it
    mode: 'str | None' = None                           # of any type
    widths: tuple = (1, 2)
    names: list = field(default_factory=list)
    sandwich: float = flag(0.0, '50% of nothing')       # and one with a meaning
    note: str = flag('', 'changes nothing', result=False)


def test_a_field_of_a_fork_is_in_help_folder_and_run_by_itself(run, resume, workplace, monkeypatch):
    monkeypatch.setattr(train, 'TrainConfig', Forked)
    out = run(main, '--help')[1]
    assert re.search(r'--gate BOOL +\(default: False\)', out) and '50% of nothing (default: 0.0)' in out
    cfg = Forked(gate=True, sandwich=0.5, note='x')
    assert train.result_flags(cfg) == dict(gate=True, sandwich=0.5)
    assert train.run_folder(cfg).name == 'python-rms-residual-per_loop-gate-sandwich0.5'
    assert run(main, *TEXT, '--gate', '--mode=x', '--widths=(3, 4)', '--out_dir=r')[0] == 0
    config = checkpoint(workplace / 'r')['config']
    assert config['gate'] is log(workplace / 'r')[0]['gate'] is True
    assert config['mode'] == 'x' and config['widths'] == (3, 4)
    code, out, _ = resume('--max_iters=7', '--gate=False')
    assert code == 0 and "'gate': False" in out.splitlines()[0]
    assert_one_line(run(main, '--gate=7'), '--gate must be True or False', code=2)


def test_ablations_land_side_by_side_by_themselves():
    names = [train.run_folder(TrainConfig(**f)).name for f in (
        {}, dict(norm_penalty=0.01), dict(loops=4), dict(seed=2), dict(seed=20240101), dict(seed=20240102),
        dict(learning_rate=1e-4), dict(readout='raw'), dict(readout='alpha', alpha=0.25), dict(inject=1.0),
        dict(recurrence='damped'), dict(supervision='terminal'), dict(n_layer=3), dict(batch_size=9),
        dict(lr_decay_iters=5), dict(init_from='out/x'),
        dict(dataset='a/x.txt'), dict(dataset='b/x.md'), dict(dataset='../-texts'), dict(dataset='.hidden'))]
    assert len(set(names)) == len(names) and names[0] == 'python-rms-residual-per_loop'
    assert names[1].endswith('-pen0.01') and names[2].endswith('-k4') and names[3].endswith('-s2')
    assert names[4].endswith('-s20240101') and not [name for name in names if name[0] in '-.']
    for unseen in dict(device='cpu'), dict(log_interval=1), dict(resume=True), dict(compile='True'):
        assert train.run_folder(TrainConfig(**unseen)).name == names[0]


def test_a_small_model_on_the_cpu_takes_one_thread_unless_the_user_says_otherwise(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, 'set_num_threads', threads.append)
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    train.pick_device('cpu', 64)
    monkeypatch.delenv('OMP_NUM_THREADS')
    train.pick_device('cpu', 512)
    assert threads == []
    train.pick_device('cpu', 64)
    assert threads == [1]


# ------------------------------------------------------------------------------------------------------------
# A run


def test_what_a_person_reads_while_it_trains(run, workplace):
    _, out, _ = run(main, *TEXT)
    step = next(x for x in out.splitlines() if x.startswith('iter      1/6'))
    for part in 'loss', 'norm', '->', 'ms', 'tok/s', 'left':
        assert part in step
    assert 'val CE at exits 1..3' in out and 'bits per byte' in out and 'state norm, loops 1..3' in out
    assert '1 x cpu, float32, eager' in out and 'preparing text.txt' in out
    assert 'run folder out/text.txt-rms-residual-per_loop-' in out


def test_a_terminal_that_is_not_utf8_and_a_folder_that_is_not_ascii_train(run, workplace):
    sys.stdout.reconfigure(encoding='ascii', errors='strict')  # PYTHONIOENCODING=ascii
    code, out, err = run(main, *TEXT, '--out_dir=été')
    assert (code, err) == (0, '') and 'run folder ?t?' in out and (workplace / 'été' / 'ckpt.pt').exists()


def test_a_notebook_calls_main_and_goes_on(workplace, monkeypatch):
    """Its stdout has nothing but write, success raises nothing, and nothing of the training stays behind."""
    class Plain(io.TextIOBase):
        reconfigure = property()

        def write(self, text):
            return len(text)
    for stdout in Plain(), None:
        monkeypatch.setattr(sys, 'stdout', stdout)
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threading.active_count()
        assert main([*TEXT, '--overwrite', '--out_dir=r']) is None
        assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threading.active_count())
    assert checkpoint(workplace / 'r')['iter'] == 6


def test_the_first_line_does_not_count_what_is_compiled_before_it(run, workplace, monkeypatch):
    calls = []
    real = LoopedGPT.forward

    def forward(self, *args):
        calls.append(args)
        if len(calls) == 1:
            time.sleep(3)  # a compiler
        return real(self, *args)
    monkeypatch.setattr(LoopedGPT, 'forward', forward)
    run(main, *TEXT, '--out_dir=r')
    assert steps(workplace / 'r')[0]['ms'] < 1500


def test_home_is_understood_and_the_line_to_resume_is_quoted(run, workplace, monkeypatch):
    monkeypatch.setenv('HOME', str(workplace))
    monkeypatch.setenv('USERPROFILE', str(workplace))
    assert run(main, '--dataset=~/text.txt', *TINY, '--out_dir=~/my runs')[0] == 0
    assert (workplace / 'my runs' / 'ckpt.pt').exists() and not (workplace / '~').exists()
    interrupt(monkeypatch, 'get_batch', 4)
    code, out, _ = run(main, *TEXT, '--out_dir=a b')
    assert code == 130 and "python train.py --resume --out_dir='a b'" in out


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
    assert_one_line(run(main, '--init_from=resume'), '--resume continues the run in --out_dir')


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
@pytest.mark.parametrize('during, stops_at', [('batch', 1), ('batch', 5), ('batch', 6), ('evaluation', 0),
                                              ('evaluation', 3)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(run, resume, workplace, monkeypatch, flags, during, stops_at):
    """Ctrl-C in the middle of a step or of an evaluation."""
    run(main, *TEXT, *flags, '--out_dir=whole')
    if during == 'batch':  # one is read for the step that is thrown away
        interrupt(monkeypatch, 'get_batch', 1 + stops_at * (2 if flags else 1))
    else:
        interrupt(monkeypatch, 'eval_batches', 2 if stops_at == 0 else 4)
    code, out, err = run(main, *TEXT, *flags, '--out_dir=r')
    assert code == 130 and err == ''
    assert f'stopped at iteration {stops_at}; go on with: python train.py --resume --out_dir=r' in out
    assert checkpoint(workplace / 'r')['iter'] == stops_at
    code, out, _ = resume()
    assert code == 0 and f'resumed at iteration {stops_at} of 6' in out
    assert distance(weights(workplace / 'whole'), weights(workplace / 'r')) == 0
    a, b = (checkpoint(workplace / name)['optimizer']['state'] for name in ('whole', 'r'))
    torch.testing.assert_close(a, b, rtol=0, atol=0)

    def timeless(folder):  # where Ctrl-C came, the resumed run has an evaluation more
        return [{k: v for k, v in x.items() if k not in ('ms', 'out_dir', 'resume')} for x in log(folder)
                if x.get('iter') != stops_at or 'loss' in x]
    assert timeless(workplace / 'whole') == timeless(workplace / 'r')


@posix
@pytest.mark.parametrize('how', ['ctrl-c', 'not finite', 'killed'])
def test_a_resume_that_ends_before_it_has_anything_new_changes_nothing(run, resume, trained, monkeypatch, how):
    before = tree(trained)
    flags = ['--max_iters=9', '--loops=2', '--norm_penalty=1', '--log_interval=1']
    if how == 'ctrl-c':
        interrupt(monkeypatch, 'eval_batches', 2)
        assert resume(*flags)[0] == 130
    elif how == 'killed':  # after the first new update, before anything is saved
        monkeypatch.setattr(train, 'check_finite', lambda numbers, it, *_: it > 6 and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resume(*flags)
    else:
        assert resume(*flags, '--learning_rate=1e25', '--eval_interval=1')[0] == 1
    assert tree(trained) == before


@pytest.mark.parametrize('typed', [[], ['--loops=6'], ['--norm_penalty=1'], ['--max_iters=3']], ids=' '.join)
def test_a_finished_run_that_is_resumed_is_evaluated_and_stays_as_it_is(resume, trained, typed):
    before = tree(trained)
    code, out, _ = resume(*typed)
    assert code == 0 and 'eval      6' in out and tree(trained) == before
    last = ' '.join(f'{x:.3f}' for x in evaluations(trained)[-1]['val_losses'])
    assert last in out or typed == ['--loops=6']


@posix
def test_an_evaluation_that_ctrl_c_has_cut_short_comes_back_with_the_resume(run, resume, workplace, monkeypatch):
    for stops_at, call in (0, 2), (6, 6):
        with monkeypatch.context() as patch:
            interrupt(patch, 'eval_batches', call)
            assert run(main, *TEXT, '--out_dir=r', '--overwrite')[0] == 130
        assert stops_at not in [x['iter'] for x in evaluations(workplace / 'r')]
        assert resume()[0] == 0
        assert [x['iter'] for x in evaluations(workplace / 'r')] == [0, 3, 6]


def test_the_log_is_that_of_the_checkpoint_beside_it_also_after_a_kill_between_the_two(resume, run, trained):
    assert checkpoint(trained)['log'] == log(trained)
    run(main, *TEXT, '--out_dir=r', '--overwrite', '--max_iters=3')
    (trained / 'log.jsonl').unlink()
    resume('--max_iters=6')
    assert [x['iter'] for x in steps(trained)] == [1, 2, 3, 4, 5, 6]
    assert [x['iter'] for x in evaluations(trained)] == [0, 3, 6]


def test_a_run_can_be_made_longer(resume, run, workplace):
    run(main, *TEXT, '--out_dir=long', '--max_iters=9')
    run(main, *TEXT, '--out_dir=r', '--max_iters=5')
    resume('--max_iters=9')
    assert distance(weights(workplace / 'long'), weights(workplace / 'r')) == 0
    assert [x['iter'] for x in evaluations(workplace / 'r')] == [0, 3, 5, 6, 9]


@pytest.mark.parametrize('typed', [
    '--norm_penalty=1', '--alpha=0.1', '--dropout=0.5', '--n_head=1', '--loops=5', '--inject=1', '--seed=2',
    '--supervision=terminal', '--weight_decay=9'])
def test_a_flag_that_changes_at_resume_acts_and_is_printed_and_logged(run, resume, workplace, typed):
    run(main, *TEXT, '--readout=alpha', '--out_dir=r')
    shutil.copytree(workplace / 'r', workplace / 'unchanged')
    run(main, '--out_dir=unchanged', '--resume', '--max_iters=8')
    code, out, err = resume('--max_iters=8', typed)
    name, value = typed[2:].split('=')
    assert (code, err) == (0, '') and f"'{name}': " in out.splitlines()[0] and value in out.splitlines()[0]
    change = next(x for x in log(workplace / 'r') if 'changed' in x)
    assert change['iter'] == 6 and set(change['changed']) == {name, 'max_iters'}
    assert str(log(workplace / 'r')[0][name]) in (value, f'{value}.0')
    assert distance(weights(workplace / 'r'), weights(workplace / 'unchanged')) > 0


@pytest.mark.parametrize('typed, says', [
    ('--init=gpt2', '--init acts on fresh weights alone'), ('--output_bias=unigram', '--output_bias acts on fresh'),
    ('--init_from=elsewhere', 'leave out --overwrite and --init_from'), ('--overwrite', 'leave out --overwrite')])
def test_what_can_only_act_at_a_start_is_refused_at_resume(run, resume, trained, workplace, typed, says):
    before = tree(trained)
    assert_one_line(resume(typed), says)
    if 'acts on' in says:
        assert_one_line(run(main, '--init_from=r', typed), says)
    assert tree(trained) == before and not (workplace / 'out').exists()


def test_flags_typed_at_resume_hold_and_the_others_are_those_of_the_run(resume, run, workplace):
    run(main, *TEXT, '--out_dir=r', '--device=cpu:0')
    code, out, _ = resume('--max_iters=7', '--weight_decay=0.5', '--dtype=bfloat16')
    assert code == 0 and 'cpu:0, bfloat16' in out
    state = checkpoint(workplace / 'r')
    assert state['config']['device'] == 'cpu:0'
    assert state['optimizer']['param_groups'][0]['weight_decay'] == state['config']['weight_decay'] == 0.5
    assert log(workplace / 'r')[0] == state['config']


@pytest.mark.parametrize('typed, says', [
    ('--n_embd=32', "r/ckpt.pt does not fit this code and {'n_embd': 32} (tok_emb.weight must be a tensor of shape "
     '[256, 32], and is of shape [256, 16])'),
    ('--n_layer=2', 'missing: blocks.1.norm_attn.weight'), ('--vocab_size=300', "'vocab_size': 300"),
    ('--readout=raw', 'unexpected: exposure.weight'), ('--recurrence=damped', 'missing: recurrence.a'),
    ('--n_head=64', 'n_embd must be a multiple of n_head (64), got 16')])
def test_resume_refuses_by_name_a_flag_that_changes_the_parameters(resume, trained, typed, says):
    before = tree(trained)
    assert_one_line(resume(typed), says)
    assert tree(trained) == before
    assert resume('--n_embd=16', '--max_iters=7')[0] == 0


def test_resume_refuses_another_text_and_takes_the_same_one_from_elsewhere(resume, trained, workplace):
    shutil.move(workplace / 'text.txt', workplace / 'moved.txt')
    (workplace / 'text.txt').write_text('another text ' * 1000)
    assert_one_line(resume(), 'text.txt is not the text that this run was trained on', 'edited', '--dataset=')
    assert resume('--dataset=moved.txt', '--max_iters=7')[0] == 0


# ------------------------------------------------------------------------------------------------------------
# Mistakes: one line, exit code 1, nothing changed on disk


def test_a_folder_that_holds_a_run_is_not_overwritten_silently(run, workplace):
    run(main, *TEXT)
    before = tree(workplace)
    assert_one_line(run(main, *TEXT), 'out/text.txt-rms-', 'holds a run', '--resume', '--overwrite', '--out_dir')
    assert tree(workplace) == before
    assert run(main, *TEXT, '--overwrite')[0] == 0


def test_a_log_whose_checkpoint_was_deleted_to_make_room_is_not_lost(run, trained):
    (trained / 'ckpt.pt').unlink()
    before = tree(trained)
    assert_one_line(run(main, *TEXT, '--out_dir=r'), 'r holds a run', '--overwrite replaces it')
    assert_one_line(run(main, *TEXT, '--out_dir=r', '--resume'), 'no checkpoint r/ckpt.pt')
    assert tree(trained) == before
    assert run(main, *TEXT, '--out_dir=r', '--overwrite')[0] == 0


@pytest.mark.parametrize('flags, says', [
    (['--dataset=nowhere.txt'], ['nowhere.txt', 'python, shakespeare, wikitext103']),
    (['--dataset=short.txt'], ['short.txt', 'at least 17', 'block_size + 1']),
    *(([f'--device={name}'], [f'--device={name}', '--device=auto'])
      for name in ('cuda:77', 'toaster', 'meta', 'hpu', 'xla', 'cpu:-1')),
    (['--vocab_size=100'], ['256 (bytes) or 257 to 50257', 'got 100']),
    (['--vocab_size=50258'], ['256 (bytes) or 257 to 50257', 'got 50258']),
    (['--out_dir=text.txt'], ['text.txt cannot hold a run (File exists): give another --out_dir']),
    (['--out_dir=' + 'x' * 300], ['File name too long', 'give another --out_dir']),
    (['--resume'], ['no checkpoint', 'ckpt.pt', 'has been trained'])], ids=lambda x: ' '.join(x)[:40])
def test_what_cannot_work_is_named(run, workplace, flags, says):
    (workplace / 'short.txt').write_text('too short for sixteen')
    before = tree(workplace)
    assert_one_line(run(main, *TEXT, *flags), *says)
    after = {path: data for path, data in tree(workplace).items() if '/data/' not in path}
    assert after == before and not (workplace / 'out').exists()


@pytest.mark.parametrize('flags, code, says', [
    (['--batch_size=1000000000000'], 2, '--batch_size'), (['--device=meta'], 1, '--device=meta'),
    (['--dataset=nowhere.txt'], 1, 'nowhere.txt')], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_overwrite_with_a_flag_that_cannot_work_leaves_the_old_run_alone(run, trained, flags, code, says):
    before = tree(trained)
    assert_one_line(run(main, *TEXT, '--out_dir=r', '--overwrite', *flags), says, code=code)
    assert tree(trained) == before


@pytest.mark.parametrize('error, says', [
    (MemoryError(), '--batch_size'), (torch.OutOfMemoryError('CUDA out of memory.'), '--checkpoint_loops'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), '--batch_size'),
    (RuntimeError('InvalidCxxCompiler: No working C++ compiler found'), '--compile=False'),
    (RuntimeError('Failed to find C compiler. Please specify via CC'), '--compile=False')], ids=str)
def test_what_the_first_step_lacks_is_one_line_with_the_flag_that_helps(run, trained, monkeypatch, error, says):
    """And --overwrite has not touched the old run by then."""
    def forward(*args):
        raise error
    monkeypatch.setattr(LoopedGPT, 'forward', forward)
    before = tree(trained)
    assert_one_line(run(main, *TEXT, '--overwrite', '--out_dir=r'), says)
    assert tree(trained) == before


def test_compile_without_a_compiler_is_one_line(clone):
    process = clone('train.py', *TEXT, '--compile', env=dict(CXX='/no/such/compiler', TORCHINDUCTOR_CACHE_DIR='c'))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count('\n') == 1 and '--compile=False' in err


@pytest.mark.parametrize('bug', [ValueError, RuntimeError, KeyError, AttributeError, FileNotFoundError, OSError])
@pytest.mark.parametrize('where', ['__init__', 'forward', 'state_dict'])
def test_a_bug_in_a_fork_keeps_its_traceback_also_at_resume(run, trained, monkeypatch, bug, where):
    def broken(*args, **kwargs):
        raise bug('in the fork')
    monkeypatch.setattr(LoopedGPT, where, broken)
    for flags in [*TEXT, '--out_dir=fork'], ['--out_dir=r', '--resume', '--max_iters=7']:
        with pytest.raises(bug, match='in the fork'):
            run(main, *flags)


def test_checkpoint_loops_with_dropout_is_refused_on_mps(run, workplace, monkeypatch):
    monkeypatch.setattr(train, 'pick_device', lambda *args: torch.device('mps'))
    before = tree(workplace)
    result = run(main, *TEXT, '--checkpoint_loops', '--dropout=0.1')
    assert_one_line(result, '--checkpoint_loops', '--dropout', 'MPS')
    assert tree(workplace) == before


def test_mps_before_torch_2_13_is_refused_and_not_chosen_by_itself(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch, '__version__', '2.12.1')
    with pytest.raises(train.UserError, match='torch 2.13'):
        train.pick_device('mps')
    if not torch.cuda.is_available():
        assert train.pick_device('auto') == torch.device('cpu')


# The log and the checkpoint


@pytest.mark.parametrize('flags', [['--resume', '--max_iters=9'], [*TEXT, '--overwrite']], ids=['resume', 'overwrite'])
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


@pytest.mark.parametrize('damage', ['truncated', 'foreign', 'text', 'empty', 'tensor', 'pickle'])
def test_a_truncated_or_foreign_checkpoint_is_named_without_torchs_advice_to_trust_it(resume, trained, damage):
    path = trained / 'ckpt.pt'
    if damage == 'truncated':
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage in ('foreign', 'tensor', 'pickle'):
        torch.save(dict(foreign={'state_dict': {}}, tensor=torch.zeros(3), pickle=Path('x'))[damage], path)
    else:
        path.write_text('' if damage == 'empty' else 'hello')
    before = tree(trained)
    result = resume()
    assert_one_line(result, 'r/ckpt.pt cannot be read by this train.py and flags (')
    assert tree(trained) == before and 'weights_only' not in result[2]


def spoilt(tensor):
    """Tensors that are none that a run saves, by what is wrong with them."""
    return dict(sparse=tensor.to_sparse(), complex=tensor.to(torch.complex64), meta=tensor.to('meta'),
                integer=tensor.long(), shape=torch.zeros(3, 3), text='weights', number=1.0)


SPOILT = dict(
    moment_of_nothing=lambda state: state['optimizer']['state'].update({99: dict(step=torch.tensor(1.0))}),
    moment_of_a_word=lambda state: state['optimizer']['state'].update(word=dict(step=torch.tensor(1.0))),
    missing_moment=lambda state: state['optimizer']['state'][0].pop('exp_avg_sq'),
    no_moments=lambda state: state['optimizer'].update(state={}),
    log=lambda state: state.update(log=[1, 2]),
    moments_that_are_a_list=lambda state: state['optimizer'].update(state=[1, 2]),
    step=lambda state: state['optimizer']['state'][1].update(step=torch.zeros(1000)),
    no_optimizer=lambda state: state.pop('optimizer'),
    iter=lambda state: state.update(iter=-1),
    iter_that_is_text=lambda state: state.update(iter='3'),
    iter_that_is_a_googol=lambda state: state.update(iter=10 ** 100),
    weights_that_are_text=lambda state: state.update(model='weights'),
    corpus=lambda state: state.update(corpus=7),
    loops=lambda state: state['config'].update(loops=10 ** 9),
    the_largest_size=lambda state: state['config'].update(n_layer=1000, n_embd=2 ** 16),
    **{f'weight: {kind}': lambda state, kind=kind: state['model'].update(
        {'tok_emb.weight': spoilt(state['model']['tok_emb.weight'])[kind]}) for kind in spoilt(torch.zeros(1))},
    **{f'moment: {kind}': lambda state, kind=kind: state['optimizer']['state'][0].update(
        exp_avg=spoilt(torch.zeros(256, 16))[kind]) for kind in spoilt(torch.zeros(1))})


@pytest.mark.parametrize('spoil', SPOILT)
def test_a_checkpoint_that_would_crash_or_fill_the_machine_is_refused(resume, trained, spoil):
    state = checkpoint(trained)
    SPOILT[spoil](state)
    torch.save(state, trained / 'ckpt.pt')
    before = tree(trained)
    assert_one_line(resume('--max_iters=9'), 'text.txt is not the text' if spoil == 'corpus' else 'r/ckpt.pt')
    assert tree(trained) == before


@pytest.mark.parametrize('odd', ['expanded', 'transposed', 'bfloat16', 'assigned'])
def test_values_are_copied_whatever_their_strides_and_dtype_are_in_the_file(resume, trained, workplace, odd):
    """Fused steps read memory as it lies; a file must not choose how."""
    change = dict(expanded=lambda t: t, transposed=lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
                  bfloat16=lambda t: t.bfloat16(), assigned=lambda t: t)[odd]
    plain, state = checkpoint(trained), checkpoint(trained)
    for name, t in state['model'].items():
        state['model'][name] = change(t)
        plain['model'][name] = change(t).float().contiguous()
    for i, moments in state['optimizer']['state'].items():
        for name in 'exp_avg', 'exp_avg_sq':
            moments[name] = change(moments[name])
            plain['optimizer']['state'][i][name] = moments[name].float().contiguous()
    if odd == 'expanded':
        state['model']['tok_emb.weight'] = torch.full((1,), 0.1).expand(256, 16)
        state['optimizer']['state'][0]['exp_avg'] = torch.zeros(1).expand(256, 16)
        plain['model']['tok_emb.weight'] = torch.full((256, 16), 0.1)
        plain['optimizer']['state'][0]['exp_avg'] = torch.zeros(256, 16)
    if odd == 'assigned':
        state['model']._metadata['']['assign_to_params_buffers'] = True
    shutil.copytree(trained, workplace / 'plain')
    torch.save(state, trained / 'ckpt.pt')
    torch.save(plain, workplace / 'plain' / 'ckpt.pt')
    assert resume('--max_iters=9')[0] == 0
    assert main(['--resume', '--out_dir=plain', '--max_iters=9']) is None
    assert distance(weights(trained), weights(workplace / 'plain')) == 0
    assert {(t.dtype, t.is_contiguous()) for t in weights(trained).values()} == {(torch.float32, True)}


@pytest.mark.parametrize('edit, says', [
    ('missing', 'missing: gate.weight'),
    ('misshapen', 'blocks.0.w1.weight must be a tensor of shape [48, 16], and is of shape [64, 16]'),
    ('renamed', 'unexpected: blocks.0.proj.weight')])
def test_after_an_edit_of_the_model_one_line_tells_what_differs(resume, trained, monkeypatch, edit, says):
    class Edited(LoopedGPT):
        def __init__(self, cfg):
            super().__init__(cfg)
            if edit == 'missing':
                self.gate = torch.nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
            elif edit == 'misshapen':
                self.blocks[0].w1 = torch.nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
            else:
                del self.blocks[0].proj
    monkeypatch.setattr(train, 'LoopedGPT', Edited)
    before = tree(trained)
    assert_one_line(resume(), 'r/ckpt.pt does not fit this code and its flags', says)
    assert tree(trained) == before


def test_a_checkpoint_of_a_fork_names_the_flag_that_this_code_lacks(resume, trained):
    state = checkpoint(trained)
    state['config']['gate'] = True
    torch.save(state, trained / 'ckpt.pt')
    assert_one_line(resume(), 'r/ckpt.pt cannot be read by this train.py and flags', "'gate'")


def test_no_permission_is_not_the_fault_of_the_file(resume, trained, monkeypatch):
    def load(*args, **kwargs):
        raise PermissionError(13, 'Permission denied', 'r/ckpt.pt')
    monkeypatch.setattr(torch, 'load', load)
    assert_one_line(resume(), 'could not read r/ckpt.pt (Permission denied)')


# Divergence


@pytest.mark.parametrize('flags, at', [(['--eval_interval=1'], 4), (['--eval_interval=100'], 5),
                                       (['--eval_interval=7', '--log_interval=100'], 7)])
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(resume, run, workplace, flags, at):
    """Weights of 1e25 after one step: their squares are infinite, so is the next loss."""
    run(main, *TEXT, '--out_dir=r', '--max_iters=3')
    before = tree(workplace / 'r')
    result = resume('--max_iters=30', '--learning_rate=1e25', *flags)
    assert_one_line(result, f'not finite by iteration {at}', 'r/ckpt.pt is the last good checkpoint',
                    '--learning_rate')
    assert tree(workplace / 'r') == before


def test_weights_that_are_bad_from_the_start_are_not_called_good(resume, trained):
    state = checkpoint(trained)
    state['model']['pos_emb.weight'].fill_(math.nan)
    torch.save(state, trained / 'ckpt.pt')
    result = resume()
    assert_one_line(result, 'not finite at iteration 6, before any update')
    assert 'good' not in result[2] and '--learning_rate' not in result[2]


@posix
def test_sigterm_in_the_update_in_which_the_weights_go_bad_keeps_the_good_checkpoint(run, resume, workplace,
                                                                                     monkeypatch):
    run(main, *TEXT, '--out_dir=r', '--max_iters=3')
    before = tree(workplace / 'r')
    with monkeypatch.context() as patch:
        interrupt(patch, 'get_batch', 2, signal.SIGTERM)
        result = resume('--max_iters=30', '--log_interval=100', '--learning_rate=1e25')
    assert_one_line(result, 'not finite by iteration 4', 'r/ckpt.pt is the last good checkpoint')
    assert tree(workplace / 'r') == before
    assert resume('--max_iters=6')[0] == 0


# ------------------------------------------------------------------------------------------------------------
# Kills, signals and races


@posix
def test_a_kill_during_save_keeps_the_old_checkpoint(resume, clone):
    """SIGKILL when half of a checkpoint is written."""
    (clone.folder / 'kill.py').write_text('''
import os, sys, train
real, saves = train.write_file, []
def write_file(path, data):
    if path.name == "ckpt.pt":
        saves.append(1)
        if len(saves) == 3:
            path.with_name("ckpt.pt.tmp").write_bytes(bytes(data)[:5000])
            os.kill(os.getpid(), 9)
    real(path, data)
train.write_file = write_file
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
def test_of_two_trainers_in_one_folder_the_second_gets_a_line(run, workplace, clone, monkeypatch):
    """And one that was killed holds nothing."""
    endless = [*TEXT, '--max_iters=1000000', '--eval_interval=100', '--out_dir=r']
    first = clone('train.py', *endless)
    wait_for(first, 'iter    101')
    monkeypatch.setattr(train, 'load_checkpoint', None)  # what the first still writes is not even read
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
    if reader == 'leaves':  # python train.py | tee log: the same Ctrl-C ends tee
        process.stdout.close()
    process.send_signal(signum)
    assert process.wait(120) == 128 + signum
    iteration = checkpoint(clone.folder / 'r')['iter']
    if reader == 'stays':
        assert f'stopped at iteration {iteration};' in process.stdout.read()
        assert process.stderr.read() == 'stopping and saving (once more: at once, without saving)\n'
    assert log(clone.folder / 'r')[-1]['iter'] == iteration > 0


@posix
def test_ctrl_c_saves_where_it_has_ended_the_reader_of_stderr_too(run, workplace, monkeypatch):
    """python train.py 2>&1 | tee log"""
    def closed(*args):
        raise BrokenPipeError
    interrupt(monkeypatch, 'get_batch', 4)
    monkeypatch.setattr(os, 'write', closed)
    assert run(main, *TEXT, '--out_dir=r')[0] == 130
    assert checkpoint(workplace / 'r')['iter'] == 3


@posix
def test_a_second_ctrl_c_ends_the_process_at_once_also_inside_a_long_call_into_c(clone):
    (clone.folder / 'long.py').write_text('''
import hashlib, os, signal, sys, train
real = train.get_batch
def get_batch(tokens, cfg, it, micro_step, device):
    if it == 1:
        os.kill(os.getpid(), signal.SIGINT)
        print("a long call", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2 ** 30)
    return real(tokens, cfg, it, micro_step, device)
train.get_batch = get_batch
train.main(sys.argv[1:])
''')
    process = clone('long.py', *TEXT, '--out_dir=r')
    wait_for(process, 'a long call')
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == -signal.SIGINT and 'Traceback' not in process.stderr.read()


@pytest.mark.parametrize('program', ['train.py', 'sample.py', 'plot_norms.py', 'data/prepare.py'])
def test_an_older_python_is_told_which_one_is_needed(clone, program):
    process = clone('-c', 'import runpy, sys; sys.version_info = (3, 9, 1); sys.path.insert(0, "."); '
                          f'runpy.run_path({program!r}, run_name="__main__")')
    assert process.communicate(timeout=60)[1].splitlines()[-1] == 'Python 3.10 or newer is needed'


def test_nothing_that_windows_lacks_is_imported_at_the_top():
    lacking = re.compile(r'^(import|from) (fcntl|resource|termios|pwd|grp)\b', re.MULTILINE)
    for name in 'train.py', 'looped.py', 'sample.py', 'plot_norms.py', 'data/prepare.py':
        assert not lacking.search((REPO / name).read_text()), name


# The GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('flags', [['--dtype=bfloat16'], ['--compile=False'], ['--checkpoint_loops']],
                         ids=' '.join)
def test_on_a_gpu_every_precision_trains(run, workplace, flags):
    code, out, err = run(main, *TEXT, '--device=cuda', '--max_iters=30', *flags, '--out_dir=r')
    assert code == 0 and 'cuda' in out
    first, *_, last = evaluations(workplace / 'r')
    assert last['bpb'] < first['bpb'] - 0.5
