"""train.py through its command line: flags, runs, resuming, and every mistake in one line."""

import json
import math
import os
import resource
import signal
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from conftest import REPO, TINY
from looped import READOUTS, RECURRENCES, LoopedConfig, LoopedGPT
from train import FlagParser, TrainConfig, learning_rate, main, train_batch

TEXT = ['--dataset=text.txt', *TINY]


def log(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def weights(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)['model']


def assert_same_weights(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Flags


def test_help_lists_every_flag_with_default_and_meaning(run):
    code, out, _ = run(main, '--help')
    assert code == 0
    for f in fields(TrainConfig):
        line = next(x for x in out.split('options:')[1].split('\n  --') if x.startswith(f.name + ' ')
                    or x.startswith(f.name + '\n'))
        assert f.metadata['help'] in line and f'(default: {f.default!r})' in line
        assert all(choice in line for choice in f.metadata['choices'] or [])


@pytest.mark.parametrize('typed, want', [
    ('--loops=5', 5), ('--loops 5', 5), ('--compile=False', 'False'), ('--compile', 'True'), ('--resume', True),
    ('--resume=False', False), ('--learning_rate=3e-4', 3e-4), ('--readout layernorm', 'layernorm')])
def test_flags_are_typed_as_in_nanogpt(typed, want):
    cfg, given = FlagParser(TrainConfig, '').parse(typed.split())
    assert list(given.values()) == [want] and getattr(cfg, *given) == want


@pytest.mark.parametrize('typed, says', [
    ('--redout=rms', 'did you mean --readout?'), ('--n-layer=3', 'did you mean --n_layer?'), ('--loop=3', '--loops'),
    ('--readout=rsm', 'rms, layernorm, raw, final_rms, alpha'), ('--loops=0', 'at least 1'), ('--loops=two', "'two'"),
    ('--n_head=5', 'multiple of n_head'), ('--alpha=2', 'at most 1'), ('--norm_penalty=-1', 'at least 0'),
    ('--compile=maybe', 'auto, True, False'), ('--resume=perhaps', 'True or False'), ('--batch_size=0', 'at least 1')])
def test_a_mistyped_flag_ends_in_one_line_that_names_it(run, workplace, typed, says):
    code, out, err = run(main, typed)
    assert code == 2
    assert out == ''
    assert err.count('\n') == 1
    assert says in err and typed.split('=')[0].strip('-').split('-')[0] in err
    assert not (workplace / 'out').exists() and not list((workplace / 'data').iterdir())


def test_the_readme_names_no_flag_that_does_not_exist():
    import re
    known = {f.name for f in fields(TrainConfig)}
    for line in (REPO / 'README.md').read_text().splitlines():
        for command in re.findall(r'train\.py ([^`]*)', line):
            assert set(re.findall(r'--([a-z0-9_]+)', command)) <= known | {'help'}, line


# Runs


@pytest.mark.parametrize('flags', [
    *([f'--readout={r}'] for r in READOUTS), *([f'--recurrence={r}'] for r in RECURRENCES), ['--supervision=terminal'],
    ['--norm_penalty=0.01'], ['--supervision=terminal', '--norm_penalty=0.01', '--readout=alpha', '--alpha=0.2'],
    ['--lr_schedule=cosine', '--gradient_accumulation_steps=2', '--grad_clip=0'], ['--dtype=bfloat16'],
    ['--checkpoint_loops', '--dropout=0.1'], ['--loops=1', '--recurrence=rms']], ids=' '.join)
def test_every_option_trains_and_lowers_the_loss(run, workplace, flags):
    code, out, err = run(main, *TEXT, '--max_iters=30', '--eval_interval=30', '--learning_rate=1e-2', *flags,
                         '--out_dir=r')
    assert (code, err) == (0, '')
    lines = log(workplace / 'r')
    assert lines[0]['readout'] == next((f.split('=')[1] for f in flags if 'readout' in f), 'rms')
    first, last = [x for x in lines[1:] if 'val_losses' in x]
    assert last['val_losses'][-1] < first['val_losses'][-1] - 0.5
    loops = lines[0]['loops']
    assert len(last['val_losses']) == len(last['train_losses']) == len(last['norms']) == loops
    steps = [x for x in lines[1:] if 'loss' in x]
    assert [x['iter'] for x in steps] == list(range(1, 31)) and steps[0].keys() == {'iter', 'loss', 'norms', 'lr', 'ms'}
    state = torch.load(workplace / 'r' / 'ckpt.pt', weights_only=True)
    assert state['iter'] == 30 and state['config'] == lines[0]


def test_what_a_person_reads_while_it_trains(run, workplace):
    _, out, _ = run(main, *TEXT)
    step = next(x for x in out.splitlines() if x.startswith('iter      1/6'))
    for part in 'loss', 'norm', '->', 'ms', 'tok/s', 'left':
        assert part in step
    assert 'val CE at exits 1..3' in out and 'bits per byte' in out and 'state norm, loops 1..3' in out
    assert 'cpu' in out and 'preparing text.txt' in out and 'out/text-rms-residual-per_loop-k3' in out


def test_ablations_land_side_by_side_by_themselves():
    names = [train.run_folder(TrainConfig(**f)).name for f in (
        {}, dict(norm_penalty=0.01), dict(loops=4), dict(seed=2), dict(learning_rate=1e-4), dict(readout='raw'),
        dict(readout='alpha', alpha=0.25), dict(recurrence='damped'), dict(supervision='terminal'), dict(dataset='a/b.txt'))]
    assert len(set(names)) == len(names) and names[0] == 'python-rms-residual-per_loop'
    assert names[1].endswith('-pen0.01') and names[2].endswith('-k4') and names[3].endswith('-s2')


def test_bits_per_byte_is_cross_entropy_over_the_bytes_of_the_validation_text(run, workplace):
    run(main, *TEXT, '--out_dir=r')
    line = [x for x in log(workplace / 'r') if 'bpb' in x][-1]
    assert line['bpb'] == pytest.approx(line['val_losses'][-1] / np.log(2))  # one token is one byte here


def test_eval_only_evaluates_a_checkpoint_and_leaves_the_run_alone(run, workplace):
    run(main, *TEXT, '--out_dir=r')
    before = {p.name: p.read_bytes() for p in (workplace / 'r').iterdir()}
    code, out, _ = run(main, '--out_dir=r', '--resume', '--eval_only')
    last = [x for x in log(workplace / 'r') if 'bpb' in x][-1]
    assert code == 0 and 'eval      6' in out and ' '.join(f'{x:.3f}' for x in last['val_losses']) in out
    assert {p.name: p.read_bytes() for p in (workplace / 'r').iterdir()} == before


def test_eval_only_names_a_checkpoint_that_gives_no_finite_loss(run, workplace):
    run(main, *TEXT, '--out_dir=r')
    state = torch.load(workplace / 'r' / 'ckpt.pt', weights_only=True)
    state['model']['pos_emb.weight'].fill_(math.nan)
    torch.save(state, workplace / 'r' / 'ckpt.pt')
    assert_one_line(run(main, '--out_dir=r', '--resume', '--eval_only'), 'not finite at iteration 6')


def test_the_learning_rate_warms_up_and_then_stays_or_follows_a_cosine():
    cfg = TrainConfig(learning_rate=1.0, warmup_iters=10, max_iters=110, min_lr=0.1)
    assert [learning_rate(cfg, it) for it in (0, 4, 9, 10, 60, 109)] == pytest.approx([0.1, 0.5, 1, 1, 1, 1])
    cfg.lr_schedule = 'cosine'
    assert [learning_rate(cfg, it) for it in (9, 10, 60, 110)] == pytest.approx([1, 1, 0.55, 0.1])


def test_weight_decay_is_for_matrices_only():
    cfg = TrainConfig(weight_decay=0.3)
    optimizer = train.configure_optimizer(LoopedGPT(LoopedConfig(recurrence='damped')), cfg, torch.device('cpu'))
    decay = {p.dim(): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    assert decay == {0: 0.0, 1: 0.0, 2: 0.3}
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(list(LoopedGPT(LoopedConfig(recurrence='damped')).parameters()))


# Batches


def test_a_batch_is_a_function_of_seed_rank_and_iteration():
    tokens, cpu = np.arange(5000, dtype=np.uint16), torch.device('cpu')
    cfg = TrainConfig(batch_size=4, gradient_accumulation_steps=3, block_size=8, seed=1)
    def get(rank, it, c=cfg):
        return train_batch(tokens, c, rank, it, cpu)
    idx, targets = get(0, 7)
    assert idx.shape == targets.shape == (12, 8) and idx.dtype == torch.int64
    assert torch.equal(targets, idx + 1) and torch.equal(idx, idx[:, :1] + torch.arange(8))
    assert torch.equal(get(0, 7)[0], idx)
    for other in get(1, 7), get(0, 8), get(0, 7, TrainConfig(batch_size=4, gradient_accumulation_steps=3, block_size=8, seed=2)):
        assert not torch.equal(other[0], idx)


def test_the_shortest_corpus_has_one_window():
    cfg = TrainConfig(block_size=8, batch_size=2)
    idx, targets = train_batch(np.arange(9), cfg, 0, 0, torch.device('cpu'))
    assert idx[0].tolist() == list(range(8)) and targets[0, -1] == 8


# Resuming


@pytest.mark.parametrize('flags', [[], ['--dropout=0.2', '--gradient_accumulation_steps=2', '--lr_schedule=cosine']],
                         ids=' '.join)
@pytest.mark.parametrize('during, call, stops_at', [
    ('learning_rate', 5, 5), ('learning_rate', 6, 6), ('eval_batches', 1, 0), ('eval_batches', 4, 3), ('eval_batches', 6, 6)])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(run, workplace, monkeypatch, flags, during, call,
                                                                     stops_at):
    run(main, *TEXT, *flags, '--out_dir=whole')
    real, calls = getattr(train, during), []

    def interrupt(*args):  # Ctrl-C in the middle of a step or of an evaluation
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(train, during, interrupt)
    code, out, _ = run(main, *TEXT, *flags, '--out_dir=parts')
    assert code == 130 and f'stopped at iteration {stops_at}; go on with: python train.py --resume --out_dir=parts' in out
    assert torch.load(workplace / 'parts' / 'ckpt.pt', weights_only=True)['iter'] == stops_at
    code, out, _ = run(main, '--out_dir=parts', '--resume')
    assert code == 0 and f'resumed at iteration {stops_at} of 6' in out
    assert_same_weights(weights(workplace / 'whole'), weights(workplace / 'parts'))

    def timeless(folder):
        return [{k: v for k, v in x.items() if k not in ('ms', 'out_dir', 'resume')} for x in log(folder)]
    assert timeless(workplace / 'whole') == timeless(workplace / 'parts')


def test_a_run_killed_after_its_checkpoint_logs_the_lost_iterations_once(run, workplace):
    run(main, *TEXT, '--out_dir=r')
    lines = (workplace / 'r' / 'log.jsonl').read_text()
    run(main, *TEXT, '--out_dir=r', '--overwrite', '--max_iters=3')
    (workplace / 'r' / 'log.jsonl').write_text(lines)  # as if it had run on and been killed with SIGKILL
    run(main, '--out_dir=r', '--resume', '--max_iters=6')
    iters = [x['iter'] for x in log(workplace / 'r')[1:] if 'loss' in x]
    assert iters == [1, 2, 3, 4, 5, 6] and [x['iter'] for x in log(workplace / 'r')[1:] if 'bpb' in x] == [0, 3, 6]


def test_a_run_can_be_made_longer(run, workplace):
    run(main, *TEXT, '--out_dir=long', '--max_iters=9')
    run(main, *TEXT, '--out_dir=r', '--max_iters=5')
    run(main, '--out_dir=r', '--resume', '--max_iters=9')
    assert_same_weights(weights(workplace / 'long'), weights(workplace / 'r'))
    assert [x['iter'] for x in log(workplace / 'r')[1:] if 'bpb' in x] == [0, 3, 5, 6, 9]


# Mistakes: one line, exit code 1, nothing changed on disk


def tree(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def assert_one_line(result, *says):
    code, _, err = result
    assert code == 1 and err.count('\n') == 1 and err.startswith('train.py: '), err
    for part in says:
        assert part in err


def test_a_folder_that_holds_a_run_is_not_overwritten_silently(run, workplace):
    run(main, *TEXT)
    before = tree(workplace)
    assert_one_line(run(main, *TEXT), 'out/text-rms-residual-per_loop-k3 holds a run', '--resume', '--overwrite', '--out_dir')
    assert_one_line(run(main, *TEXT, '--eval_only'), 'holds a run', '--resume')
    assert_one_line(run(main, *TEXT, '--resume', '--overwrite'), 'give one of them')
    assert tree(workplace) == before
    assert run(main, *TEXT, '--overwrite')[0] == 0


@pytest.mark.parametrize('flags, says', [
    (['--dataset=nowhere.txt'], ['nowhere.txt', 'python, shakespeare, wikitext103']),
    (['--dataset=shakespear'], ['did you mean shakespeare?']),
    (['--dataset=empty.txt'], ['empty.txt', '0 train tokens']),
    (['--dataset=short.txt'], ['short.txt', 'at least 17', 'block_size + 1', 'more text']),
    (['--device=cuda:77'], ['cuda:77', 'auto']), (['--device=toaster'], ['toaster', 'auto']),
    (['--vocab_size=100'], ['100', '256', '50257']), (['--vocab_size=60000'], ['60000', '50257']),
    (['--resume'], ['no checkpoint', 'ckpt.pt', 'has been trained'])], ids=lambda x: ' '.join(x))
def test_what_cannot_work_is_named(run, workplace, flags, says):
    (workplace / 'empty.txt').touch()
    (workplace / 'short.txt').write_text('too short for a window of sixteen.')
    before = tree(workplace)
    assert_one_line(run(main, *TEXT, *flags), *says)
    assert tree(workplace) == before and not (workplace / 'out').exists()


def test_checkpoint_loops_with_dropout_is_refused_on_mps(run, workplace, monkeypatch):
    monkeypatch.setattr(train, 'pick_device', lambda name: torch.device('mps'))
    before = tree(workplace)
    assert_one_line(run(main, *TEXT, '--checkpoint_loops', '--dropout=0.1'), '--checkpoint_loops', '--dropout', 'MPS')
    assert tree(workplace) == before


def test_a_block_size_too_long_for_a_corpus_that_is_prepared_already_is_named(run, workplace):
    run(main, *TEXT)
    before = tree(workplace)
    assert_one_line(run(main, *TEXT, '--block_size=500000', '--out_dir=r'), 'text.txt', 'at least 500001', 'more text')
    assert tree(workplace) == before


def test_resume_refuses_a_model_flag_that_contradicts_the_checkpoint(run, workplace):
    run(main, *TEXT, '--out_dir=r')
    before = tree(workplace)
    assert_one_line(run(main, '--out_dir=r', '--resume', '--loops=5'), '--loops=5 contradicts', 'trained with 3')
    assert tree(workplace) == before
    assert run(main, '--out_dir=r', '--resume', '--loops=3', '--max_iters=7')[0] == 0


def test_resume_refuses_another_text(run, workplace):
    run(main, *TEXT, '--out_dir=r')
    (workplace / 'text.txt').write_text('another text ' * 1000)
    assert_one_line(run(main, '--out_dir=r', '--resume'), 'text.txt is not the text', 'r/ckpt.pt')


def test_flags_typed_at_resume_hold(run, workplace):
    run(main, *TEXT, '--out_dir=r', '--device=cpu:0')
    code, out, _ = run(main, '--out_dir=r', '--resume', '--max_iters=7', '--weight_decay=0.5', '--dtype=bfloat16')
    assert code == 0 and 'cpu:0 x 1, bfloat16' in out  # the device is the run's own
    state = torch.load(workplace / 'r' / 'ckpt.pt', weights_only=True)
    assert state['optimizer']['param_groups'][0]['weight_decay'] == state['config']['weight_decay'] == 0.5
    assert log(workplace / 'r')[0] == state['config']


def test_a_log_whose_last_line_was_cut_off_is_mended(run, workplace):
    run(main, *TEXT, '--out_dir=whole', '--max_iters=9')
    run(main, *TEXT, '--out_dir=r')
    with open(workplace / 'r' / 'log.jsonl', 'a') as f:
        f.write('{"iter": 7, "lo')
    assert run(main, '--out_dir=r', '--resume', '--max_iters=9')[0] == 0
    assert [x.get('iter') for x in log(workplace / 'r')] == [x.get('iter') for x in log(workplace / 'whole')]


@pytest.mark.parametrize('damage', ['truncated', 'foreign', 'text', 'empty', 'other_model', 'tensor'])
def test_a_truncated_or_foreign_checkpoint_is_named(run, workplace, damage):
    run(main, *TEXT, '--out_dir=r')
    path = workplace / 'r' / 'ckpt.pt'
    if damage == 'truncated':
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == 'foreign':
        torch.save({'state_dict': {}}, path)
    elif damage == 'tensor':
        torch.save(torch.zeros(3), path)
    elif damage == 'other_model':
        torch.save({**torch.load(path, weights_only=True), 'model': {}}, path)
    else:
        path.write_text('' if damage == 'empty' else 'hello')
    before = tree(workplace)
    assert_one_line(run(main, '--out_dir=r', '--resume'), 'r/ckpt.pt', 'truncated or is no checkpoint')
    assert tree(workplace) == before


def test_a_token_outside_the_vocabulary_is_named_and_a_cut_file_is_prepared_again(run, workplace):
    run(main, *TEXT)
    path = next((workplace / 'data').glob('*/val.bin'))
    good = path.read_bytes()
    path.write_bytes(np.full(len(good) // 2, 300, np.uint16).tobytes())
    assert_one_line(run(main, *TEXT, '--overwrite'), 'token 300', 'vocab_size 256', 'delete the folder')
    path.write_bytes(good[:-3])
    assert run(main, *TEXT, '--overwrite')[0] == 0 and path.read_bytes() == good


@pytest.mark.parametrize('flags', [['--eval_interval=1'], ['--eval_interval=100']], ids=' '.join)
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(run, workplace, flags):
    """Weights of 1e25 after one step: their squares are infinite, so is the next loss."""
    run(main, *TEXT, '--out_dir=r', '--max_iters=3')
    before = (workplace / 'r' / 'ckpt.pt').read_bytes()
    result = run(main, '--out_dir=r', '--resume', '--max_iters=30', '--learning_rate=1e25', *flags)
    assert_one_line(result, 'not finite at iteration 4', 'r/ckpt.pt is the last good checkpoint', '--learning_rate')
    assert (workplace / 'r' / 'ckpt.pt').read_bytes() == before
    assert 'Infinity' not in (workplace / 'r' / 'log.jsonl').read_text()


def test_a_full_disk_keeps_the_old_checkpoint(run, workplace):
    run(main, *TEXT, '--out_dir=r', '--max_iters=3')
    before = (workplace / 'r' / 'ckpt.pt').read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        result = run(main, '--out_dir=r', '--resume', '--max_iters=6')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_one_line(result, 'could not save r/ckpt.pt', 'the old one stays')
    assert len(log(workplace / 'r')) > 3
    assert (workplace / 'r' / 'ckpt.pt').read_bytes() == before and not (workplace / 'r' / 'ckpt.tmp').exists()


def test_a_kill_during_save_keeps_the_old_checkpoint(clone):
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
    assert process.returncode == -signal.SIGKILL
    assert torch.load(clone.folder / 'r' / 'ckpt.pt', weights_only=True)['iter'] == 3
    process = clone('train.py', '--out_dir=r', '--resume')
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert torch.load(clone.folder / 'r' / 'ckpt.pt', weights_only=True)['iter'] == 6


@pytest.mark.parametrize('signum, reader', [(signal.SIGINT, 'stays'), (signal.SIGTERM, 'stays'), (signal.SIGINT, 'leaves')])
def test_ctrl_c_and_sigterm_save_a_checkpoint_and_say_so(clone, signum, reader):
    process = clone('train.py', *TEXT, '--max_iters=1000000', '--eval_interval=1000000', '--out_dir=r')
    for line in process.stdout:
        if line.startswith('iter'):
            break
    if reader == 'leaves':  # python train.py | tee log: the same Ctrl-C ends tee
        process.stdout.close()
        process.send_signal(signum)
        assert process.wait(120) == 128 + signum and process.stderr.read() == ''
    else:
        process.send_signal(signum)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 128 + signum and err == ''
    iteration = torch.load(clone.folder / 'r' / 'ckpt.pt', weights_only=True)['iter']
    assert reader == 'leaves' or f'stopped at iteration {iteration};' in out
    assert log(clone.folder / 'r')[-1]['iter'] == iteration


def test_ctrl_c_while_dynamo_traces_saves_a_checkpoint(run, workplace, monkeypatch):
    """Tensors made by the handler itself would be fake there."""
    def interrupt(cfg, it):
        with FakeTensorMode():
            os.kill(os.getpid(), signal.SIGINT)
        return 1e-3
    monkeypatch.setattr(train, 'learning_rate', interrupt)
    code, out, err = run(main, *TEXT, '--out_dir=r')
    assert code == 130 and 'stopped at iteration 1' in out and err == ''
    assert torch.load(workplace / 'r' / 'ckpt.pt', weights_only=True)['iter'] == 1


# Several processes


def test_two_processes_train_as_one_on_the_joint_batch_and_stop_together(clone, monkeypatch):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py', *TEXT]
    process = clone(*torchrun, '--out_dir=two', '--gradient_accumulation_steps=2')
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count('iter      6/6') == 1 and 'cpu x 2' in out  # rank 0 alone prints and writes

    monkeypatch.chdir(clone.folder)
    cfg = torch.load('two/ckpt.pt', weights_only=True)['config']
    cfg = TrainConfig(**cfg)
    tokens = np.memmap(next((clone.folder / 'data').glob('*_256/train.bin')), np.uint16, 'r')
    torch.manual_seed(cfg.seed)
    model = LoopedGPT(cfg)
    optimizer = train.configure_optimizer(model, cfg, torch.device('cpu'))
    for it in range(cfg.max_iters):
        batches = [train_batch(tokens, cfg, rank, it, torch.device('cpu')) for rank in (0, 1)]
        assert not torch.equal(batches[0][0], batches[1][0])
        idx, targets = (torch.cat(x) for x in zip(*batches))
        states = model.states(idx)
        loss = sum(F.cross_entropy(model.readout(h).flatten(0, 1), targets.flatten()) for h in states) / len(states)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(cfg, it)
        optimizer.step()
    for name, got in weights(clone.folder / 'two').items():
        torch.testing.assert_close(got, model.state_dict()[name], atol=2e-5, rtol=1e-3)

    process = clone(*torchrun, '--out_dir=stopped', '--max_iters=1000000', '--eval_interval=1000000')
    for line in process.stdout:
        if line.startswith('iter'):
            break
    start = time.time()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and 'stopped at iteration' in out and time.time() - start < 60
    assert torch.load(clone.folder / 'stopped' / 'ckpt.pt', weights_only=True)['iter'] > 0


# Precision and the GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('flags', [['--dtype=bfloat16'], ['--dtype=float16'], ['--compile=False'], ['--checkpoint_loops']])
def test_on_a_gpu_every_precision_trains(run, workplace, flags):
    code, out, err = run(main, *TEXT, '--device=cuda', '--max_iters=30', '--learning_rate=1e-2', *flags)
    assert code == 0 and 'cuda' in out
    first, *_, last = [x for x in log(workplace / 'out' / 'text-rms-residual-per_loop-k3-lr0.01') if 'bpb' in x]
    assert last['bpb'] < first['bpb'] - 0.5
