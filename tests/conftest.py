"""Fixtures: a corpus of our own in a temporary folder, and the command line with what it prints."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny, and threads wait for each other on a busy machine
REPO = Path(__file__).resolve().parent.parent
TEXT = ''.join(f'line {i}: the square of {i} is {i * i}.\n' for i in range(2000))
TINY = ['--n_layer=1', '--n_embd=16', '--n_head=2', '--block_size=16', '--batch_size=4', '--loops=3',
        '--eval_iters=2', '--max_iters=6', '--eval_interval=3', '--log_interval=1', '--warmup_iters=2',
        '--device=cpu']


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder with a text in it; corpora are prepared there, and not in the repository."""
    from data import prepare
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, 'DATA', tmp_path / 'data')
    (tmp_path / 'data').mkdir(exist_ok=True)
    (tmp_path / 'text.txt').write_text(TEXT)
    return tmp_path


@pytest.fixture
def run(workplace, capsys):
    """run(main, flags…) -> (exit code, stdout, stderr), in this process."""
    def call(main, *argv):
        code = 0
        try:
            main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code or 0
            if isinstance(code, str):  # as the interpreter does
                print(code, file=sys.stderr)
                code = 1
        out, err = capsys.readouterr()
        return code, out, err
    return call


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository's own files, for runs in processes of their own."""
    for name in 'looped.py', 'train.py', 'sample.py', 'plot_norms.py', 'data/prepare.py':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    (tmp_path / 'text.txt').write_text(TEXT)
    started = []

    def start(*argv, env=(), **options):
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1', **dict(env))
        process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=tmp_path, env=env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        started.append(process)
        return process
    start.folder = tmp_path
    yield start
    for process in started:  # of a test that failed
        process.kill()
