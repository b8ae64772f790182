"""data/prepare.py: tokenizers, corpora, downloads."""

import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data import prepare as data
from data.prepare import UserError, get_tokenizer, read_meta

TEXT = 'def f(x):\r\n    return "héllo, wörld" + \'日本\' * 3  # <|endoftext|>\n\n\n\tend  \n' * 40
PREPARE = "from data.prepare import prepare; prepare('text.txt', 256)"
SHAKESPEARE = Path(__file__).resolve().parents[2] / 'shared/data/tinyshakespeare/input.txt'


@functools.cache
def bpe(vocab_size):
    try:
        return get_tokenizer(vocab_size)
    except UserError:
        pytest.skip('GPT-2 BPE neither cached nor downloadable; set TIKTOKEN_CACHE_DIR')


def ids_of(folder, split):
    return np.fromfile(folder / f'{split}.bin', np.uint16)


def bytes_of(folder, split):
    return bytes(ids_of(folder, split).astype(np.uint8))


def text_of(folder):
    return (bytes_of(folder, 'train') + bytes_of(folder, 'val')).decode()


def prepare(*args):
    """The folder of a prepared corpus."""
    folder, meta = data.prepare(*args)
    assert meta == read_meta(folder)
    return folder


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def refusal(dataset, *args):
    """The message of the UserError, one line; nothing is left in data/."""
    with pytest.raises(UserError) as e:
        prepare(dataset, 256, *args)
    assert not list(data.DATA.iterdir()) and '\n' not in str(e.value)
    return str(e.value)


# Tokenizers


def test_256_tokens_are_the_bytes():
    encoding = get_tokenizer(256)
    assert encoding.encode(TEXT) == list(TEXT.encode()) and encoding.n_vocab == 256
    assert encoding.decode([0xFF, 0x41]) == '\N{REPLACEMENT CHARACTER}A'


def test_a_bpe_cut_by_rank_loses_nothing_ends_with_endoftext_and_costs_more_tokens():
    counts = []
    for vocab_size in 257, 1000, 20000, 50257:
        ids = bpe(vocab_size).encode(TEXT, disallowed_special=())
        assert bpe(vocab_size).decode(ids) == TEXT and max(ids) < vocab_size - 1
        assert bpe(vocab_size).encode('<|endoftext|>', allowed_special='all') == [vocab_size - 1]
        assert bpe(vocab_size).decode([vocab_size - 1]) == '<|endoftext|>'
        counts.append(len(ids))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    assert ids == tiktoken.get_encoding('gpt2').encode(TEXT, disallowed_special=())


@pytest.mark.parametrize('vocab_size', [0, 255, 50258])
def test_one_rule_says_which_vocabulary_sizes_there_are(vocab_size):
    with pytest.raises(UserError, match=rf'256 \(bytes\) or 257 to 50257 \(GPT-2 BPE\), got {vocab_size}'):
        get_tokenizer(vocab_size)


@pytest.mark.parametrize('error', [ConnectionError('no route'), ValueError('Hash mismatch')], ids=repr)
def test_without_network_or_cache_the_bpe_error_says_what_to_do(monkeypatch, error):
    def offline():
        raise error
    monkeypatch.setattr(data.tiktoken_ext.openai_public, 'gpt2', offline)
    with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR.*--vocab_size=256'):
        get_tokenizer(20000)


# Two splits


ODD = {'mixed': TEXT, 'CJK': '字' * 4000, 'CJK lines': '日本語。　空白\n' * 100, 'words': 'word ' * 40,
       'CRLF': 'a\r\n' * 99, 'BOM': '\ufeffa text ' * 20, 'one word': 'x' * 200, 'DNA': 'ACGTTGCA' * 250000,
       'emoji': '🙂' * 99, 'late': 'one ' + 'x' * 996, 'a character': 'é', 'two': 'ab',
       'spaces': ' ' * 1100000 + 'a' * 300000}  # tiktoken's own limit is 999,998 spaces before a word


@pytest.mark.parametrize('kind', ODD)
def test_the_last_tenth_of_a_file_is_validation_however_short_and_whatever_its_characters(workplace, kind):
    text = ODD[kind]
    write(workplace / 'one.txt', text)
    folder = prepare('one.txt', 256, 0)
    train, val = bytes_of(folder, 'train'), bytes_of(folder, 'val')
    assert train.decode() + val.decode() == text  # nothing is lost, and no character is halved
    assert len(text) < 20 or 0.1 <= len(val.decode()) / len(text) < 0.11
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['tokens'] == meta['bytes'] == dict(train=len(train), val=len(val)) and val
    assert meta['vocab_size'] == 256 and meta['dataset'] == 'one.txt'
    bpe(1000)
    assert sum(read_meta(prepare('one.txt', 1000, 0))['bytes'].values()) == len(text.encode())


def test_a_long_text_is_encoded_in_pieces_of_which_nothing_is_lost(workplace, monkeypatch):
    bpe(1000)
    monkeypatch.setattr(data, 'PIECE', 1000)
    write(workplace / 'long.txt', TEXT)
    folder = prepare('long.txt', 1000)
    ids = [*ids_of(folder, 'train'), *ids_of(folder, 'val')]
    assert bpe(1000).decode(ids) == TEXT
    assert len(ids) < 1.05 * len(bpe(1000).encode(TEXT, disallowed_special=()))


def test_of_20_files_and_more_every_20th_that_is_not_empty_is_validation(workplace):
    texts = ['' if i == 4 else f'file {i:02}\n' for i in range(45)]
    for i, text in enumerate(texts):
        write(workplace / 'many' / str(i % 2) / f'{i:02}.txt', text)
    texts = [text for text in texts[::2] + texts[1::2] if text]  # in the order of their paths
    folder = prepare('many', 256)
    assert bytes_of(folder, 'val').decode() == texts[19] + texts[39]
    del texts[39], texts[19]
    assert bytes_of(folder, 'train').decode() == ''.join(texts)


def test_the_embedded_corpus_is_the_standard_library_without_its_tests(workplace):
    files = data.local_files('python')
    assert 'argparse.py' in [p.name for p in files]
    assert not [p for p in files if {'site-packages', 'test', 'tests'} & set(p.parts)]
    folder = prepare('python', 256)
    assert folder.name == 'python_256'
    assert bytes_of(folder, 'val') == b''.join(p.read_bytes() for p in files[19::20])
    del files[19::20]
    assert bytes_of(folder, 'train') == b''.join(p.read_bytes() for p in files)


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason='no copy of tiny Shakespeare beside the repository')
def test_shakespeare_is_split_as_for_the_numbers_of_the_readme(workplace):
    shutil.copy(SHAKESPEARE, workplace / 'data' / 'shakespeare-input.txt')
    folder = prepare('shakespeare', 256)
    text = SHAKESPEARE.read_bytes()
    assert (bytes_of(folder, 'train'), bytes_of(folder, 'val')) == (text[:1003854], text[1003854:])  # as nanoGPT has it
    assert read_meta(folder)['hash'] == hashlib.sha256(text).hexdigest()


def test_too_few_tokens_are_refused(workplace):
    for least in 70000, 80000:  # train has more, val has not; neither has
        with pytest.raises(UserError, match=f'at least {least} .*smaller --block_size'):
            prepare('text.txt', 256, least)
    assert text_of(prepare('text.txt', 256)) == (workplace / 'text.txt').read_text()


# What is text


NOT_TEXT = {'koi8': 'слово '.encode('koi8-r'), 'latin-1': b'caf\xe9 ', 'utf-16': '日本'.encode('utf-16'),
            'cut': '日本'.encode()[:-1], 'train.bin': b'\0\x80'}


@pytest.mark.parametrize('kind', NOT_TEXT)
def test_a_file_that_is_not_text_is_refused_with_what_to_do(workplace, kind):
    write(workplace / 'odd.txt', b'ten letters' * 200000 + NOT_TEXT[kind])
    says = refusal('odd.txt')
    assert "no text in 'odd.txt'" in says and 'saved as UTF-8' in says


def test_of_a_folder_what_is_not_text_is_named_and_skipped(workplace, capsys):
    for i in range(3):
        write(workplace / 'corpus' / 'sub' / f'{i}.txt', f'file {i} ' * 100)
    for kind, content in NOT_TEXT.items():
        write(workplace / 'corpus' / kind, content * 100)
    folder = prepare('corpus', 256)
    assert sorted(text_of(folder)) == sorted('file 0 file 1 file 2 ' * 100)
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'skipped 5 of 8 files' in err and "such as 'cut', 'koi8', 'latin-1'" in err
    shutil.rmtree(workplace / 'corpus' / 'sub')
    shutil.rmtree(folder)
    assert "no text in 'corpus'" in refusal('corpus') and capsys.readouterr() == ('', '')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no FIFO here')
def test_what_is_no_regular_file_is_never_opened_and_links_to_folders_are_not_followed(workplace):
    write(workplace / 'linked' / 'inside.txt', 'elsewhere ' * 100)
    write(workplace / 'corpus' / 'a.txt', 'a text ' * 100)
    (workplace / 'corpus' / 'folder-link').symlink_to('../linked')
    (workplace / 'corpus' / 'loop').symlink_to('loop')
    (workplace / 'corpus' / 'file-link').symlink_to('../text.txt')
    os.mkfifo(workplace / 'corpus' / 'fifo')
    for name in 'corpus/fifo', '/dev/zero':
        assert 'no text' in refusal(name)
    text = 'a text ' * 100 + (workplace / 'text.txt').read_text()
    assert sorted(text_of(prepare('corpus', 256))) == sorted(text)


def test_a_checkout_is_the_same_corpus_after_a_run_in_it(workplace, capsys):
    write(workplace / 'src' / 'a.py', 'the source = 1\n' * 100)
    write(workplace / '.gitignore', 'out/\n')
    write(workplace / '.git' / 'config', 'hidden ' * 100)
    write(workplace / 'data' / 'own.txt', 'hidden ' * 100)
    folder = prepare('.', 256)
    text = 'out/\n' + 'the source = 1\n' * 100 + (workplace / 'text.txt').read_text()
    assert sorted(text_of(folder)) == sorted(text)
    write(workplace / 'out' / 'run' / 'log.jsonl', '{}\n')
    write(workplace / 'out' / 'run' / 'deeper' / 'samples.txt', 'a sample')
    capsys.readouterr()
    assert prepare('.', 256) == folder and capsys.readouterr() == ('', '')  # as it was, not prepared again


@pytest.mark.parametrize('name', ['', 'nowhere.txt', 'x' * 5000, 'empty', 'empty.txt'])
def test_a_name_without_text_is_no_dataset(workplace, name):
    write(workplace / 'empty.txt', '')
    write(workplace / 'empty' / 'sub' / 'empty.txt', '')
    says = refusal(name)
    assert f'no text in {name!r}' in says and 'python, shakespeare, wikitext103, or a file' in says


def test_folders_are_named_after_the_path_and_two_paths_are_two_folders(workplace, monkeypatch):
    names = ['a/x.txt', 'b/x.txt', 'b/x.md', '-x.txt', '.x.txt', 'längs 日本.txt', 'x' * 200 + '.txt', 'a\nb']
    if sys.platform == 'linux':
        names.append(os.fsdecode(b'caf\xe9.txt'))
    for name in names:
        write(workplace / name, 'a short text ' * 10)
    folders = [prepare(f'./{name}', 256).name for name in names]
    assert len(set(folders)) == len(names) and folders[0].startswith('x-') and folders[0].endswith('_256')
    assert not [name for name in folders if name[0] in '-.' or not name.isascii() or len(name) > 80]
    monkeypatch.setenv('HOME', str(workplace))
    assert prepare('~/a/x.txt', 256).name == folders[0]


# A corpus is its content


def test_a_prepared_corpus_is_used_again_and_an_edited_one_is_prepared_again(workplace, capsys, monkeypatch):
    folder = prepare('text.txt', 256)
    before = read_meta(folder)
    capsys.readouterr()
    os.utime(workplace / 'text.txt', (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(data, 'get_tokenizer', None)  # which may need a network
        assert prepare('text.txt', 256) == folder and capsys.readouterr().out == ''
    times = (workplace / 'text.txt').stat()
    write(workplace / 'text.txt', (workplace / 'text.txt').read_bytes().replace(b'square', b'circle'))
    os.utime(workplace / 'text.txt', ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and time
    assert prepare('text.txt', 256) == folder and read_meta(folder)['hash'] != before['hash']
    assert text_of(folder) == (workplace / 'text.txt').read_text()
    assert list((workplace / 'data').iterdir()) == [folder]


def test_a_copy_elsewhere_is_the_same_text_and_where_a_file_ends_is_part_of_it(workplace):
    for name, texts in dict(a=('one ', 'two'), b=('one', ' two'), c=('two', 'one ')).items():
        for i, text in enumerate(texts):
            write(workplace / name / f'{i}.txt', text)
    shutil.copytree(workplace / 'a', workplace / 'elsewhere' / 'd')
    write(workplace / 'elsewhere' / 'd' / 'no-text', b'a text up to here\xff')
    hashes = [read_meta(prepare(name, 256))['hash'] for name in ('a', 'b', 'c', 'elsewhere/d')]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]


# A corpus is whole or absent: kills, interrupts, full disks and races


@pytest.mark.parametrize('name', ['train.bin', 'val.bin', 'meta.json'])
def test_a_kill_while_a_new_text_replaces_the_old_one_leaves_neither(workplace, monkeypatch, name):
    folder = prepare('text.txt', 256)
    write(workplace / 'text.txt', 'another text ' * 1000)
    replace = os.replace

    def killed(source, target):
        if str(source).endswith(name):
            raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'replace', killed)
        prepare('text.txt', 256)
    assert read_meta(folder) == dict(hash=None)  # the files may be of two texts
    assert prepare('text.txt', 256) == folder and text_of(folder) == 'another text ' * 1000
    (folder / 'meta.json').write_bytes(b'')  # after a power cut
    assert read_meta(folder) == dict(hash=None)


@pytest.mark.parametrize('signum', [signal.SIGKILL, signal.SIGINT])
def test_a_preparation_that_is_killed_half_way_is_not_seen_as_prepared(clone, monkeypatch, signum):
    monkeypatch.setattr(data, 'DATA', clone.folder / 'data')
    monkeypatch.chdir(clone.folder)
    # SIGINT is ignored below a shell's `&`
    process = clone('-c', 'import json, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); '
                          f'json.dumps = lambda *_, **__: time.sleep(60); {PREPARE}')
    while not any(path.stat().st_size for path in data.DATA.glob('unfinished-*/train.bin')):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    assert process.wait(60) == -signum
    assert not list(data.DATA.glob('*_256'))
    if signum == signal.SIGINT:
        assert not list(data.DATA.glob('unfinished-*'))
    assert text_of(prepare('text.txt', 256)) == (clone.folder / 'text.txt').read_text()


@contextmanager
def files_of_at_most(size):
    """As on a full disk, a file that grows beyond `size` bytes cannot be written."""
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize('size', [1000, 20000])
def test_a_full_disk_is_told_with_the_folder_and_keeps_the_corpus_before_the_edit(workplace, size):
    with files_of_at_most(size):
        says = refusal('text.txt')
    assert 'File too large' in says and 'make room' in says and f'{workplace}/data/text-' in says
    folder = prepare('text.txt', 256)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write(workplace / 'text.txt', 'another text ' * 10000)
    with files_of_at_most(size), pytest.raises(UserError, match='make room'):
        prepare('text.txt', 256)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_three_processes_may_prepare_one_corpus_at_once(clone):
    for text in 'a first text ', 'an edited text ':
        (clone.folder / 'text.txt').write_text(text * 20000)
        processes = [clone('-c', PREPARE) for _ in range(3)]
        assert [(p.communicate(timeout=60)[1], p.returncode) for p in processes] == [('', 0)] * 3
        (folder,) = (p for p in (clone.folder / 'data').iterdir() if p.is_dir())
        assert text_of(folder) == text * 20000 and read_meta(folder)['hash']


# Downloads, from a server on this machine


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append(self.path)
        body = self.server.files.get(self.path)
        if body is None or 'urllib' in self.headers['User-Agent']:
            return self.send_error(403)
        self.send_response(200)
        self.send_header('Content-Length', str(len(body) + (1000 if 'cut' in self.path else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of wikitext103, which is looked for where server.at(path) says: whole at /w.zip, not at others."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as z:
        for split in 'train', 'valid', 'test':
            z.writestr(f'wikitext-103-raw/wiki.{split}.raw', f' a sentence of {split} .\n' * 200)
    body = archive.getvalue()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as s:
        s.seen = []
        s.files = {'/w.zip': body, '/bad/w.zip': body[:-1] + b'x', '/cut/w.zip': body[:500]}

        def at(path):
            url = f'http://127.0.0.1:{s.server_port}{path}'
            monkeypatch.setitem(data.DOWNLOADS, 'wikitext103', (url, hashlib.sha256(body).hexdigest()))
        s.at = at
        s.at('/w.zip')
        thread = threading.Thread(target=s.serve_forever, args=(0.02,))
        thread.start()
        yield s
        s.shutdown()
        thread.join()


def test_wikitext_is_read_from_its_archive_and_fetched_once(workplace, server, monkeypatch):
    folder = prepare('wikitext103', 256)
    assert folder.name == 'wikitext103_256'
    assert bytes_of(folder, 'train').decode() == ' a sentence of train .\n' * 200
    assert bytes_of(folder, 'val').decode() == ' a sentence of valid .\n' * 200
    monkeypatch.setattr(data, 'get_tokenizer', lambda v: get_tokenizer(256))  # another size, the same archive
    prepare('wikitext103', 300)
    (workplace / 'data' / 'wikitext103-w.zip').unlink()  # what is prepared needs no archive
    assert prepare('wikitext103', 256) == folder and server.seen == ['/w.zip']


@pytest.mark.parametrize('path, why', [('/none/w.zip', 'HTTP Error 403'), ('/bad/w.zip', 'another sha256'),
                                       ('/cut/w.zip', 'IncompleteRead')])
def test_a_bad_or_partial_download_is_named_and_never_used(workplace, server, path, why):
    server.at(path)
    says = refusal('wikitext103')
    for part in f'could not download http://127.0.0.1:{server.server_port}{path}', why, f'{workplace}/data/wiki':
        assert part in says
    write(workplace / 'data' / 'wikitext103-w.zip', b'put here by hand, and cut')
    server.at('/w.zip')
    assert text_of(prepare('wikitext103', 256)).count('sentence') == 400
    assert (workplace / 'data' / 'wikitext103-w.zip').read_bytes() == server.files['/w.zip']
