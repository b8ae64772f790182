"""
Kills one run 60 times with SIGKILL at random moments and resumes it each time. Does it end with the same bits
as a run that nobody touched? Not a test, as it takes two minutes. Linux and macOS.

    python tests/soak.py            (python tests/soak.py 7: other moments)
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch._dynamo  # noqa: E402 - or every child would, for seconds

import train  # noqa: E402
from conftest import TEXT, TINY  # noqa: E402
from data import prepare  # noqa: E402

FLAGS = ['--dataset=text.txt', *TINY, '--dropout=0.1', '--eval_interval=2', '--max_iters=1000000']


def start(*flags) -> int:
    """The id of a new process that trains."""
    if pid := os.fork():
        return pid
    sys.stdout, code = open(os.devnull, 'w'), 1
    try:
        train.main([*FLAGS, *flags])
        code = 0
    except SystemExit as e:
        print(e.code, file=sys.stderr)
    finally:
        os._exit(code)


def wait(pid: int):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f'a run ended by itself with exit code {code}'


def lines(folder: Path) -> list:
    """What was logged, without what may differ: the flags, the changes, the time."""
    log = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()[1:]]
    steps = [line for line in log if 'changed' not in line]
    return [{key: value for key, value in line.items() if key != 'ms'} for line in steps]


def main(seed: int):
    rng, run, torn = random.Random(seed), Path('killed'), 0
    for kills in range(1, 61):
        pid = start('--out_dir=killed', '--resume' if (run / 'ckpt.pt').exists() else '--overwrite')
        time.sleep(rng.uniform(0, 2))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        torn += any(run.glob('*.tmp'))
        if kills % 10 == 0:
            it = torch.load(run / 'ckpt.pt')['iter'] if (run / 'ckpt.pt').exists() else 0
            print(f'{kills} kills, {torn} left a file half written; saved iteration {it}', flush=True)
    end = f'--max_iters={it + 10}'
    wait(start('--out_dir=killed', '--resume', end))
    wait(start('--out_dir=whole', end))
    a, b = (torch.load(Path(name, 'ckpt.pt'), weights_only=True) for name in ('killed', 'whole'))
    torch.testing.assert_close(a['model'], b['model'], rtol=0, atol=0)
    torch.testing.assert_close(a['optimizer']['state'], b['optimizer']['state'], rtol=0, atol=0)
    assert a['iter'] == b['iter'] and lines(run) == lines(Path('whole')), 'the logs differ'
    print(f'the same weights, moments and log after {a["iter"]} iterations')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare.DATA = Path(folder, 'data')
        prepare.DATA.mkdir()
        Path('text.txt').write_text(TEXT)
        prepare.prepare('text.txt', 256)
        main(int(sys.argv[1]) if sys.argv[1:] else 1)
