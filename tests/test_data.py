"""data/prepare.py: tokenizers, corpora, downloads."""

import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data import prepare as data
from data.prepare import UserError, get_tokenizer, prepare, read_meta

TEXT = 'def f(x):\r\n    return "héllo, wörld" + \'日本\' * 3  # <|endoftext|>\n\n\n\tend  \n' * 40
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


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def hash_of(dataset):
    return read_meta(prepare(dataset, 256))['hash']


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
        counts.append(len(ids))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    assert ids == tiktoken.get_encoding('gpt2').encode(TEXT, disallowed_special=())


@pytest.mark.parametrize('vocab_size', [0, 1, 255, 50258])
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


def test_a_long_run_of_one_character_is_tokenized(workplace):
    bpe(1000)
    write(workplace / 'run.txt', 'a' * 100000 + ' ' * 2000000 + 'a')  # tiktoken's own limit: 999,998 spaces
    assert sum(read_meta(prepare('run.txt', 1000))['bytes'].values()) == 2100001


# Two splits


@pytest.mark.parametrize('text', [TEXT, '字' * 4000, 'word ' * 40, 'x' * 200, 'ACGTTGCA' * 250000, '🙂' * 99,
                                  'one ' + 'x' * 996, 'é', 'ab'], ids=lambda text: text[:4])
def test_the_last_tenth_of_a_file_is_validation_however_short_and_whatever_its_characters(workplace, text):
    write(workplace / 'one.txt', text)
    folder = prepare('one.txt', 256, min_tokens=0)
    train, val = bytes_of(folder, 'train'), bytes_of(folder, 'val')
    assert train.decode() + val.decode() == text  # nothing is lost, and no character is halved
    assert len(text) < 20 or 0.1 < len(val) / len(train + val) < 0.2
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['tokens'] == meta['bytes'] == dict(train=len(train), val=len(val)) and val
    assert meta['vocab_size'] == 256 and meta['dataset'] == 'one.txt'
    assert folder.name.startswith('one-') and folder.name.endswith('_256')


@pytest.mark.parametrize('piece', [1000, 10 ** 6])
def test_a_long_file_is_read_in_pieces_that_encode_to_what_the_whole_would(workplace, monkeypatch, piece):
    bpe(1000)
    monkeypatch.setattr(data, 'PIECE', piece, raising=False)
    write(workplace / 'long.txt', TEXT)
    folder = prepare('long.txt', 1000)
    ids = [*ids_of(folder, 'train'), *ids_of(folder, 'val')]
    assert ids == bpe(1000).encode(TEXT, disallowed_special=())
    assert bpe(1000).decode(ids_of(folder, 'val').tolist())[0].isspace()  # where a word ends


def test_a_small_file_is_one_piece_and_every_20th_is_validation(workplace, monkeypatch):
    seen = []

    class Recorder:
        def encode_to_numpy(self, text, **_):
            seen.append(text)
            return np.frombuffer(text.encode(), np.uint8)
    monkeypatch.setattr(data, 'get_tokenizer', lambda vocab_size: Recorder())
    texts = [f'a file of 24 byte {i:05}\n' for i in range(400)]
    for i, text in enumerate(texts):
        write(workplace / 'many' / f'{i:05}.txt', text)
    folder = prepare('many', 256)
    assert seen == texts
    assert bytes_of(folder, 'val').decode() == ''.join(texts[19::20])
    seen.clear()
    prepare('text.txt', 256)
    assert len(seen) == 2


def test_the_embedded_corpus_is_the_standard_library_without_its_tests(workplace):
    files = data.local_files('python')
    names = {p.name for p in files}
    assert {'argparse.py', 'zipfile.py'} & names and 'conftest.py' not in names
    assert not [p for p in files if {'site-packages', 'test', 'tests'} & set(p.parts)]
    folder = prepare('python', 256)
    assert bytes_of(folder, 'val') == b''.join(p.read_bytes() for p in files[19::20])
    del files[19::20]
    assert bytes_of(folder, 'train') == b''.join(p.read_bytes() for p in files)


# What is text


def refusal(dataset, *args):
    """The message of the UserError; nothing is left in data/."""
    with pytest.raises(UserError) as e:
        prepare(str(dataset), *args or (256,))
    assert not list(data.DATA.iterdir()) and '\n' not in str(e.value) and 'tokens' not in str(e.value)
    return str(e.value)


NOT_TEXT = {'koi8': 'слово '.encode('koi8-r'), 'latin-1': b'caf\xe9 ', 'utf-16': '日本'.encode('utf-16'),
            'cut': '日本'.encode()[:-1], 'nul': b'a nul\0', 'train.bin': b't\0e\0x\0t\0'}


@pytest.mark.parametrize('kind', NOT_TEXT)
def test_a_file_that_is_not_text_is_refused_with_what_to_do(workplace, kind):
    write(workplace / 'odd.txt', b'ten letters' * 200000 + NOT_TEXT[kind])
    says = refusal('odd.txt')
    assert "no text in 'odd.txt'" in says and 'saved as UTF-8' in says
    assert ('NUL' if kind in ('nul', 'train.bin') else 'not UTF-8') in says


def test_of_a_folder_what_is_not_text_is_named_and_skipped(workplace, capsys):
    for i in range(3):
        write(workplace / 'corpus' / 'sub' / f'{i}.txt', f'file {i} ' * 100)
    write(workplace / 'linked' / 'inside.txt', 'elsewhere ' * 100)
    for kind, content in NOT_TEXT.items():
        write(workplace / 'corpus' / kind, content * 100)
    (workplace / 'corpus' / 'a-link').symlink_to('../linked')
    (workplace / 'corpus' / 'b-loop').symlink_to('b-loop')
    (workplace / 'corpus' / 'file-link').symlink_to('../text.txt')
    os.mkfifo(workplace / 'corpus' / 'c-fifo')
    folder = prepare('corpus', 256)
    text = bytes_of(folder, 'train').decode() + bytes_of(folder, 'val').decode()
    assert text.count('file') == 300 and len(text) == 3 * 700 + os.path.getsize(workplace / 'text.txt')
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'skipped 9 of 13 files' in err and err.endswith(', …\n')
    for word in "'a-link' (a link to a folder", "'b-loop'", "'c-fifo' (missing, or no regular file)":
        assert word in err


def test_a_checkout_is_the_same_corpus_after_a_run_in_it(workplace, capsys):
    write(workplace / 'src' / 'a.py', 'the source = 1\n' * 100)
    write(workplace / '.gitignore', 'out/\n')
    write(workplace / '.git' / 'config', 'hidden ' * 100)
    write(workplace / 'data' / 'own.txt', 'hidden ' * 100)
    folder = prepare('.', 256)
    text = bytes_of(folder, 'train') + bytes_of(folder, 'val')
    assert b'source' in text and b'out/' in text and b'square' in text and b'hidden' not in text
    write(workplace / 'out' / 'run' / 'log.jsonl', '{}\n')
    write(workplace / 'out' / 'run' / 'deeper' / 'samples.txt', 'a sample')
    shutil.copytree(folder, workplace / 'elsewhere' / 'corpus')
    capsys.readouterr()
    assert prepare('.', 256) == folder and capsys.readouterr() == ('', '')  # as it was, not prepared again


def test_the_home_folder_is_meant_by_a_tilde(workplace, monkeypatch):
    monkeypatch.setenv('HOME', str(workplace))
    assert prepare('~/text.txt', 256) == prepare('text.txt', 256)


def test_an_empty_or_unknown_name_is_no_dataset(workplace):
    for name in '', 'nowhere.txt', 'shakespear', 'x' * 5000:
        says = refusal(name)
        assert f'no text in {name!r}' in says and 'python, shakespeare, wikitext103, or a file' in says


def test_empty_files_do_not_count(workplace):
    for i in range(25):
        write(workplace / 'corpus' / f'{i:02}.txt', '' if i == 19 else f'file {i:02}\n')
    assert bytes_of(prepare('corpus', 256), 'val') == b'file 20\n'
    shutil.rmtree(workplace / 'data')
    (workplace / 'data').mkdir()
    (workplace / 'empty' / 'sub').mkdir(parents=True)
    write(workplace / 'empty.txt', '')
    for name in 'empty', 'empty.txt':
        assert 'empty files' in refusal(name)
    (workplace / 'empty' / 'link').symlink_to('../corpus')
    assert "'link' (a link to a folder" in refusal('empty')


def test_a_fifo_or_a_device_is_never_opened(workplace):
    os.mkfifo(workplace / 'fifo')
    for name in 'fifo', '/dev/zero':
        assert 'no regular file' in refusal(name)


def test_a_name_that_is_not_utf8_is_prepared_and_printed(clone):
    name = os.fsdecode(b'caf\xe9.txt')
    try:
        shutil.copy(clone.folder / 'text.txt', clone.folder / name)
    except OSError:
        pytest.skip('file names are UTF-8 here')
    out, err = (p := clone('data/prepare.py', name)).communicate(timeout=60)
    assert p.returncode == 0 and err == '' and 'preparing caf\\udce9.txt' in out
    out, err = (p := clone('data/prepare.py', name[:-1])).communicate(timeout=60)
    assert p.returncode == 1 and err.count('\n') == 1 and 'caf\\udce9.tx' in err


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
    assert b'circle' in bytes_of(folder, 'train') and list((workplace / 'data').iterdir()) == [folder]


def test_a_copy_elsewhere_is_the_same_text_and_where_a_file_ends_is_part_of_it(workplace):
    for name, texts in dict(a=('one ', 'two'), b=('one', ' two'), c=('two', 'one ')).items():
        for i, text in enumerate(texts):
            write(workplace / name / f'{i}.txt', text)
    shutil.copytree(workplace / 'a', workplace / 'elsewhere' / 'd')
    hashes = [hash_of(name) for name in ('a', 'b', 'c', 'elsewhere/d')]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]


@pytest.mark.parametrize('edit', [
    lambda path: path.write_text(path.read_text().replace('square', 'circle')),
    lambda path: path.write_bytes(path.read_bytes() + b'\xe9'),
    lambda path: path.unlink()], ids=['edited', 'not UTF-8', 'removed'])
def test_a_text_edited_between_fingerprint_and_reading_is_never_stored(workplace, monkeypatch, edit):
    def then(vocab_size):
        edit(workplace / 'text.txt')
        return get_tokenizer(vocab_size)
    monkeypatch.setattr(data, 'get_tokenizer', then)
    assert "'text.txt' changed while it was read" in refusal('text.txt')


def test_folders_are_named_after_the_path_and_two_paths_are_two_folders(workplace):
    names = ['a/x.txt', 'b/x.txt', 'b/x.md', '-x.txt', '.x.txt', 'längs 日本.txt', 'x' * 200 + '.txt', 'a\nb']
    for name in names:
        write(workplace / name, 'a short text ' * 10)
    folders = [prepare(f'./{name}', 256).name for name in names]
    assert len(set(folders)) == len(names) and folders[0].startswith('x-') and folders[0].endswith('_256')
    assert not [name for name in folders if name[0] in '-.' or not name.isascii() or len(name) > 80]


def test_a_vocabulary_too_large_for_the_corpus_is_warned_of_each_time(workplace, capsys, monkeypatch):
    monkeypatch.setattr(data, 'get_tokenizer', lambda vocab_size: get_tokenizer(256))
    count = read_meta(prepare('text.txt', 256))['tokens']['train']
    prepare('text.txt', count // 10)
    assert capsys.readouterr().err == ''
    for _ in range(2):
        prepare('text.txt', 20000)
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and f'{count:,} training tokens' in err
        assert '20,000' in err and '--vocab_size=256' in err


def test_too_few_tokens_are_refused_and_not_stored(workplace):
    with pytest.raises(UserError, match='train tokens, and at least 100000 .*smaller --block_size'):
        prepare('text.txt', 256, 100000)
    assert not list(data.DATA.iterdir())


# A corpus is whole or absent: interrupts, full disks, kills and races


def test_a_half_prepared_corpus_is_never_seen_as_prepared(workplace, monkeypatch):
    folder = prepare('text.txt', 256)
    good = read_meta(folder)
    for content in b'', b'\xff\xfe\0', b'5', b'null', b'[]', b'{}', b'{"tokens": 1}':
        (folder / 'meta.json').write_bytes(content)
        assert read_meta(folder) == dict(hash=None), content
    assert prepare('text.txt', 256) == folder and read_meta(folder) == good
    with open(folder / 'val.bin', 'ab') as f:
        f.write(b'\0')
    assert read_meta(folder)['hash'] is None
    shutil.rmtree(folder)

    def broken(*args):
        yield 'train', 'text'
        raise KeyboardInterrupt
    monkeypatch.setattr(data, 'documents', broken)
    with pytest.raises(KeyboardInterrupt):
        prepare('text.txt', 256)
    assert list((workplace / 'data').iterdir()) == []


def test_a_kill_while_a_new_text_replaces_the_old_one_leaves_neither(workplace, monkeypatch):
    folder = prepare('text.txt', 256)
    write(workplace / 'text.txt', (workplace / 'text.txt').read_bytes().replace(b'square', b'circle'))
    replace = os.replace

    def killed(source, target):
        if str(source).endswith('val.bin'):
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        prepare('text.txt', 256)
    assert read_meta(folder)['hash'] is None  # train.bin is of the new text, val.bin of the old one


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
    with files_of_at_most(size), pytest.raises(UserError, match='File too large.*make room') as e:
        prepare('text.txt', 256)
    assert f'{workplace}/data/text-' in str(e.value) and list((workplace / 'data').iterdir()) == []
    folder = prepare('text.txt', 256)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write(workplace / 'text.txt', 'another text ' * 10000)
    with files_of_at_most(size), pytest.raises(UserError, match='make room'):
        prepare('text.txt', 256)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root writes anywhere')
def test_a_folder_that_cannot_be_written_is_named(workplace):
    (workplace / 'data').chmod(0o500)
    with pytest.raises(UserError, match='make it writable'):
        prepare('text.txt', 256)
    (workplace / 'data').chmod(0o700)


def hidden(folder):
    return sorted(folder.glob('.*'))


def interrupted(clone, signum):
    """The exit code and stderr of a preparation that is sent a signal in its midst."""
    (clone.folder / 'text.txt').write_text('a text that takes its time to be prepared\n' * 500000)
    process = clone('data/prepare.py', 'text.txt')
    while not any(path.stat().st_size for path in (clone.folder / 'data').glob('.*/train.bin')):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    return process.communicate(timeout=60)[1], process.returncode


def test_what_a_killed_preparation_left_is_removed_later(clone, monkeypatch):
    assert interrupted(clone, signal.SIGKILL) == ('', -signal.SIGKILL)
    monkeypatch.setattr(data, 'DATA', clone.folder / 'data')
    monkeypatch.chdir(clone.folder)
    (left,) = hidden(data.DATA)
    write(clone.folder / 'text.txt', 'a shorter text ' * 100)
    old = (time.time() - 3600,) * 2
    for path in left / 'val.bin', left:
        os.utime(path, old)
    prepare('text.txt', 256)
    assert hidden(data.DATA) == [left]  # a living process may be writing train.bin
    os.utime(left / 'train.bin', old)
    prepare('text.txt', 256)  # which is prepared already
    assert hidden(data.DATA) == []


def test_ctrl_c_leaves_nothing(clone):
    assert interrupted(clone, signal.SIGINT) == ('', 130) and hidden(clone.folder / 'data') == []


def test_three_processes_may_prepare_one_corpus_at_once(clone):
    for text in 'a first text ', 'an edited text ':
        (clone.folder / 'text.txt').write_text(text * 20000)
        processes = [clone('data/prepare.py', 'text.txt') for _ in range(3)]
        assert [(p.communicate(timeout=60)[1], p.returncode) for p in processes] == [('', 0)] * 3
        (folder,) = (clone.folder / 'data').glob('*_256')
        ids = np.concatenate([ids_of(folder, split) for split in ('train', 'val')])
        assert bytes(ids.astype(np.uint8)).decode() == text * 20000 and read_meta(folder)['hash']
        assert hidden(clone.folder / 'data') == []


def test_prepare_by_hand_where_only_a_mistake_of_the_users_is_one_line(clone):
    out, err = (p := clone('data/prepare.py', 'text.txt', '--vocab_size=256')).communicate(timeout=60)
    assert p.returncode == 0 and 'prepared' in out and err == ''
    out, err = (p := clone('data/prepare.py', 'nothing')).communicate(timeout=60)
    assert p.returncode == 1 and err.count('\n') == 1 and 'shakespeare' in err
    path = clone.folder / 'data' / 'prepare.py'
    write(path, path.read_text().replace('if __name__', "def prepare(**_): open('a bug')\n\n\nif __name__"))
    out, err = clone('data/prepare.py', 'text.txt').communicate(timeout=60)
    assert 'Traceback' in err and "open('a bug')" in err


# Downloads, from a server on this machine


class Server(http.server.ThreadingHTTPServer):
    files: dict = {}
    seen: list = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, self.headers['User-Agent']))
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
def server():
    with Server(('127.0.0.1', 0), Handler) as s:
        s.files, s.seen = {}, []
        s.url = f'http://127.0.0.1:{s.server_port}'
        thread = threading.Thread(target=s.serve_forever, args=(0.02,))
        thread.start()
        yield s
        s.shutdown()
        thread.join()


def wikitext() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as z:
        for split in 'train', 'valid', 'test':
            text = f' = {split} = \n\n' + f' a sentence of {split} .\n' * 200
            z.writestr(f'wikitext-103-raw/wiki.{split}.raw', text)
    return buffer.getvalue()


@pytest.fixture
def archive(server, monkeypatch):
    """wikitext103 from the server: the list of its addresses, the first of which is /w.zip."""
    body = wikitext()
    server.files.update({'/w.zip': body, '/bad.zip': body[:-1] + b'x', '/cut.zip': body[:500]})
    urls = [server.url + '/w.zip']
    monkeypatch.setitem(data.DOWNLOADS, 'wikitext103', (urls, hashlib.sha256(body).hexdigest()))
    return urls


def test_wikitext_is_read_from_its_archive_and_fetched_once(workplace, server, archive, monkeypatch):
    folder = prepare('wikitext103', 256)
    assert folder.name == 'wikitext103_256' and hidden(workplace / 'data') == []
    train, val = bytes_of(folder, 'train'), bytes_of(folder, 'val')
    assert train.startswith(b' = train') and val.startswith(b' = valid') and b'test' not in train + val
    monkeypatch.setattr(data, 'get_tokenizer', lambda v: get_tokenizer(256))  # another size, the same archive
    prepare('wikitext103', 300)
    assert len(server.seen) == 1
    (workplace / 'data' / 'wikitext103-w.zip').unlink()  # what is prepared needs no archive
    assert prepare('wikitext103', 256) == folder and len(server.seen) == 1


def test_the_next_address_is_tried_and_a_bad_or_partial_file_is_never_used(workplace, server, archive):
    archive[:] = [server.url + path for path in ('/none.zip', '/bad.zip', '/cut.zip')]
    says = refusal('wikitext103')
    for part in 'none.zip: HTTP Error 403', 'bad.zip', 'another sha256', 'cut.zip', '--dataset=python':
        assert part in says
    write(workplace / 'data' / 'wikitext103-none.zip', b'put here by hand, and cut')
    archive.append(server.url + '/w.zip')
    assert read_meta(prepare('wikitext103', 256))['hash']


def test_a_full_disk_while_downloading_is_told_with_the_path(workplace, archive):
    with files_of_at_most(1000):
        says = refusal('wikitext103')
    assert 'File too large' in says and 'make room' in says and f'{workplace}/data/wikitext103-w.zip' in says


def test_no_network_ends_in_one_line_and_changes_nothing(workplace, monkeypatch):
    monkeypatch.setitem(data.DOWNLOADS, 'shakespeare', (['http://127.0.0.1:9/input.txt'], '0' * 64))
    says = refusal('shakespeare')
    assert 'could not download shakespeare' in says and 'go online' in says and '--dataset=python' in says


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason='no copy of tiny Shakespeare beside the repository')
def test_shakespeare_is_split_as_for_the_numbers_of_the_readme(workplace):
    shutil.copy(SHAKESPEARE, workplace / 'data' / 'shakespeare-input.txt')
    folder = prepare('shakespeare', 256)
    text = SHAKESPEARE.read_bytes()
    assert (bytes_of(folder, 'train'), bytes_of(folder, 'val')) == (text[:981551], text[981551:])
    assert hash_of('shakespeare') == hashlib.sha256(text).hexdigest()
