"""sample.py through its command line, from a run trained here."""

import os

import pytest
import tiktoken
import torch

import sample
import train
from conftest import TINY
from looped import LoopedGPT


@pytest.fixture
def trained(run, workplace):
    code, _, _ = run(train.main, '--dataset=text.txt', *TINY, '--loops=4', '--out_dir=r', '--max_iters=40')
    assert code == 0
    return lambda *flags: run(sample.main, 'r', '--device=cpu', '--max_new_tokens=30', *flags)


def test_one_line_samples_at_a_depth(trained):
    code, out, _ = trained('--prompt=line 7', '--loops=2', '--num_samples=3')
    assert code == 0 and out.count('line 7') >= 3 and out.count('--- 2 loops') == 3
    for part in 'state norm', 'seed 1', 'seed 2', 'seed 3':
        assert part in out


def test_every_depth_shows_1_2_4_K_and_2K_one_under_the_other(trained):
    _, out, _ = trained('--prompt=line', '--every_depth', '--temperature=1')
    assert [x.split()[1] for x in out.splitlines() if x.startswith('--- ')] == ['1', '2', '4', '8']
    texts = out.split('--- ')
    assert len(set(t.split('\n\n')[-1] for t in texts[:-1])) > 1  # depth makes a difference
    assert 'each depth from seed 1' in out


def test_every_depth_begins_with_the_five_likeliest_next_tokens_of_each_depth(trained, workplace):
    _, out, _ = trained('--prompt=line 7', '--every_depth')
    rows = [x.split(' loops ') for x in out.splitlines() if ' loops ' in x and '---' not in x]
    assert [int(depth) for depth, _ in rows] == [1, 2, 4, 8]
    model, _, _ = train.load_checkpoint(workplace / 'r' / 'ckpt.pt')
    p = model(torch.tensor([list(b'line 7')]), loops=2).logits[0, -1].softmax(-1)
    shown = [float(x) for x in rows[1][1].split() if x.startswith('0.')]
    assert shown == pytest.approx(p.topk(5).values.tolist(), abs=6e-4)


def test_the_same_seed_gives_the_same_standard_output(trained):
    assert trained('--seed=3', '--every_depth')[1] == trained('--seed=3', '--every_depth')[1]


def test_endoftext_in_a_prompt_is_text(trained, monkeypatch):
    """With a tokenizer that has the token, as the BPE does; its id is one that no text contains."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding('bytes', pat_str='(?s:.)', mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': 256})
    monkeypatch.setattr(sample, 'get_tokenizer', lambda vocab_size: encoding)
    code, out, err = trained('--prompt=<|endoftext|>')
    assert code == 0 and out.startswith('<|endoftext|>'), err


def test_the_same_seed_gives_the_same_text(trained):
    def text(*flags):
        return trained(*flags)[1].split('\n--- ')[0]
    assert text('--seed=3') == text('--seed=3') != text('--seed=4')
    assert text('--temperature=0', '--seed=3') == text('--temperature=0', '--seed=4') == text('--top_k=1')


def test_the_prompt_may_be_a_file(trained, workplace):
    (workplace / 'p.txt').write_bytes('wörld \xff'.encode() + b'\xff')
    assert trained('--prompt=FILE:p.txt')[1].startswith('wörld ÿ\N{REPLACEMENT CHARACTER}')


def test_bytes_that_are_no_utf8_show_as_replacement_characters(trained, monkeypatch):
    ids = list('ä'.encode()) + [0xFF] + list('b'.encode()) + [0xE2]
    monkeypatch.setattr(LoopedGPT, 'generate', lambda self, idx, *_: torch.cat((idx, torch.tensor([ids])), dim=1))
    _, out, _ = trained('--prompt=>')
    assert out.startswith('>ä\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}\n---')


def test_the_weights_alone_are_enough(trained, run, workplace):
    """People share a checkpoint without its optimizer."""
    state = torch.load(workplace / 'r' / 'ckpt.pt', weights_only=True)
    before = trained('--temperature=0')[1]
    del state['optimizer'], state['corpus']
    torch.save(state, workplace / 'shared.pt')
    code, out, _ = run(sample.main, 'shared.pt', '--device=cpu', '--max_new_tokens=30', '--temperature=0')
    assert code == 0 and out == before


@pytest.mark.skipif(os.name != 'posix', reason='pipes as POSIX has them')
def test_a_reader_that_leaves_early_leaves_no_traceback(clone, trained, workplace):
    """python sample.py r | head -1"""
    process = clone('sample.py', 'r', '--device=cpu', '--max_new_tokens=10', '--prompt=line\n', '--num_samples=9999')
    assert process.stdout.readline() == 'line\n'
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == ''


def test_a_long_prompt_and_a_long_sample_go_past_the_window(trained):
    code, out, err = trained('--prompt=' + 'line 1: ' * 10, '--max_new_tokens=50')
    assert code == 0 and len(out.split('\n--- ')[0].encode()) >= 80 + 25


@pytest.mark.parametrize('flags, says', [
    (['nowhere'], 'no checkpoint nowhere/ckpt.pt'), (['r', '--prompt='], 'prompt is empty'),
    (['r', '--prompt=FILE:nowhere.txt'], 'nowhere.txt'), (['r', '--device=toaster'], 'toaster')])
def test_mistakes_end_in_one_line(trained, run, flags, says):
    code, _, err = run(sample.main, *flags)
    assert code == 1 and err.count('\n') == 1 and says in err
    code, _, err = run(sample.main, 'r', '--tempreature=1')
    assert code == 2 and err.count('\n') == 1 and '--tempreature=1 (see --help)' in err
    for flag in '--temperature=-1', '--temperature=1e300', f'--seed={2 ** 64}', f'--loops={10 ** 9}':
        assert run(sample.main, 'r', flag)[0] == 2
    code, _, err = run(sample.main)
    assert code == 2 and 'required: run' in err
