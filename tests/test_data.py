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

from data import prepare as data
from data.prepare import UserError, documents, fingerprint, get_tokenizer, pieces, prepare, read_meta

TEXT = 'def f(x):\r\n    return "héllo, wörld" + \'日本\' * 3  # <|endoftext|>\n\n\n\tend  \n' * 40


@functools.cache
def bpe(vocab_size):
    try:
        return get_tokenizer(vocab_size)
    except UserError:
        pytest.skip('GPT-2 BPE neither cached nor downloadable; set TIKTOKEN_CACHE_DIR')


# Tokenizers


def test_256_tokens_are_the_bytes():
    encoding = get_tokenizer(256)
    assert encoding.encode(TEXT) == list(TEXT.encode()) and encoding.n_vocab == 256
    assert encoding.decode([0xFF, 0x41]) == '\N{REPLACEMENT CHARACTER}A'


@pytest.mark.parametrize('vocab_size', [257, 1000, 20000, 50257])
def test_a_bpe_cut_by_rank_loses_nothing_and_ends_with_endoftext(vocab_size):
    encoding = bpe(vocab_size)
    ids = encoding.encode(TEXT, disallowed_special=())
    assert encoding.decode(ids) == TEXT and max(ids) < vocab_size - 1
    assert encoding.encode('<|endoftext|>', allowed_special='all') == [vocab_size - 1]


def test_the_full_bpe_is_that_of_gpt2_and_a_smaller_one_costs_more_tokens():
    import tiktoken
    counts = [len(bpe(v).encode(TEXT, disallowed_special=())) for v in (257, 1000, 20000, 50257)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    assert bpe(50257).encode('hello world') == tiktoken.get_encoding('gpt2').encode('hello world')


@pytest.mark.parametrize('vocab_size', [0, 1, 255, 50258])
def test_another_vocabulary_size_is_refused_and_256_is_the_least(vocab_size):
    with pytest.raises(UserError, match=f'from 256 .* to 50257 .*got {vocab_size}'):
        get_tokenizer(vocab_size)


@pytest.mark.parametrize('error', [ConnectionError('no route'), ValueError('Hash mismatch')], ids=repr)
def test_without_network_or_cache_the_bpe_error_says_what_to_do(monkeypatch, error):
    def offline():
        raise error
    monkeypatch.setattr(data.tiktoken_ext.openai_public, 'gpt2', offline)
    with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR.*--vocab_size=256'):
        get_tokenizer(20000)


# Corpora


def ids_of(folder, split):
    return np.fromfile(folder / f'{split}.bin', np.uint16)


@pytest.mark.parametrize('length', [1, 7, 100, 10 ** 6])
def test_pieces_put_together_are_the_text_and_encode_to_what_the_whole_would(length):
    parts = [text for _, text in pieces(io.BytesIO(TEXT.encode()), length)]
    assert ''.join(parts) == TEXT and (len(parts) > 1 or length > len(TEXT))
    encoding = bpe(20000)
    ids = [encoding.encode(text, disallowed_special=()) for text in (*parts, TEXT)]
    assert sum(ids[:-1], []) == ids[-1]


def test_a_file_gives_its_last_tenth_to_validation_and_loses_nothing(workplace):
    folder = prepare('text.txt', 256)
    train, val = ids_of(folder, 'train'), ids_of(folder, 'val')
    assert bytes(np.concatenate((train, val)).astype(np.uint8)) == (workplace / 'text.txt').read_bytes()
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.15
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['tokens'] == meta['bytes'] == dict(train=len(train), val=len(val))
    assert meta['vocab_size'] == 256 and meta['dataset'] == 'text.txt'
    assert folder.name.startswith('text-') and folder.name.endswith('_256')


def test_a_folder_gives_every_20th_file_to_validation_and_skips_what_is_not_text(workplace):
    (workplace / 'corpus' / 'sub').mkdir(parents=True)
    for i in range(40):
        (workplace / 'corpus' / ('sub' if i % 2 else '') / f'{i:02}.txt').write_text(f'file {i:02}\n')
    (workplace / 'corpus' / 'picture.png').write_bytes(b'\x89PNG\0\0\0')
    folder = prepare('corpus', 256)
    val = bytes(ids_of(folder, 'val').astype(np.uint8)).decode()
    train = bytes(ids_of(folder, 'train').astype(np.uint8)).decode()
    assert val.count('file') == 2 and train.count('file') == 38 and 'PNG' not in train + val


def test_text_without_white_space_is_cut_anywhere_and_loses_nothing(workplace):
    (workplace / 'dna.txt').write_text('ACGTTGCA' * 50000)
    folder = prepare('dna.txt', 256)
    train, val = ids_of(folder, 'train'), ids_of(folder, 'val')
    assert len(train) + len(val) == 400000 and 20000 < len(val) < 60000


def test_files_that_are_empty_or_binary_do_not_count_when_validation_is_chosen(workplace):
    (workplace / 'corpus').mkdir()
    for i in range(25):
        (workplace / 'corpus' / f'{i:02}.txt').write_text('' if i == 19 else f'file {i:02}\n')
    assert len(ids_of(prepare('corpus', 256), 'val')) > 0


def test_the_last_tenth_is_counted_in_bytes_also_where_they_are_not_utf8(workplace):
    (workplace / 'koi8.txt').write_bytes('слово за слово '.encode('koi8-r') * 5000)
    folder = prepare('koi8.txt', 256)
    assert 0.05 < len(ids_of(folder, 'val')) / len(ids_of(folder, 'train')) < 0.15


def test_bytes_that_are_not_utf8_become_replacement_characters(workplace):
    (workplace / 'text.txt').write_bytes(b'caf\xe9 ' * 500)
    ids = ids_of(prepare('text.txt', 256), 'train')[:6].tolist()
    assert get_tokenizer(256).decode(ids) == 'caf\N{REPLACEMENT CHARACTER}'


def test_a_prepared_corpus_is_used_again_and_an_edited_one_is_prepared_again(workplace, capsys):
    folder = prepare('text.txt', 256)
    stamp = (folder / 'train.bin').stat().st_mtime_ns
    capsys.readouterr()
    assert prepare('text.txt', 256) == folder and capsys.readouterr().out == ''
    assert (folder / 'train.bin').stat().st_mtime_ns == stamp
    (workplace / 'text.txt').write_text('another text ' * 100)
    assert prepare('text.txt', 256) == folder and read_meta(folder)['bytes']['train'] < 1300
    assert [p for p in (workplace / 'data').iterdir()] == [folder]


def test_a_half_prepared_corpus_is_never_seen_as_prepared(workplace, monkeypatch):
    real = documents

    def broken(*args):
        for i, item in enumerate(real(*args)):
            if i == 20:
                raise KeyboardInterrupt
            yield item
    monkeypatch.setattr(data, 'documents', broken)
    with pytest.raises(KeyboardInterrupt):
        prepare('text.txt', 256)
    assert list((workplace / 'data').iterdir()) == []
    (workplace / 'data' / 'x_256').mkdir()
    assert read_meta(workplace / 'data' / 'x_256')['hash'] is None


def test_the_embedded_corpus_is_the_standard_library_without_its_tests(workplace):
    files = data.local_files('python')
    names = {p.name for p in files}
    assert {'argparse.py', 'json', 'zipfile.py'} & names and 'conftest.py' not in names
    assert not [p for p in files if {'site-packages', 'test', 'tests'} & set(p.parts)]
    folder = prepare('python', 256)
    tokens = read_meta(folder)['tokens']
    assert 5e6 < tokens['train'] < 3e7 and 0.02 < tokens['val'] / tokens['train'] < 0.1


# A corpus is its content


def test_touching_a_file_or_copying_it_elsewhere_changes_nothing(workplace, capsys):
    (workplace / 'corpus' / 'sub').mkdir(parents=True)
    for name in 'b.txt', 'sub/a.txt':
        (workplace / 'corpus' / name).write_text(f'the text of {name}\n' * 100)
    folder, hash_ = prepare('corpus', 256), fingerprint('corpus')
    stamp = (folder / 'train.bin').stat().st_mtime_ns
    capsys.readouterr()
    os.utime(workplace / 'corpus' / 'b.txt', (1, 1))
    assert prepare('corpus', 256) == folder and capsys.readouterr().out == ''
    assert (folder / 'train.bin').stat().st_mtime_ns == stamp
    shutil.copytree(workplace / 'corpus', workplace / 'elsewhere' / 'other')
    copy = prepare('elsewhere/other', 256)
    assert copy != folder and read_meta(copy)['hash'] == hash_ == read_meta(folder)['hash']


def test_an_edit_that_keeps_size_and_time_is_another_corpus(workplace):
    path = workplace / 'text.txt'
    text, times = path.read_bytes(), path.stat()
    before = read_meta(prepare('text.txt', 256))
    path.write_bytes(text.replace(b'square', b'circle'))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    folder = prepare('text.txt', 256)
    assert read_meta(folder)['hash'] != before['hash']
    assert b'circle' in bytes(ids_of(folder, 'train').astype(np.uint8))


def test_where_one_file_ends_and_another_begins_tells_corpora_apart(workplace):
    hashes = set()
    for name, texts in dict(a=('one ', 'two'), b=('one', ' two'), c=('two', 'one ')).items():
        (workplace / name).mkdir()
        for i, text in enumerate(texts):
            (workplace / name / f'{i}.txt').write_text(text)
        hashes.add(fingerprint(name))
    assert len(hashes) == 3


def test_a_download_is_known_by_its_hash_before_it_is_here(workplace):
    assert fingerprint('wikitext103') == data.DOWNLOADS['wikitext103'][1]
    assert list((workplace / 'data').iterdir()) == []


def test_a_prepared_corpus_needs_no_tokenizer(workplace, monkeypatch):
    monkeypatch.setattr(data, 'get_tokenizer', lambda vocab_size: get_tokenizer(256))
    folder = prepare('text.txt', 1000)

    def offline(vocab_size):
        raise UserError('no network')
    monkeypatch.setattr(data, 'get_tokenizer', offline)
    assert prepare('text.txt', 1000) == folder


def test_folders_are_named_after_the_path_and_two_paths_are_two_folders(workplace):
    names = ['a/x.txt', 'b/x.txt', 'b/x.md', '-x.txt', '.x.txt', 'längs 日本.txt', 'x' * 200 + '.txt']
    for name in names:
        (workplace / name).parent.mkdir(exist_ok=True)
        (workplace / name).write_text('a short text ' * 10)
    folders = [prepare(f'./{name}', 256).name for name in names]
    assert len(set(folders)) == len(names) and folders[0].startswith('x-') and folders[0].endswith('_256')
    assert not [name for name in folders if name[0] in '-.' or not name.isascii() or len(name) > 80]


def test_a_foreign_meta_json_is_not_prepared_and_gives_no_traceback(workplace):
    folder = prepare('text.txt', 256)
    good = read_meta(folder)
    for content in b'', b'\xff\xfe\0', b'5', b'null', b'[]', b'"text"', b'{}', b'[' * 100000:
        (folder / 'meta.json').write_bytes(content)
        assert read_meta(folder) == dict(hash=None), content[:9]
    assert prepare('text.txt', 256) == folder and read_meta(folder) == good


@pytest.mark.parametrize('key', ['tokens', 'bytes', 'hash'])
def test_a_meta_json_that_lacks_a_key_or_has_an_odd_value_is_not_prepared(workplace, key):
    folder = prepare('text.txt', 256)
    good = read_meta(folder)
    changed = [{name: value for name, value in good.items() if name != key}, {**good, key: None}]
    if key != 'hash':
        odd = [0, -1, 1, None, 'x', [], {}, 10 ** 400, float('inf'), float('nan')]
        changed += [{**good, key: value} for value in odd]
        changed += [{**good, key: {**good[key], 'val': value}} for value in odd]
    for meta in changed:
        (folder / 'meta.json').write_text(json.dumps(meta))
        assert read_meta(folder)['hash'] is None, meta
    assert prepare('text.txt', 256) == folder and read_meta(folder) == good


# What cannot be prepared is told in one line


def refusal(dataset, *args):
    """The message of the UserError; nothing is left in data/."""
    with pytest.raises(UserError) as e:
        prepare(str(dataset), *args or (256,))
    assert not list(data.DATA.iterdir()) and '\n' not in str(e.value) and 'tokens' not in str(e.value)
    return str(e.value)


def test_an_empty_or_unknown_name_is_no_dataset(workplace):
    for name in '', 'nowhere.txt', 'shakespear', 'x' * 5000:
        try:
            says = refusal(name)
        except OSError as e:  # which is one line too, at the command line
            assert len(name) == 5000 and 'too long' in str(e)
        else:
            assert f'no text in {name!r}' in says and 'python, shakespeare, wikitext103' in says


@pytest.mark.parametrize('content', [
    'text\n'.encode('utf-16'), 'text\n'.encode('utf-16-be'), '日本'.encode('utf-16'), b'a nul\0'], ids=repr)
def test_a_text_that_is_not_utf8_but_utf16_or_has_nul_is_said_to_be_skipped_as_binary(workplace, content):
    (workplace / 'odd.txt').write_bytes(content * 100)
    says = refusal('odd.txt')
    assert "no text in 'odd.txt'" in says and 'skipped as binary' in says and 'UTF-8' in says


def test_an_empty_file_or_folder_is_said_to_be_empty(workplace):
    (workplace / 'empty.txt').touch()
    (workplace / 'empty' / 'sub').mkdir(parents=True)
    assert 'an empty file' in refusal('empty.txt') and 'an empty folder' in refusal('empty')


def test_a_folder_without_text_says_why_each_kind_of_file_was_skipped(workplace):
    (workplace / 'corpus').mkdir()
    (workplace / 'corpus' / 'a.png').write_bytes(b'\x89PNG\0')
    (workplace / 'corpus' / 'b.txt').touch()
    assert 'an empty file; skipped as binary' in refusal('corpus')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no FIFOs here')
def test_a_fifo_or_a_device_is_not_a_regular_file_and_is_never_opened(workplace):
    os.mkfifo(workplace / 'fifo')
    for name in 'fifo', '/dev/zero':
        assert 'not a regular file' in refusal(name)
    (workplace / 'loop').symlink_to('loop')
    assert 'not a regular file' in refusal('loop')


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


# Full disks, kills and races


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


@pytest.mark.parametrize('size', [100, 20000, 140000])
def test_a_full_disk_is_told_with_the_folder_and_leaves_nothing(workplace, size):
    with files_of_at_most(size), pytest.raises(UserError) as e:
        prepare('text.txt', 256)
    assert f'{workplace}/data/text-' in str(e.value) and 'File too large' in str(e.value)
    assert 'make room' in str(e.value) and 'requested' not in str(e.value)
    assert list((workplace / 'data').iterdir()) == []


def test_a_full_disk_leaves_the_corpus_of_the_text_before_the_edit(workplace):
    folder = prepare('text.txt', 256)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (workplace / 'text.txt').write_text('another text ' * 10000)
    with files_of_at_most(20000), pytest.raises(UserError, match='make room'):
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


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL here')
def test_what_a_killed_preparation_left_is_removed_later(clone, monkeypatch):
    assert interrupted(clone, signal.SIGKILL) == ('', -signal.SIGKILL)
    monkeypatch.setattr(data, 'DATA', clone.folder / 'data')
    monkeypatch.chdir(clone.folder)
    (left,) = hidden(data.DATA)
    (clone.folder / 'text.txt').write_text('a shorter text ' * 100)
    folder = prepare('text.txt', 256)
    assert read_meta(folder)['hash'] and hidden(data.DATA) == [left]  # which a living process may be writing
    for path in (left, *left.iterdir()):
        os.utime(path, (time.time() - 3600,) * 2)
    prepare('text.txt', 256)
    assert hidden(data.DATA) == []


def test_what_a_living_process_is_writing_survives_however_long_it_has_been_at_work(workplace):
    left = workplace / 'data' / '.tmp-of-another-process'
    left.mkdir()
    for name, age in ('val.bin', 7200), ('train.bin', 5):
        (left / name).touch()
        os.utime(left / name, (time.time() - age,) * 2)
    os.utime(left, (time.time() - 7200,) * 2)
    prepare('text.txt', 256)
    assert len(list(left.iterdir())) == 2
    os.utime(left / 'train.bin', (time.time() - 7200,) * 2)
    prepare('text.txt', 256)  # which is prepared already
    assert hidden(workplace / 'data') == []


@pytest.mark.skipif(os.name == 'nt', reason='no SIGINT for one process')
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


def test_prepare_by_hand(clone):
    out, err = (p := clone('data/prepare.py', 'text.txt', '--vocab_size=256')).communicate(timeout=60)
    assert p.returncode == 0 and 'prepared' in out and err == ''
    out, err = (p := clone('data/prepare.py', 'nothing')).communicate(timeout=60)
    assert p.returncode == 1 and err.count('\n') == 1 and 'shakespeare' in err


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


def test_wikitext_is_read_from_its_archive_and_fetched_once(workplace, server, monkeypatch):
    body = wikitext()
    server.files['/w.zip'] = body
    entry = [server.url + '/w.zip'], hashlib.sha256(body).hexdigest()
    monkeypatch.setitem(data.DOWNLOADS, 'wikitext103', entry)
    folder = prepare('wikitext103', 256)
    assert folder.name == 'wikitext103_256'
    text = {s: bytes(ids_of(folder, s).astype(np.uint8)).decode() for s in ('train', 'val')}
    assert text['train'].startswith(' = train') and text['val'].startswith(' = valid')
    assert 'test' not in str(text)
    assert len(server.seen) == 1 and hidden(workplace / 'data') == []
    monkeypatch.setattr(data, 'get_tokenizer', lambda v: get_tokenizer(256))  # another size, the same archive
    prepare('wikitext103', 300)
    assert len(server.seen) == 1


def test_the_next_address_is_tried_and_a_bad_or_partial_file_is_never_used(workplace, server, monkeypatch):
    body = wikitext()
    server.files.update({'/bad.zip': body[:-1] + b'x', '/cut.zip': body[:500], '/good.zip': body})
    sha = hashlib.sha256(body).hexdigest()
    urls = [server.url + path for path in ('/none.zip', '/bad.zip', '/cut.zip')]
    monkeypatch.setitem(data.DOWNLOADS, 'wikitext103', (urls, sha))
    with pytest.raises(UserError) as e:
        prepare('wikitext103', 256)
    for part in 'none.zip: HTTP Error 403', 'bad.zip', 'another sha256', 'cut.zip', '--dataset=python':
        assert part in str(e.value)
    assert list((workplace / 'data').iterdir()) == []
    urls.append(server.url + '/good.zip')
    assert prepare('wikitext103', 256).exists()


def test_a_full_disk_while_downloading_is_told_with_the_path(workplace, server, monkeypatch):
    body = wikitext()
    server.files['/w.zip'] = body
    entry = [server.url + '/w.zip'], hashlib.sha256(body).hexdigest()
    monkeypatch.setitem(data.DOWNLOADS, 'wikitext103', entry)
    with files_of_at_most(1000):
        says = refusal('wikitext103')
    assert 'File too large' in says and 'make room' in says and f'{workplace}/data/wikitext103-w.zip' in says


def test_no_network_ends_in_one_line_and_changes_nothing(workplace, monkeypatch):
    monkeypatch.setitem(data.DOWNLOADS, 'shakespeare', (['http://127.0.0.1:9/input.txt'], '0' * 64))
    says = refusal('shakespeare')
    assert 'could not download shakespeare' in says and 'go online' in says and '--dataset=python' in says


def test_the_real_addresses_and_hashes_are_those_of_the_design():
    urls, sha = data.DOWNLOADS['wikitext103']
    assert urls[0].startswith('https://huggingface.co/') and 'smerity' in urls[1]
    assert sha.startswith('91c00ae2')
    shared = Path(__file__).resolve().parents[2] / 'shared/data/tinyshakespeare/input.txt'
    if not shared.exists():
        pytest.skip('no copy of tiny Shakespeare beside the repository')
    assert hashlib.sha256(shared.read_bytes()).hexdigest() == data.DOWNLOADS['shakespeare'][1]
    assert os.path.getsize(shared) == 1115394
