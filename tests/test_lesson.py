"""
What the lesson asks a class to type works: the commands and diffs of README.md and of assets/exercises.md.

Each test works in a copy of the repository. Runs are cut to a few updates on a small text; their folders keep
the names that the lesson gives them.
"""

import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import plot_norms  # noqa: F401, with what it imports: a copy takes the place of these, and they come back
import sample  # noqa: F401
from conftest import REPO, TEXT, TINY

FILES = ('looped.py', 'train.py', 'sample.py', 'plot_norms.py', 'data/prepare.py', 'tests/test_blind_spot.py')
MODULES = 'looped', 'train', 'sample', 'plot_norms', 'data', 'data.prepare', 'test_blind_spot'
FAST = ('--eval_iters=2 --eval_interval=1000 --log_interval=1 --batch_size=2 --device=cpu '
        '--compile=False').split()
SMALL = '--dataset=text.txt --vocab_size=256 --block_size=16 --n_layer=1 --n_head=2 --n_embd=16'.split()
# Changed lines, by a word of the fork's title; else 5
LIMITS = {'gate': 12, 'Muon': 24, 'float16': 40, 'GPUs': 40}

HERE = sys.platform != 'win32' and shutil.which('git') and shutil.which('bash')
pytestmark = pytest.mark.skipif(not HERE, reason='needs git and bash')


def lesson(name: str) -> str:
    return (REPO / name).read_text(encoding='utf-8')


def blocks(text: str, *languages) -> list[tuple[str, str]]:
    """(language, text) of each fenced block, also of one inside a list, in order."""
    found = re.findall(r'^( *)```(\w+)\n(.*?)^\1```', text, re.M | re.S)
    return [(language, re.sub(f'^{indent}', '', body, flags=re.M)) for indent, language, body in found
            if language in languages]


SECTIONS = re.split(r'^## ', lesson('assets/exercises.md'), flags=re.M)
FORKS = {s.split('\n')[0]: s for s in SECTIONS if blocks(s, 'diff')}  # title: text
fork = pytest.mark.parametrize('title', FORKS)


def diffs(title: str) -> str:
    return ''.join(text for _, text in blocks(FORKS[title], 'diff'))


class Copy:
    """The repository's files in `folder`, changed by a diff, as modules of this process; what runs them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, diff: str = ''):
        self.folder, self.shim = folder, folder / 'shim'
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(REPO / name, folder / name)
        (folder / 'assets').mkdir()
        (folder / 'text.txt').write_text(TEXT)
        if diff:
            subprocess.run(['git', 'apply', '-'], cwd=folder, input=diff, text=True, check=True,
                           env=dict(os.environ, GIT_CEILING_DIRECTORIES=str(folder.parent)))
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(sys, 'argv', sys.argv)
        patch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'def ')))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        self.train, self.plot_norms, self.sample, self.prepare = map(
            importlib.import_module, ('train', 'plot_norms', 'sample', 'data.prepare'))
        self.prepare.DOWNLOADS = {}  # every corpus is the text
        self.prepare.local_files = lambda dataset: [folder / 'text.txt']

    def call(self, function, *args) -> str:
        """stdout of function(args), which may leave by sys.exit, but only with 0."""
        out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True) for _ in range(2))
        code = 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                function(*args)
            except SystemExit as e:
                code = e.code or 0
        out, err = (f.buffer.getvalue().decode() for f in (out, err))
        assert code == 0, f'{args} ended with {code}: {out}{err}'
        return out

    def commands(self, script: str) -> list[dict]:
        """argv and stdin of the python and torchrun commands of a script, whose loops, variables and
        here-documents bash has expanded. What changes this machine or needs a network does nothing."""
        if not self.shim.exists():
            self.shim.mkdir()
            record = self.shim / 'record.py'
            record.write_text('import json, sys\n'
                              'argv = sys.argv[1:]\n'
                              'stdin = sys.stdin.read() if argv[1:2] in ([], ["-"]) else ""\n'
                              f'with open({str(self.shim / "log")!r}, "a") as f:\n'
                              '    print(json.dumps(dict(argv=argv, stdin=stdin)), file=f)\n')
            for name in 'python', 'python3', 'torchrun':
                words = shlex.join([sys.executable, '-S', str(record), name])
                (self.shim / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
                (self.shim / name).chmod(0o755)
        (self.shim / 'log').write_text('')
        quiet = ''.join(f'{name}() {{ :; }}; ' for name in ('pip', 'git', 'cd', 'source', 'open', 'xdg-open'))
        script = f'set -euo pipefail; PATH={shlex.quote(str(self.shim))}:$PATH; {quiet}\n{script}'
        done = subprocess.run(['bash', '-c', script], cwd=self.folder, text=True, capture_output=True)
        assert done.returncode == 0, f'{script}\n{done.stderr}'
        return [json.loads(line) for line in (self.shim / 'log').read_text().splitlines()]

    def shortened(self, flags: list[str]) -> list[str]:
        """Flags of a training command, and those that cut it short without another name for its folder."""
        cfg, _ = self.train.FlagParser(self.train.TrainConfig, '').parse(flags)
        large = cfg.n_layer > 2 or cfg.vocab_size > 256 or cfg.dataset == 'wikitext103'
        folder = [] if cfg.resume else [f'--out_dir={self.train.run_folder(cfg)}']
        return [*flags, *FAST, *(SMALL if large else []), *folder, f'--max_iters={6 if cfg.resume else 4}']

    def run(self, argv: list[str], stdin: str = ''):
        """A recorded command, in this process. torchrun and tests do not run, but what they name exists."""
        program, *args = argv[1:] or ['-']
        args = [str(p) for a in args for p in (sorted(Path().glob(a)) if '*' in a else [a])]
        if argv[0] == 'torchrun':
            self.shortened(argv[argv.index('train.py') + 1:])
        elif program == '-m' or program.startswith('tests/'):
            assert all((REPO / a.split('::')[0]).exists() for a in argv[1:] if a.startswith('tests/'))
        elif program in ('-', '-c'):
            code = compile(stdin if program == '-' else args[0], ' '.join(argv), 'exec')
            self.call(exec, code, {'__name__': '__main__'})
        elif program == 'train.py':
            self.call(self.train.main, self.shortened(args))
        elif program == 'plot_norms.py':
            self.call(self.plot_norms.main, [*args, '--eval_iters=2'])
        elif program == 'sample.py':
            self.call(self.sample.main, [*args, '--max_new_tokens=8'])
        elif program == 'data/prepare.py':
            self.call(self.prepare.prepare, args[0], 256)
        else:
            sys.argv = [program, *args]
            self.call(runpy.run_path, program, None, '__main__')


@pytest.fixture(autouse=True)
def signals():
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    signal.set_wakeup_fd(-1)
    for s, handler in handlers.items():
        signal.signal(s, handler)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The folder of runs that assets/exercises.md trains before its first exercise, with this code."""
    with pytest.MonkeyPatch.context() as patch:
        here = Copy(tmp_path_factory.mktemp('runs'), patch)
        for _, text in blocks(SECTIONS[0], 'sh'):
            for command in here.commands(text):
                here.run(**command)
    return here.folder / 'out'


def test_every_command_of_the_readme_runs_in_order(tmp_path, monkeypatch):
    here, namespace = Copy(tmp_path, monkeypatch), {}
    for language, text in blocks(lesson('README.md'), 'sh', 'python'):
        if language == 'python':
            here.call(exec, compile(text, 'README.md', 'exec'), namespace)
        else:
            for command in here.commands(text):
                here.run(**command)


def test_a_diff_in_the_readme_is_one_of_the_exercises():
    readme, exercises = (blocks(lesson(name).replace('\n \n', '\n\n'), 'diff')
                         for name in ('README.md', 'assets/exercises.md'))
    assert readme and all(diff in exercises for diff in readme)


@fork
def test_a_fork_changes_few_lines(title):
    changed = re.findall(r'^(?:\+(?!\+\+ )|-(?!-- )).*', diffs(title), re.M)
    assert len(changed) <= next((limit for word, limit in LIMITS.items() if word in title), 5)
    assert max(map(len, changed)) <= 111


@fork
def test_a_fork_trains_resumes_bit_for_bit_plots_every_panel_and_samples(tmp_path, monkeypatch, title):
    if 'torch.optim.Muon' in diffs(title) and not hasattr(torch.optim, 'Muon'):
        pytest.skip('torch.optim.Muon is new in torch 2.9')
    here = Copy(tmp_path, monkeypatch, diffs(title))
    monkeypatch.setattr(Figure, 'tight_layout', lambda *args, **options: None)  # a third of the time
    commands = [command['argv'] for _, text in blocks(FORKS[title], 'sh') for command in here.commands(text)]
    typed = next((argv[2:] for argv in commands if argv[1] == 'train.py'), [])
    typed = [flag for flag in typed if not flag.startswith('--max_iters')]

    here.call(here.train.main, [*typed, *FAST, *SMALL, '--max_iters=4', '--out_dir=whole'])
    here.call(here.train.main, [*typed, *FAST, *SMALL, '--max_iters=2', '--out_dir=halves'])
    here.call(here.train.main, ['--resume', '--max_iters=4', '--out_dir=halves'])
    whole, halves = (torch.load(f'{run}/ckpt.pt', weights_only=True)['model'] for run in ('whole', 'halves'))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    table = here.call(here.plot_norms.main, ['whole', '--panels=all', '--eval_iters=2', '--out=all.png'])
    here.call(here.sample.main, ['whole', '--every_depth', '--max_new_tokens=4'])

    cfg, given = here.train.FlagParser(here.train.TrainConfig, '').parse(typed)
    for name, value in given.items():  # a flag or a row of the fork's own is known to all by itself
        said = f'{value}' if isinstance(value, str) else name
        assert said in here.call(here.train.main, ['--help'])
        assert said in here.train.run_folder(cfg).name and said in table


@fork
def test_the_commands_of_an_exercise_run_beside_runs_from_before_it(tmp_path, monkeypatch, runs, title):
    if 'torch.optim.Muon' in diffs(title) and not hasattr(torch.optim, 'Muon'):
        pytest.skip('torch.optim.Muon is new in torch 2.9')
    here = Copy(tmp_path, monkeypatch, diffs(title))
    here.plot_norms.draw = lambda *args: None
    shutil.copytree(runs, 'out')
    for _, text in blocks(FORKS[title], 'sh'):
        for command in here.commands(text):
            here.run(**command)


def test_with_the_fork_for_several_gpus_two_processes_train_as_one_on_the_joint_batch_and_stop_together(
        tmp_path, monkeypatch):
    here = Copy(tmp_path, monkeypatch, diffs(next(title for title in FORKS if 'GPUs' in title)))
    flags = ['--dataset=text.txt', *TINY]
    here.prepare.prepare('text.txt', 256)
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')

    def start(*typed):
        torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
        return subprocess.Popen([*torchrun, 'train.py', *flags, *typed], cwd=tmp_path, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = start('--out_dir=two', '--gradient_accumulation_steps=2')
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count('iter      6/6') == 1  # rank 0 alone prints and writes

    saved, cpu = torch.load('two/ckpt.pt', weights_only=True), torch.device('cpu')
    cfg = here.train.TrainConfig(**saved['config'])
    tokens, _ = here.train.load_tokens(cfg)
    torch.manual_seed(cfg.seed)
    model = here.train.LoopedGPT(cfg)
    optimizer = here.train.configure_optimizer(model, cfg)
    for it in range(cfg.max_iters):
        batches = [here.train.train_batch(tokens['train'], cfg, it, cpu, rank) for rank in (0, 1)]
        assert not torch.equal(batches[0][0], batches[1][0])
        optimizer.zero_grad()
        model(*(torch.cat(x) for x in zip(*batches))).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group['lr'] = cfg.learning_rate * min(1, (it + 1) / cfg.warmup_iters)
        optimizer.step()
    for name, got in saved['model'].items():
        torch.testing.assert_close(got, model.state_dict()[name], atol=2e-5, rtol=1e-3)

    process = start('--out_dir=stopped', '--max_iters=1000000', '--eval_interval=1000000')
    try:
        next(line for line in process.stdout if line.startswith('iter'))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode != 0 and 'stopped at iteration' in out
        assert torch.load('stopped/ckpt.pt', weights_only=True)['iter'] > 0
    finally:
        process.kill()


def test_of_the_readouts_of_the_first_exercise_one_is_blind_one_sees_one_is_neither(tmp_path, monkeypatch):
    title = next(title for title in FORKS if 'readout' in title)
    Copy(tmp_path, monkeypatch, diffs(title))
    monkeypatch.syspath_prepend(tmp_path / 'tests')
    theory = importlib.import_module('test_blind_spot')
    assert theory.hides_the_length(theory.make(readout='l1'))
    assert not theory.hides_the_length(theory.make(readout='log'))
    theorem = theory.test_a_readout_that_hides_the_length_sends_no_gradient_along_the_state
    for readout in 'l1', 'log':
        theorem(readout, k=4)
    with pytest.raises(AssertionError):
        theorem('tanh', k=4)
