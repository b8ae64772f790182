"""train.py through its command line: flags, runs, resuming, and every mistake in one line."""

import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from conftest import REPO, TINY
from looped import READOUTS, RECURRENCES, LoopedGPT, flag
from train import FlagParser, TrainConfig, main, train_batch

TEXT = ['--dataset=text.txt', *TINY]
CPU, RUN = torch.device('cpu'), {'log.jsonl', 'ckpt.pt', '.lock'}
posix = pytest.mark.skipif(os.name != 'posix', reason='signals and locks as POSIX has them')


def log(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def checkpoint(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)


def same_weights(a, b):
    a, b = checkpoint(a)['model'], checkpoint(b)['model']
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tree(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def assert_one_line(result, *says, code=1):
    got, _, err = result
    assert got == code and err.count('\n') == 1 and (code == 2 or err.startswith('train.py: ')), result
    for part in says:
        assert part in err
    assert 'rm ' not in err and 'delete it' not in err


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


# Flags


def test_help_lists_every_flag_with_default_and_meaning(run):
    code, out, _ = run(main, '--help')
    assert code == 0
    for f in fields(TrainConfig):
        line = next(x for x in out.split('options:')[1].split('\n  --') if re.match(f.name + r'\s', x))
        assert f.metadata['help'].split('\n')[0] in line and f'(default: {f.default!r})' in line
        assert all(choice in line for choice in f.metadata['choices'] or [])


@pytest.mark.parametrize('typed, want', [
    ('--loops=5', 5), ('--loops 5', 5), ('--compile=False', 'False'), ('--compile', 'True'),
    ('--resume', True), ('--resume=False', False), ('--learning_rate=3e-4', 3e-4), ('--readout raw', 'raw')])
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
    ('--seed=18446744073709551616', 'to'), (f'--batch_size={10 ** 400}', 'to 1048576'),
    ('--eval_iters=1000000000000', 'to 1048576'), ('--block_size=1000000000', 'to 1048576')])
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
    sandwich: float = flag(0.0, '50% of nothing')       # and one with a meaning
    note: str = flag('', 'changes nothing', result=False)


def test_a_field_of_a_fork_is_in_help_folder_and_run_by_itself(run, resume, workplace, monkeypatch):
    monkeypatch.setattr(train, 'TrainConfig', Forked)
    out = run(main, '--help')[1]
    assert re.search(r'--gate \[BOOL\] +\(default: False\)', out) and '50% of nothing (default: 0.0)' in out
    cfg = Forked(gate=True, sandwich=0.5, note='x')
    assert train.result_flags(cfg) == dict(gate=True, sandwich=0.5)
    assert train.run_folder(cfg).name == 'python-rms-residual-per_loop-gate-sandwich0.5'
    assert run(main, *TEXT, '--gate', '--out_dir=r')[0] == 0
    assert log(workplace / 'r')[0]['gate'] is checkpoint(workplace / 'r')['config']['gate'] is True
    code, out, _ = resume('--max_iters=7', '--gate=False')
    assert code == 0 and "'gate': False" in out.splitlines()[0]
    assert_one_line(run(main, '--gate=7'), '--gate must be True or False', code=2)


# Runs


@pytest.mark.parametrize('flags', [
    *([f'--readout={r}'] for r in READOUTS), *([f'--recurrence={r}'] for r in RECURRENCES),
    ['--supervision=terminal'], ['--norm_penalty=0.01'], ['--inject=1'], ['--output_bias=unigram'],
    ['--supervision=terminal', '--norm_penalty=0.01', '--readout=alpha', '--alpha=0.2', '--init=gpt2'],
    ['--gradient_accumulation_steps=2', '--grad_clip=0'], ['--dtype=bfloat16'],
    ['--checkpoint_loops', '--dropout=0.1'], ['--loops=1', '--recurrence=rms']], ids=' '.join)
def test_every_option_trains_and_lowers_the_loss(run, workplace, flags):
    code, out, err = run(main, *TEXT, '--max_iters=30', '--eval_interval=30', *flags, '--out_dir=r')
    assert (code, err) == (0, '')
    lines = log(workplace / 'r')
    assert lines[0]['readout'] == next((f.split('=')[1] for f in flags if 'readout' in f), 'rms')
    first, last = [x for x in lines[1:] if 'val_losses' in x]
    assert last['val_losses'][-1] < first['val_losses'][-1] - 0.5
    loops = lines[0]['loops']
    assert len(last['val_losses']) == len(last['train_losses']) == len(last['norms']) == loops
    steps = [x for x in lines[1:] if 'loss' in x]
    assert [x['iter'] for x in steps] == list(range(1, 31))
    assert steps[0].keys() == {'iter', 'loss', 'norms', 'lr', 'ms'}
    assert checkpoint(workplace / 'r')['iter'] == 30 and checkpoint(workplace / 'r')['config'] == lines[0]


def test_what_a_person_reads_while_it_trains(run, workplace):
    _, out, _ = run(main, *TEXT)
    step = next(x for x in out.splitlines() if x.startswith('iter      1/6'))
    for part in 'loss', 'norm', '->', 'ms', 'tok/s', 'left':
        assert part in step
    assert 'val CE at exits 1..3' in out and 'bits per byte' in out and 'state norm, loops 1..3' in out
    assert 'cpu' in out and 'preparing text.txt' in out
    assert 'run folder out/text.txt-rms-residual-per_loop-' in out


def test_a_terminal_that_is_not_utf8_and_a_folder_that_is_not_ascii_train(run, workplace):
    sys.stdout.reconfigure(encoding='ascii', errors='strict')  # PYTHONIOENCODING=ascii
    code, out, err = run(main, *TEXT, '--out_dir=été')
    assert (code, err) == (0, '') and 'run folder ?t?' in out and (workplace / 'été' / 'ckpt.pt').exists()


def test_ablations_land_side_by_side_by_themselves():
    names = [train.run_folder(TrainConfig(**f)).name for f in (
        {}, dict(norm_penalty=0.01), dict(loops=4), dict(seed=2), dict(seed=20240101), dict(seed=20240102),
        dict(learning_rate=1e-4), dict(readout='raw'), dict(readout='alpha', alpha=0.25), dict(inject=1.0),
        dict(recurrence='damped'), dict(supervision='terminal'), dict(n_layer=3), dict(batch_size=9),
        dict(dataset='a/x.txt'), dict(dataset='b/x.md'), dict(dataset='../-texts'), dict(dataset='.hidden'))]
    assert len(set(names)) == len(names) and names[0] == 'python-rms-residual-per_loop'
    assert names[1].endswith('-pen0.01') and names[2].endswith('-k4') and names[3].endswith('-s2')
    assert names[4].endswith('-s20240101') and not [name for name in names if name[0] in '-.']
    for unseen in dict(device='cpu'), dict(log_interval=1), dict(resume=True), dict(compile='True'):
        assert train.run_folder(TrainConfig(**unseen)).name == names[0]


def test_bits_per_byte_is_cross_entropy_over_the_bytes_of_the_validation_text(trained):
    line = [x for x in log(trained) if 'bpb' in x][-1]
    assert line['bpb'] == pytest.approx(line['val_losses'][-1] / np.log(2))  # one token is one byte here


def test_the_unigram_bias_is_the_log_frequency_of_each_token_and_is_not_trained(run, workplace):
    run(main, *TEXT, '--out_dir=r', '--output_bias=unigram')
    tokens = np.fromfile(next((workplace / 'data').glob('*/train.bin')), np.uint16)
    counts = np.bincount(tokens, minlength=256) + 1
    want = torch.from_numpy(np.log(counts / counts.sum())).float()
    torch.testing.assert_close(checkpoint(workplace / 'r')['model']['output_bias'], want)


@pytest.mark.parametrize('typed', [[], ['--loops=6'], ['--norm_penalty=1'], ['--max_iters=3']], ids=' '.join)
def test_a_finished_run_that_is_resumed_is_evaluated_and_stays_as_it_is(resume, trained, typed):
    before = (trained / 'ckpt.pt').read_bytes(), log(trained)[1:]
    code, out, _ = resume(*typed)
    last = [x for x in log(trained) if 'bpb' in x][-1]
    assert code == 0 and 'eval      6' in out
    assert ' '.join(f'{x:.3f}' for x in last['val_losses']) in out or typed == ['--loops=6']
    assert ((trained / 'ckpt.pt').read_bytes(), log(trained)[1:]) == before and log(trained)[0]['loops'] == 3


def test_a_checkpoint_that_gives_no_finite_loss_is_named(resume, trained):
    state = checkpoint(trained)
    state['model']['pos_emb.weight'].fill_(math.nan)
    torch.save(state, trained / 'ckpt.pt')
    assert_one_line(resume(), 'not finite by iteration 6')


def test_the_learning_rate_warms_up_and_then_stays(run, workplace):
    run(main, *TEXT, '--learning_rate=1e-4', '--warmup_iters=4', '--out_dir=r')
    rates = [x['lr'] for x in log(workplace / 'r') if 'lr' in x]
    assert rates == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4, 1e-4]) and rates[-2:] == [1e-4, 1e-4]


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


def test_weight_decay_is_for_matrices_only():
    cfg = TrainConfig(weight_decay=0.3, recurrence='damped')
    model = LoopedGPT(cfg)
    optimizer = train.configure_optimizer(model, cfg)
    decay = {p.dim(): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    assert decay == {0: 0.0, 1: 0.0, 2: 0.3}
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(list(model.parameters()))


# Batches


def test_a_batch_is_a_function_of_seed_rank_and_iteration():
    def get(rank, it, seed=1):
        cfg = TrainConfig(seed=seed, batch_size=4, gradient_accumulation_steps=3, block_size=8)
        return train_batch(np.arange(5000, dtype=np.uint16), cfg, it, CPU, rank)
    idx, targets = get(0, 7)
    assert idx.shape == targets.shape == (12, 8) and idx.dtype == torch.int64
    assert torch.equal(targets, idx + 1) and torch.equal(idx, idx[:, :1] + torch.arange(8))
    assert torch.equal(get(0, 7)[0], idx)
    for other in get(1, 7), get(0, 8), get(0, 7, seed=2):
        assert not torch.equal(other[0], idx)


def test_the_shortest_corpus_has_one_window():
    idx, targets = train_batch(np.arange(9), TrainConfig(block_size=8, batch_size=2), 0, CPU)
    assert idx[0].tolist() == list(range(8)) and targets[0, -1] == 8


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
@pytest.mark.parametrize('during, call, stops_at', [
    ('train_batch', 6, 5), ('train_batch', 7, 6), ('eval_batches', 2, 0), ('eval_batches', 5, 3)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(run, resume, workplace, monkeypatch, flags, during, call,
                                                    stops_at):
    """Ctrl-C in the middle of a step or of an evaluation."""
    run(main, *TEXT, *flags, '--out_dir=whole')
    interrupt(monkeypatch, during, call)
    code, out, _ = run(main, *TEXT, *flags, '--out_dir=r')
    assert code == 130
    assert f'stopped at iteration {stops_at}; go on with: python train.py --resume --out_dir=r' in out
    assert checkpoint(workplace / 'r')['iter'] == stops_at
    code, out, _ = resume()
    assert code == 0 and f'resumed at iteration {stops_at} of 6' in out
    assert same_weights(workplace / 'whole', workplace / 'r')

    def timeless(folder):
        return [{k: v for k, v in x.items() if k not in ('ms', 'out_dir', 'resume')} for x in log(folder)
                if x.get('iter') != 5 or 'loss' in x]  # where it goes on, it is evaluated
    assert timeless(workplace / 'whole') == timeless(workplace / 'r')


def test_a_run_killed_after_its_checkpoint_logs_the_lost_iterations_once(resume, run, trained):
    lines = (trained / 'log.jsonl').read_text()
    run(main, *TEXT, '--out_dir=r', '--overwrite', '--max_iters=3')
    (trained / 'log.jsonl').write_text(lines)  # as if it had run on and been killed with SIGKILL
    resume('--max_iters=6')
    assert [x['iter'] for x in log(trained)[1:] if 'loss' in x] == [1, 2, 3, 4, 5, 6]
    assert [x['iter'] for x in log(trained)[1:] if 'bpb' in x] == [0, 3, 6]


def test_a_run_can_be_made_longer(resume, run, workplace):
    run(main, *TEXT, '--out_dir=long', '--max_iters=9')
    run(main, *TEXT, '--out_dir=r', '--max_iters=5')
    resume('--max_iters=9')
    assert same_weights(workplace / 'long', workplace / 'r')
    assert [x['iter'] for x in log(workplace / 'r')[1:] if 'bpb' in x] == [0, 3, 5, 6, 9]


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
    assert not same_weights(workplace / 'r', workplace / 'unchanged')


def test_a_change_is_logged_once_where_two_resumes_make_it_before_a_save(resume, trained):
    saved = (trained / 'ckpt.pt').read_bytes()
    for _ in range(2):
        resume('--max_iters=7', '--norm_penalty=0.1')
        (trained / 'ckpt.pt').write_bytes(saved)  # as if it had been killed
    assert len([x for x in log(trained) if 'changed' in x]) == 1


@posix
def test_a_resume_stopped_before_its_first_update_keeps_the_checkpoint(run, resume, workplace, monkeypatch):
    """Its flags would be saved, and that they changed forgotten."""
    run(main, *TEXT, '--out_dir=r')
    before = (workplace / 'r' / 'ckpt.pt').read_bytes()
    interrupt(monkeypatch, 'eval_batches', 2)
    assert resume('--max_iters=8', '--norm_penalty=1')[0] == 130
    assert (workplace / 'r' / 'ckpt.pt').read_bytes() == before


def test_flags_typed_at_resume_hold_and_the_others_are_those_of_the_run(resume, run, workplace):
    run(main, *TEXT, '--out_dir=r', '--device=cpu:0')
    code, out, _ = resume('--max_iters=7', '--weight_decay=0.5', '--dtype=bfloat16')
    assert code == 0 and 'cpu:0, bfloat16' in out
    state = checkpoint(workplace / 'r')
    assert state['config']['device'] == 'cpu:0'
    assert state['optimizer']['param_groups'][0]['weight_decay'] == state['config']['weight_decay'] == 0.5
    assert log(workplace / 'r')[0] == state['config']


@pytest.mark.parametrize('typed, says', [
    ('--n_embd=32', 'r/ckpt.pt does not fit this code and {\'n_embd\': 32} '),
    ('--n_embd=32', 'size mismatch for tok_emb.weight'),
    ('--n_layer=2', 'Missing key(s) in state_dict: "blocks.1.norm_attn.weight"'),
    ('--vocab_size=300', "'vocab_size': 300"), ('--readout=raw', "'readout': 'raw'"),
    ('--recurrence=damped', "'recurrence': 'damped'"), ('--output_bias=learned', "'output_bias': 'learned'"),
    ('--n_head=64', 'n_embd must be a multiple of n_head (64), got 16')])
def test_resume_refuses_by_name_a_flag_that_changes_the_parameters(resume, trained, typed, says):
    before = tree(trained)
    assert_one_line(resume(typed), says)
    assert tree(trained) == before
    assert resume('--n_embd=16', '--max_iters=7')[0] == 0


def test_resume_refuses_another_text(resume, trained, workplace):
    (workplace / 'text.txt').write_text('another text ' * 1000)
    assert_one_line(resume(), 'text.txt is not the text that this run was trained on')


# Mistakes: one line, exit code 1, nothing changed on disk


def test_a_folder_that_holds_a_run_is_not_overwritten_silently(run, workplace):
    run(main, *TEXT)
    before = tree(workplace)
    result = run(main, *TEXT)
    assert_one_line(result, 'out/text.txt-rms-', 'holds a run', '--resume', '--overwrite', '--out_dir')
    assert_one_line(run(main, *TEXT, '--resume', '--overwrite'), 'holds a run', '--resume', '--overwrite')
    assert tree(workplace) == before
    assert run(main, *TEXT, '--overwrite')[0] == 0


@pytest.mark.parametrize('flags', [[], ['--resume']], ids=' '.join)
def test_a_folder_with_a_log_and_no_checkpoint_says_overwrite(run, trained, flags):
    (trained / 'ckpt.pt').unlink()
    before = tree(trained)
    result = run(main, *TEXT, '--out_dir=r', *flags)
    assert_one_line(result, 'r holds a run: it has saved no checkpoint, --overwrite replaces it')
    assert tree(trained) == before
    assert run(main, *TEXT, '--out_dir=r', '--overwrite')[0] == 0


@pytest.mark.parametrize('flags, says', [
    (['--dataset=nowhere.txt'], ['nowhere.txt', 'python, shakespeare, wikitext103']),
    (['--dataset=short.txt'], ['short.txt', 'at least 17', 'block_size + 1']),
    *(([f'--device={name}'], [f'--device={name}', '--device=auto'])
      for name in ('cuda:77', 'toaster', 'meta', 'hpu', 'xla', 'cpu:-1')),
    (['--vocab_size=100'], ['100', '256', '50257']),
    (['--resume'], ['no checkpoint', 'ckpt.pt', 'has been trained'])], ids=lambda x: ' '.join(x))
def test_what_cannot_work_is_named(run, workplace, flags, says):
    (workplace / 'short.txt').write_text('too short for a window of sixteen.')
    before = tree(workplace)
    assert_one_line(run(main, *TEXT, *flags), *says)
    assert tree(workplace) == before and not (workplace / 'out').exists()


def overcommits():
    setting = Path('/proc/sys/vm/overcommit_memory')
    return setting.exists() and setting.read_text().strip() == '1'


@pytest.mark.parametrize('flags, code, says', [
    (['--batch_size=1000000000000'], 2, '--batch_size'), (['--eval_iters=1000000000000'], 2, '--eval_iters'),
    (['--device=meta'], 1, '--device=meta'), (['--dataset=nowhere.txt'], 1, 'nowhere.txt'),
    (['--eval_iters=1048576', '--batch_size=65536'], 1, 'out of memory: try a smaller batch')],
    ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_overwrite_with_a_flag_that_cannot_work_leaves_the_old_run_alone(run, trained, flags, code, says):
    if 'memory' in says and overcommits():
        pytest.skip('this machine promises memory that it lacks')
    before = tree(trained)
    assert_one_line(run(main, *TEXT, '--out_dir=r', '--overwrite', *flags), says, code=code)
    assert tree(trained) == before


def test_where_memory_ends_one_line_says_what_to_make_smaller(run, monkeypatch):
    monkeypatch.setattr(train, 'LoopedGPT', lambda cfg: torch.empty(2 ** 50))
    assert_one_line(run(main, '--dataset=text.txt'), 'out of memory: try a smaller batch', '--n_embd')
    if sys.platform == 'linux':
        with pytest.raises(RuntimeError, match="can't allocate memory"):  # what the CPU says of it
            torch.empty(2 ** 50)


@pytest.mark.parametrize('bug', [ValueError, RuntimeError, KeyError, AttributeError])
@pytest.mark.parametrize('where', ['__init__', 'forward'])
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


def test_a_block_size_too_long_for_a_corpus_that_is_prepared_already_is_named(run, workplace):
    run(main, *TEXT)
    before = tree(workplace)
    assert_one_line(run(main, *TEXT, '--block_size=500000', '--out_dir=long'), 'text.txt', 'at least 500001')
    assert tree(workplace) == before


def test_a_token_outside_the_vocabulary_is_named(run, workplace):
    run(main, *TEXT)
    path = next((workplace / 'data').glob('*/val.bin'))
    path.write_bytes(np.full(path.stat().st_size // 2, 300, np.uint16).tobytes())
    assert_one_line(run(main, *TEXT, '--out_dir=new'), 'token 300', 'vocab_size 256', 'delete the folder')


# The log


@pytest.mark.parametrize('damage', [
    b'\x80\xff\x00\n', b'5\n', b'null\n', b'{"a":1}\n', b'"loops"\n', b'[]\n', b'', b'[' * 100000 + b'\n',
    b'{"loops": 3, "it', b'{"loops": "three"}\n'], ids=lambda x: repr(x[:20]))
@pytest.mark.parametrize('place', ['all', 'middle'])
def test_a_log_that_train_did_not_write_is_named_and_not_shortened(resume, trained, damage, place):
    lines = (trained / 'log.jsonl').read_bytes().splitlines(keepends=True)
    if place == 'middle':
        damage = b''.join(lines[:3]) + (damage or b'\n') + b''.join(lines[3:])
    (trained / 'log.jsonl').write_bytes(damage)
    before = tree(trained)
    assert_one_line(resume('--max_iters=9'), 'r/log.jsonl has a line that is not of train.py')
    assert tree(trained) == before
    with pytest.raises(train.UserError):
        train.read_log(trained / 'log.jsonl')


def test_a_log_whose_last_line_was_cut_off_is_mended(resume, run, workplace):
    run(main, *TEXT, '--out_dir=whole', '--max_iters=9')
    run(main, *TEXT, '--out_dir=r')
    with open(workplace / 'r' / 'log.jsonl', 'a') as f:
        f.write('{"iter": 7, "lo')
    assert len(train.read_log(workplace / 'r' / 'log.jsonl')) == 10
    assert resume('--max_iters=9')[0] == 0
    iters = [x['iter'] for x in log(workplace / 'r')[1:] if 'changed' not in x]
    assert iters == [x['iter'] for x in log(workplace / 'whole')[1:]]


def test_a_run_without_its_log_resumes(resume, trained):
    (trained / 'log.jsonl').unlink()
    assert resume('--max_iters=8')[0] == 0
    assert [x['iter'] for x in log(trained)[1:] if 'loss' in x] == [7, 8]


def full_disk(limit, call):
    """call(), with no file able to grow beyond `limit` bytes."""
    resource = pytest.importorskip('resource')
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_while_logging_names_the_file_and_leaves_no_other(resume, trained):
    resume()  # prepares the corpus
    size, before = (trained / 'log.jsonl').stat().st_size, tree(trained)
    result = full_disk(size // 2, lambda: resume('--max_iters=9'))
    assert_one_line(result, 'could not write r/log.jsonl', 'File too large', 'make room, what is saved')
    assert tree(trained) == before
    result = full_disk(size + 300, lambda: resume('--max_iters=90', '--eval_interval=90'))
    assert_one_line(result, 'could not write r/log.jsonl', 'File too large', 'make room')
    assert {p.name for p in trained.iterdir()} == RUN
    assert resume('--max_iters=9')[0] == 0
    assert [x['iter'] for x in log(trained) if 'loss' in x] == list(range(1, 10))


# The checkpoint


def test_a_full_disk_keeps_the_old_checkpoint(resume, run, workplace):
    run(main, *TEXT, '--out_dir=r', '--max_iters=3')
    before = (workplace / 'r' / 'ckpt.pt').read_bytes()
    result = full_disk(len(before) // 2, lambda: resume('--max_iters=6'))
    assert_one_line(result, 'could not write r/ckpt.pt', 'File too large', 'what is saved stays')
    assert len(log(workplace / 'r')) > 3
    assert (workplace / 'r' / 'ckpt.pt').read_bytes() == before
    assert {p.name for p in (workplace / 'r').iterdir()} == RUN


@pytest.mark.parametrize('damage', ['truncated', 'foreign', 'text', 'empty', 'tensor'])
def test_a_truncated_or_foreign_checkpoint_is_named(resume, trained, damage):
    path = trained / 'ckpt.pt'
    if damage == 'truncated':
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == 'foreign':
        torch.save({'state_dict': {}}, path)
    elif damage == 'tensor':
        torch.save(torch.zeros(3), path)
    else:
        path.write_text('' if damage == 'empty' else 'hello')
    before = tree(trained)
    assert_one_line(resume(), 'r/ckpt.pt cannot be read by this train.py and flags (')
    assert tree(trained) == before


SPOILT = dict(
    moment=lambda state: state['optimizer']['state'][0].update(exp_avg=torch.zeros(3, 3)),
    moment_of_nothing=lambda state: state['optimizer']['state'].update({99: dict(step=torch.tensor(1.0))}),
    moment_of_a_word=lambda state: state['optimizer']['state'].update(word=dict(step=torch.tensor(1.0))),
    moment_that_is_a_number=lambda state: state['optimizer']['state'][0].update(exp_avg=1.0),
    step=lambda state: state['optimizer']['state'][1].update(step=torch.zeros(1000)),
    no_optimizer=lambda state: state.pop('optimizer'),
    iter=lambda state: state.update(iter=-1),
    iter_that_is_text=lambda state: state.update(iter='3'),
    iter_that_is_a_googol=lambda state: state.update(iter=10 ** 100),
    corpus=lambda state: state.update(corpus=7),
    weights_that_are_text=lambda state: state.update(model='weights'),
    loops=lambda state: state['config'].update(loops=10 ** 9),
    n_embd=lambda state: state['config'].update(n_embd=10 ** 7),
    the_largest_size=lambda state: state['config'].update(n_layer=1000, n_embd=2 ** 16))


@pytest.mark.parametrize('spoil', SPOILT)
def test_a_checkpoint_that_would_crash_or_fill_the_machine_is_refused(resume, trained, spoil):
    state = checkpoint(trained)
    SPOILT[spoil](state)
    torch.save(state, trained / 'ckpt.pt')
    before = tree(trained)
    assert_one_line(resume('--max_iters=9'), 'r/ckpt.pt')
    assert tree(trained) == before


@pytest.mark.parametrize('edit, says', [
    ('missing', ['Missing key(s)', '"gate.weight"']),
    ('misshapen', ['size mismatch for blocks.0.w1.weight', '[64, 16]', '[48, 16]']),
    ('renamed', ['Unexpected key(s)', '"blocks.0.proj.weight"'])])
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
    result = resume()
    assert_one_line(result, 'r/ckpt.pt does not fit this code and its flags', *says)
    assert tree(trained) == before


def test_a_checkpoint_of_a_fork_names_the_flag_that_this_code_lacks(resume, trained):
    state = checkpoint(trained)
    state['config']['gate'] = True
    torch.save(state, trained / 'ckpt.pt')
    result = resume()
    assert_one_line(result, 'r/ckpt.pt cannot be read by this train.py and flags', "'gate'")


@pytest.mark.parametrize('error, says', [
    (PermissionError(13, 'Permission denied', 'r/ckpt.pt'), "Permission denied: 'r/ckpt.pt'"),
    (MemoryError(), 'out of memory'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 'out of memory')])
def test_no_permission_and_no_memory_are_not_the_fault_of_the_file(resume, trained, monkeypatch, error, says):
    def load(*args, **kwargs):
        raise error
    monkeypatch.setattr(torch, 'load', load)
    result = resume()
    assert_one_line(result, says)
    assert 'cannot be read by' not in result[2]


# Divergence


@pytest.mark.parametrize('flags, at', [(['--eval_interval=1'], 4), (['--eval_interval=100'], 5),
                                       (['--eval_interval=7', '--log_interval=100'], 7)])
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(resume, run, workplace, flags, at):
    """Weights of 1e25 after one step: their squares are infinite, so is the next loss."""
    run(main, *TEXT, '--out_dir=r', '--max_iters=3')
    before = (workplace / 'r' / 'ckpt.pt').read_bytes()
    result = resume('--max_iters=30', '--learning_rate=1e25', *flags)
    assert_one_line(result, f'not finite by iteration {at}', 'r/ckpt.pt is the last good checkpoint')
    assert '--learning_rate' in result[2] and 'grad_clip' not in result[2]  # 1 is the default
    assert (workplace / 'r' / 'ckpt.pt').read_bytes() == before
    text = (workplace / 'r' / 'log.jsonl').read_text()
    assert 'Infinity' not in text and 'NaN' not in text


@posix
def test_sigterm_in_the_update_in_which_the_weights_go_bad_keeps_the_good_checkpoint(run, resume, workplace,
                                                                                     monkeypatch):
    run(main, *TEXT, '--out_dir=r', '--max_iters=3')
    before = (workplace / 'r' / 'ckpt.pt').read_bytes()

    with monkeypatch.context() as patch:
        interrupt(patch, 'train_batch', 2, signal.SIGTERM)
        result = resume('--max_iters=30', '--log_interval=100', '--learning_rate=1e25')
    assert_one_line(result, 'not finite by iteration 4', 'r/ckpt.pt is the last good checkpoint')
    assert (workplace / 'r' / 'ckpt.pt').read_bytes() == before
    assert resume('--max_iters=6')[0] == 0


# Kills, signals and races


@posix
def test_a_kill_during_save_keeps_the_old_checkpoint(resume, clone, monkeypatch):
    """SIGKILL between the first and the last byte of a save."""
    (clone.folder / 'kill.py').write_text('''
import os, sys, torch, train
real, saves = torch.save, []
def save(state, f):
    saves.append(1)
    if len(saves) == 2:
        f.write(b"half a checkpoint"); f.flush()
        os.kill(os.getpid(), 9)
    real(state, f)
torch.save = save
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
    lines = train.read_log(workplace / 'r' / 'log.jsonl')
    steps = [x['iter'] for x in lines if 'loss' in x]
    assert steps == list(range(1, len(steps) + 1))
    assert run(main, *TEXT, '--out_dir=r', '--overwrite')[0] == 0


@posix
@pytest.mark.parametrize('signum, reader', [(signal.SIGTERM, 'stays'), (signal.SIGINT, 'leaves')])
def test_ctrl_c_and_sigterm_save_a_checkpoint_and_say_so(clone, signum, reader):
    process = clone('train.py', *TEXT, '--max_iters=1000000', '--eval_interval=1000000', '--out_dir=r')
    wait_for(process, 'iter')
    if reader == 'leaves':  # python train.py | tee log: the same Ctrl-C ends tee
        process.stdout.close()
        process.send_signal(signum)
        assert process.wait(120) == 128 + signum and process.stderr.read() == ''
    else:
        process.send_signal(signum)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 128 + signum and err == ''
    iteration = checkpoint(clone.folder / 'r')['iter']
    assert reader == 'leaves' or f'stopped at iteration {iteration};' in out
    assert log(clone.folder / 'r')[-1]['iter'] == iteration


@posix
def test_a_second_ctrl_c_inside_one_long_call_into_c_ends_the_process_at_once(clone):
    (clone.folder / 'long.py').write_text('''
import hashlib, sys, train
real = train.train_batch
def train_batch(tokens, cfg, it, device):
    if it == 1:
        print("a long call", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2 ** 30)
    return real(tokens, cfg, it, device)
train.train_batch = train_batch
train.main(sys.argv[1:])
''')
    process = clone('long.py', *TEXT, '--out_dir=r')
    wait_for(process, 'a long call')
    deadline = threading.Timer(20, process.kill)
    deadline.start()
    time.sleep(1)  # so that the call has begun
    process.send_signal(signal.SIGINT)
    wait_for(process, 'stopping and saving (once more: at once')
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and process.stderr.read() == ''
    deadline.cancel()


@posix
@pytest.mark.parametrize('program', ['train.py', 'sample.py', 'plot_norms.py'])
def test_ctrl_c_while_importing_gives_no_traceback(clone, program):
    for name in 'numpy', 'torch', 'matplotlib':
        text = 'import time\nprint("importing", flush=True)\ntime.sleep(60)\n'
        (clone.folder / f'{name}.py').write_text(text)
    process = clone(program)
    wait_for(process, 'importing')
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and process.stderr.read() == ''


@posix
def test_ctrl_c_while_dynamo_traces_saves_a_checkpoint(run, workplace, monkeypatch):
    """Tensors made by the handler itself would be fake there."""
    def traced(tokens, cfg, it, device):
        if it == 1:
            with FakeTensorMode():
                os.kill(os.getpid(), signal.SIGINT)
        return train_batch(tokens, cfg, it, device)
    monkeypatch.setattr(train, 'train_batch', traced)
    code, out, err = run(main, *TEXT, '--out_dir=r', '--log_interval=100')
    assert code == 130 and 'stopped at iteration 1' in out and err == ''
    assert checkpoint(workplace / 'r')['iter'] == 1


def test_nothing_that_windows_lacks_is_imported_at_the_top():
    lacking = re.compile(r'^(import|from) (fcntl|resource|termios|pwd|grp)\b', re.MULTILINE)
    for name in 'train.py', 'looped.py', 'sample.py', 'plot_norms.py', 'data/prepare.py':
        assert not lacking.search((REPO / name).read_text()), name


# Precision and the GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('flags', [['--dtype=bfloat16'], ['--compile=False'], ['--checkpoint_loops']],
                         ids=' '.join)
def test_on_a_gpu_every_precision_trains(run, workplace, flags):
    code, out, err = run(main, *TEXT, '--device=cuda', '--max_iters=30', *flags, '--out_dir=r')
    assert code == 0 and 'cuda' in out
    first, *_, last = [x for x in log(workplace / 'r') if 'bpb' in x]
    assert last['bpb'] < first['bpb'] - 0.5
