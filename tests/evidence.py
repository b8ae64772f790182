"""
Run assets/evidence.md as it stands: train what its blocks train, and put what they print into the page.

    python tests/evidence.py --jobs=2                (everything: hours)
    python tests/evidence.py --section=scale         (the sections with this word in their heading)

A block of the page is bash. First its trainings (`python train.py ...`) run, several at a time: one that has
finished is skipped, one that was stopped goes on. Then the rest of the block runs, and what it
prints replaces what stands between the marks below the block. Columns with `paper` in their heading stay; a row
is known by its first cell. The cells that moved by more than the spread they had are listed at the end.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train import TrainConfig, parse_flags, run_folder  # noqa: E402

PRINTED, END = '<!-- printed -->\n', '<!-- end -->\n'
BLOCK = re.compile(rf'```sh\n(.*?)```\n(?:\n{PRINTED}(.*?){END})?', re.DOTALL)
TABLE = re.compile(r'(?:^\|.*\n)+', re.MULTILINE)

# In place of the command `python`. One notes the trainings and does nothing else, one does all else.
NOTE = r'python() { if [ "$1" = train.py ]; then printf "%s\037" "$@" >> "$LIST"; echo >> "$LIST"; fi; }'
REST = r'python() { if [ "$1" != train.py ]; then "$PYTHON" "$@"; fi; }'
ENV = {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'}


def bash(python: str, block: str, **variables) -> str:
    """What `block` prints. CalledProcessError: a command of it failed."""
    command = ['bash', '-e', '-c', f'{python}\n{block}']
    return subprocess.run(command, env=ENV | variables, check=True, stdout=subprocess.PIPE, text=True).stdout


def trainings(block: str) -> list[tuple]:
    """The trainings of a block, each as the words that follow `python`."""
    Path('out').mkdir(exist_ok=True)  # where blocks write
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'list')
        path.touch()
        bash(NOTE, block, LIST=str(path))
        return [tuple(line.split('\037')[:-1]) for line in path.read_text().splitlines()]


def train(words: tuple) -> str:
    """Do one training, or what is left of it. Gives what went wrong, or nothing."""
    flags = [w for w in words if w.startswith('--')]
    named = [w for w in flags if w.startswith('--out_dir=')]
    if named:
        folder = Path(named[0].removeprefix('--out_dir='))
    else:
        folder = run_folder(parse_flags(TrainConfig, '', flags)[0])
    if (folder / 'log.jsonl').exists():
        lines = (folder / 'log.jsonl').read_text().splitlines()
        config, last = json.loads(lines[0]), json.loads(lines[-1])
        if last['iter'] >= config['max_iters'] and 'val_losses' in last:
            return ''
        words = [w for w in words if not w.startswith(('--init_from', '--out_dir'))]
        words += ['--resume', f'--out_dir={folder}']
    print(f'python {" ".join(words)}\n', end='', flush=True)  # in one piece, beside other threads
    run = subprocess.run([sys.executable, *words], env=ENV, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True)
    return f'{" ".join(words)}: exit {run.returncode} {run.stderr[-500:]}' if run.returncode else ''


def cells(table: str) -> list[list[str]]:
    return [[c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]] for line in table.splitlines()]


def moved(was: str, now: str) -> bool:
    """Whether a cell, `mean ± spread` or several with ` / ` between them, moved by more than the spread it
    had; one without a spread: whether it is another."""
    before, after = was.split(' / '), now.split(' / ')
    if len(before) != len(after):
        return True
    for old, new in zip(before, after):
        if '±' in old and '±' in new:
            mean, spread = [float(x) for x in old.split('±')]
            if abs(float(new.split('±')[0]) - mean) > spread:
                return True
        elif old != new:
            return True
    return False


def merge(old: str, new: str) -> tuple[str, list[str]]:
    """`new`, with the paper's columns of the tables in `old`; and a line for every cell that moved."""
    tables, changes = TABLE.findall(old), []

    def merged(match):
        now = cells(match[0])
        before = cells(tables.pop(0)) if tables else now
        rows = {row[0]: dict(zip(before[0], row)) for row in before}
        kept = [name for name in before[0] if 'paper' in name]
        text = ''
        for row in now:
            was = rows.get(row[0], {})
            for name, cell in zip(now[0], row):
                if moved(was.get(name, cell), cell):
                    changes.append(f'{row[0]}, {name}: {was[name]} -> {cell}')
            text += f'| {" | ".join(row + [was.get(name, "") for name in kept])} |\n'
        return text

    return TABLE.sub(merged, new), changes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--jobs', type=int, default=1, help='trainings at a time, of one thread each')
    parser.add_argument('--section', default='', help='only sections with this in their heading')
    parser.add_argument('--page', type=Path, default=ROOT / 'assets' / 'evidence.md')
    args = parser.parse_args(argv)
    sections = re.split(r'(?m)^(?=## )', args.page.read_text())
    chosen = [s for s in sections if args.section.lower() in s.splitlines()[0].lower()]

    todo = [words for s in chosen for block, _ in BLOCK.findall(s) for words in trainings(block)]
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            failures = [error for error in pool.map(train, dict.fromkeys(todo)) if error]
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        sys.exit('\n'.join(failures))

    for section in chosen:
        for block, old in BLOCK.findall(section):
            printed = bash(REST, block)
            if printed:
                new, changes = merge(old, printed)
                marked = f'```sh\n{block}```\n\n{PRINTED}'
                page = args.page.read_text()  # as it is now
                args.page.write_text(page.replace(f'{marked}{old}{END}', f'{marked}{new}{END}'))
                print(*changes, sep='\n')


if __name__ == '__main__':
    main()
