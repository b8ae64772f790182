"""
What the lesson asks a class to type works: the commands, scripts and diffs of README.md and of
assets/exercises.md.

Each test works in a copy of the repository. Runs are cut to a few updates on a small text; their folders keep
the names that the lesson gives them.
"""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import plot_norms  # noqa: F401, with what it imports: a copy takes the place of these, and they come back
import sample  # noqa: F401
from conftest import REPO, TEXT

FILES = ('looped.py', 'train.py', 'sample.py', 'plot_norms.py', 'data/prepare.py', 'tests/test_blind_spot.py')
MODULES = 'looped', 'train', 'sample', 'plot_norms', 'data', 'data.prepare'
FAST = ('--eval_iters=2 --eval_interval=1000 --log_interval=1 --batch_size=2 --device=cpu '
        '--compile=False').split()
SMALL = '--dataset=text.txt --vocab_size=256 --block_size=16 --n_layer=1 --n_head=2 --n_embd=16'.split()
NOT_OURS = 'pip', 'git', 'cd', 'source', '.'  # commands that change this machine or need a network

# Changed lines at most, by a word of the title; a replaced line counts once
LIMITS = {'A readout of': 3, 'A norm after': 4, 'number of loops': 5, 'gate': 10, 'float16': 30, 'Muon': 24,
          'weights that grow': 1, 'stop-gradient': 1, 'index': 4, 'softcap': 2, 'scale': 4, 'RoPE': 15,
          'prelude': 15}

FENCE = re.M | re.S
pytestmark = pytest.mark.skipif(not shutil.which('git'), reason='needs git')


def lesson(name: str) -> str:
    return (REPO / name).read_text(encoding='utf-8')


def blocks(text: str, *languages) -> list[tuple[str, str]]:
    """(language, text) of each fenced block, also of one inside a list, in order."""
    found = re.findall(r'^( *)```(\w+)\n(.*?)^\1```', text, FENCE)
    return [(language, re.sub(f'^{indent}', '', body, flags=re.M)) for indent, language, body in found
            if language in languages]


SECTIONS = re.split(r'^## ', lesson('assets/exercises.md'), flags=re.M)
FORKS = {s.split('\n')[0]: s for s in SECTIONS if blocks(s, 'diff')}  # title: text
fork = pytest.mark.parametrize('title', FORKS)


def diffs(title: str) -> str:
    return ''.join(text for _, text in blocks(FORKS[title], 'diff'))


def commands(script: str) -> list[list[str]]:
    """The words of each command of a script: one command per line, as every shell understands it."""
    lines = script.replace('\\\n', ' ').replace('&&', '\n').splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def typed_flags(title: str) -> list[str]:
    """The flags of a section's first training command, but for its length."""
    for _, script in blocks(FORKS[title], 'sh'):
        for words in commands(script):
            if words[:2] == ['python', 'train.py']:
                return [word for word in words[2:] if not word.startswith('--max_iters')]
    return []


def needs_muon(title: str):
    if 'torch.optim.Muon' in diffs(title) and not hasattr(torch.optim, 'Muon'):
        pytest.skip('torch.optim.Muon is new in torch 2.9')


class Copy:
    """The repository's files in `folder`, changed by a diff, as modules of this process; what runs them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, diff: str = ''):
        self.folder = folder
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(REPO / name, folder / name)
        (folder / 'assets').mkdir()
        (folder / 'text.txt').write_text(TEXT)
        if diff:
            apply(diff, folder)
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(sys, 'argv', sys.argv)
        patch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'def ')))
        patch.setattr(Figure, 'tight_layout', lambda *args, **options: None)  # a third of the time
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        self.train, self.plot_norms, self.sample, self.prepare = map(
            importlib.import_module, ('train', 'plot_norms', 'sample', 'data.prepare'))
        self.prepare.DOWNLOADS = {}  # every corpus is the text
        self.prepare.local_files = lambda dataset: [folder / 'text.txt']

    def call(self, function, *args) -> str:
        """stdout of function(args), which must neither fail nor leave a run out."""
        out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True) for _ in range(2))
        failed = None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                function(*args)
            except SystemExit as e:
                failed = e.code
        out, err = (f.buffer.getvalue().decode() for f in (out, err))
        assert not failed and 'left out' not in err, f'{args}: {failed} {out}{err}'
        return out

    def shortened(self, flags: list[str]) -> list[str]:
        """Flags of a training command, and those that cut it short without another name for its folder."""
        cfg, _ = self.train.parse_flags(self.train.TrainConfig, '', flags)
        large = cfg.n_embd > 64 or cfg.vocab_size > 256 or cfg.dataset == 'wikitext103'
        folder = [] if cfg.resume else [f'--out_dir={self.train.run_folder(cfg)}']
        return [*flags, *FAST, *(SMALL if large else []), *folder, f'--max_iters={6 if cfg.resume else 4}']

    def run(self, words: list[str]) -> str:
        """One command, in this process. torchrun and the tests of the repository do not run."""
        python, program, *args = [*words, '']
        args = [str(p) for a in args[:-1] for p in (sorted(Path().glob(a)) if '*' in a else [a])]
        if python in NOT_OURS or python.endswith('activate') or words[1:3] == ['-m', 'venv']:
            return ''
        if python == 'torchrun':
            self.shortened(words[words.index('train.py') + 1:])
            return ''
        assert python == 'python', f'{words}: not a command that every shell knows'
        if program == 'train.py':
            return self.call(self.train.main, self.shortened(args))
        if program == 'plot_norms.py':
            return self.call(self.plot_norms.main, [*args, '--eval_iters=2'])
        if program == 'sample.py':
            return self.call(self.sample.main, [*args, '--max_new_tokens=8'])
        if program == 'data/prepare.py':
            return self.call(self.prepare.prepare, args[0], 256)
        if program == '-m' and '-k' in args:
            done = subprocess.run([sys.executable, *words[1:]], text=True, capture_output=True)
            assert done.returncode == 0, done.stdout
            return done.stdout
        if program == '-m' or program.startswith('tests/'):
            assert all((REPO / name).exists() for name in words[1:] if name.startswith('tests/'))
            return ''
        sys.argv = [program, *args]
        return self.call(runpy.run_path, program, None, '__main__')

    def follow(self, text: str) -> str:
        """What the commands and the Python of a part of the lesson print, in its order. Python that the words
        above it tell to save as a file is saved, and must be run by a command further down."""
        printed, namespace, saved = '', {}, set()
        for fence in re.finditer(r'^( *)```(sh|python)\n(.*?)^\1```', text, FENCE):
            indent, language, body = fence.groups()
            body = re.sub(f'^{indent}', '', body, flags=re.M)
            above = ' '.join(text[:fence.start()].split()[-20:])
            name = re.search(r'[Ss]ave (?:this|it) as `?(\w+\.py)', above)
            if name and language == 'python':
                Path(name[1]).write_text(body, encoding='utf-8')
                saved.add(name[1])
            elif language == 'python':
                printed += self.call(exec, compile(body, 'the lesson', 'exec'), namespace)
            for words in commands(body) if language == 'sh' else []:
                saved -= {*words}
                printed += self.run(words)
        assert not saved, f'{saved}: never run'
        return printed


def apply(diff: str, folder: Path):
    """git apply, as the lesson says it, in a folder that is no repository."""
    env = dict(os.environ, GIT_CEILING_DIRECTORIES=str(folder.parent))
    subprocess.run(['git', 'apply', '-'], cwd=folder, input=diff, text=True, check=True, env=env)


def reworded(source: str) -> str:
    """Python with other words in its comments, docstrings, messages and help, on the same lines."""
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        prose = token.type == tokenize.COMMENT or token.type == tokenize.STRING and ' ' in token.string
        (first, start), (last, end) = token.start, token.end
        for i in range(first - 1, last) if prose else []:
            a, b = start if i == first - 1 else 0, end if i == last - 1 else len(lines[i])
            lines[i] = lines[i][:a] + re.sub('[A-Za-z]', 'x', lines[i][a:b]) + lines[i][b:]
    return ''.join(lines)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The folder of runs that assets/exercises.md trains before its first exercise, with this code."""
    with pytest.MonkeyPatch.context() as patch:
        here = Copy(tmp_path_factory.mktemp('runs'), patch)
        here.follow(SECTIONS[0])
    return here.folder / 'out'


def test_every_command_of_the_readme_runs_in_order(tmp_path, monkeypatch):
    Copy(tmp_path, monkeypatch).follow(lesson('README.md'))


def test_a_diff_in_the_readme_is_one_of_the_exercises():
    readme, exercises = (blocks(lesson(name).replace('\n \n', '\n\n'), 'diff')
                         for name in ('README.md', 'assets/exercises.md'))
    assert readme and all(diff in exercises for diff in readme)


@fork
def test_a_fork_changes_few_lines(title):
    limit = next(limit for word, limit in LIMITS.items() if word in title)
    changed = 0
    for hunk in re.split(r'^(?:@@|--- ).*', diffs(title), flags=re.M):
        lines = [line for line in hunk.splitlines() if not line.startswith('+++')]
        assert all(len(line) <= 111 for line in lines)
        changed += max(sum(line.startswith(sign) for line in lines) for sign in '+-')
    assert 0 < changed <= limit


@fork
def test_a_fork_outlives_reworded_comments_and_messages(tmp_path, title):
    """So no hunk leans on prose. That the tables are found by their rows is left to the tests below."""
    files, after = ('looped.py', 'train.py'), []
    for name, change in ('as_it_is', str), ('reworded', reworded):
        folder = tmp_path / name
        folder.mkdir()
        for file in files:
            (folder / file).write_text(change(lesson(file)), encoding='utf-8')
        apply(diffs(title), folder)
        after.append([reworded((folder / file).read_text(encoding='utf-8')) for file in files])
    assert after[0] == after[1]


@fork
def test_a_fork_trains_resumes_bit_for_bit_plots_every_panel_and_samples(tmp_path, monkeypatch, title):
    needs_muon(title)
    here = Copy(tmp_path, monkeypatch, diffs(title))
    typed = typed_flags(title)
    here.call(here.train.main, [*FAST, *SMALL, *typed, '--max_iters=4', '--out_dir=whole'])
    here.call(here.train.main, [*FAST, *SMALL, *typed, '--max_iters=2', '--out_dir=halves'])
    here.call(here.train.main, ['--resume', '--max_iters=4', '--out_dir=halves'])
    whole, halves = (torch.load(f'{run}/ckpt.pt', weights_only=True)['model'] for run in ('whole', 'halves'))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    if typed:  # the first flag is the fork's own, and it acts
        here.call(here.train.main, [*FAST, *SMALL, *typed[1:], '--max_iters=4', '--out_dir=off'])
        on, off = (json.loads(Path(run, 'log.jsonl').read_text().splitlines()[-1])['val_losses']
                   for run in ('whole', 'off'))
        assert max(abs(a - b) for a, b in zip(on, off)) > 1e-3
    table = here.call(here.plot_norms.main, ['whole', '--panels=all', '--eval_iters=2', '--out=all.png'])
    here.call(here.sample.main, ['whole', '--every_depth', '--max_new_tokens=4'])

    _, given = here.train.parse_flags(here.train.TrainConfig, '', typed)
    folder = here.train.run_folder(here.train.TrainConfig(**given)).name
    for name, value in given.items():  # a flag or a row of the fork's own is known to all by itself
        said = f'{value}' if isinstance(value, str) else name
        assert said in here.call(here.train.main, ['--help'])
        assert said in folder and said in table


@fork
def test_with_a_fork_generation_with_a_cache_is_generation_without(tmp_path, monkeypatch, title):
    here = Copy(tmp_path, monkeypatch, diffs(title))
    flags = [*SMALL, '--loops=3', *typed_flags(title)]
    cfg, _ = here.train.parse_flags(here.train.TrainConfig, '', flags)
    torch.manual_seed(1)
    model = here.train.LoopedGPT(cfg).eval()
    for p in model.parameters():  # where a fork begins as nothing, a mistake would not show
        torch.nn.init.normal_(p, std=0.5)
    idx = torch.randint(256, (2, cfg.block_size))
    with torch.no_grad():
        for loops in 2, 3, 5:
            cache = {}
            for i in range(cfg.block_size):
                logits = model.readout(model.states(idx[:, i:i + 1], loops, cache)[-1][:, -1])
                torch.testing.assert_close(logits, model(idx[:, :i + 1], loops=loops).logits[:, -1],
                                           atol=1e-3, rtol=1e-3)
        text = idx[:, :3]
        for _ in range(cfg.block_size + 4):  # to the end of the context, and on
            logits = model(text[:, -cfg.block_size:]).logits[:, -1]
            text = torch.cat((text, logits.argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(model.generate(idx[:, :3], cfg.block_size + 4, temperature=0), text)


@fork
def test_the_commands_of_an_exercise_run_beside_runs_from_before_it(tmp_path, monkeypatch, runs, title):
    needs_muon(title)
    here = Copy(tmp_path, monkeypatch, diffs(title))
    here.plot_norms.draw = lambda *args: None
    shutil.copytree(runs, 'out')
    printed = here.follow(FORKS[title])
    if 'A readout of' in title:
        assert re.findall(r'(\w+), exit 4: (\w+) the length', printed) == [
            ('l1', 'hides'), ('tanh', 'sees'), ('log', 'sees')]


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    if not shutil.which('bash'):
        pytest.skip('needs bash')
    monkeypatch.syspath_prepend(REPO / 'tests')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, 'evidence', raising=False)
    return importlib.import_module('evidence')


def test_every_training_of_the_evidence_is_a_command_that_train_py_takes(evidence):
    found = evidence.BLOCK.findall(lesson('assets/evidence.md'))
    assert sum(marks != '' for _, marks in found) > 10
    words = [words for block, _ in found for words in evidence.trainings(block)]
    programs = list(Path('.').glob('*.py'))  # that the blocks have written here
    for program in programs:
        ast.parse(program.read_text(), str(program))
    assert len(programs) >= 4
    assert len(words) == len(set(words)) > 100, 'a run stands twice'
    for program, *flags in words:
        assert program == 'train.py'
        evidence.parse_flags(evidence.TrainConfig, '', flags)


def test_the_evidence_names_a_cell_that_moved_by_more_than_its_spread(evidence):
    for was, now, moved in [('1843.3 ± 112.2', '1750.0 ± 80.0', False), ('1843.3 ± 112.2', '1720.0 ± 80.0', True),
                            ('+5.2e-02 ± 4.2e-02', '-1.0e-03 ± 4e-02', True), ('7', '7', False), ('7', '8', True),
                            ('1.0 ± 0.1 / 2.0 ± 0.1', '1.1 ± 0.1 / 2.2 ± 0.1', True),
                            ('1.0 ± 0.1 / 2.0 ± 0.1', '1.0 ± 0.1', True)]:
        assert evidence.moved(was, now) == moved, (was, now)
    table = '| run | norm | of the paper |\n|---|---|---|\n| rms | {} | 8 |\n'
    assert evidence.merge(table.format('9.0 ± 1.0'), table.format('9.5 ± 1.0'))[1] == []
    assert evidence.merge(table.format('9.0 ± 1.0'), table.format('7.5 ± 1.0'))[1] == [
        'rms, norm: 9.0 ± 1.0 -> 7.5 ± 1.0']


def test_the_evidence_trains_what_is_missing_and_prints_into_the_page(tmp_path, evidence):
    for name in FILES:
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, name)
    Path('text.txt').write_text(TEXT)
    flags = ' '.join([*SMALL, *FAST])
    Path('page.md').write_text(f"""# Page

## 1. A heading

```sh
for seed in 1 2; do
  python train.py {flags} --max_iters=2 --seed=$seed --out_dir=out/s$seed
done
cat > show.py <<'END'
import json
for seed in 1, 2:
    print(f'| s{{seed}} |', json.loads(list(open(f'out/s{{seed}}/log.jsonl'))[-1])['iter'], '|')
END
python -c "print('| run | iterations |\\n|---|---|')"
python show.py
```

<!-- printed -->
| run | iterations | an old column | the paper's |
|---|---|---|---|
| s2 | 7 | 6 | 8 |
<!-- end -->

## 2. Another

```sh
python train.py --readout=nonsense
```
""")
    here = [sys.executable, str(REPO / 'tests/evidence.py'), '--page=page.md', '--section=heading', '--jobs=2']
    first, second = (subprocess.run(here, text=True, capture_output=True, check=True) for _ in range(2))
    assert first.stdout.count('python train.py') == 2 and 's2, iterations: 7 -> 2' in first.stdout
    assert not second.stdout.strip(), 'what has finished is not trained again'
    table = ['| run | iterations | the paper\'s |', '| --- | --- | --- |', '| s1 | 2 |  |', '| s2 | 2 | 8 |']
    assert '\n'.join(['<!-- printed -->', *table, '<!-- end -->']) in Path('page.md').read_text()
    failed = subprocess.run([*here[:-2], '--section=another'], text=True, capture_output=True)
    assert failed.returncode and 'nonsense' in failed.stderr
