"""data/prepare.py: tokenizers, corpora, downloads."""

import hashlib
import http.server
import io
import json
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY
from data import prepare as data
from data.prepare import UserError, documents, get_tokenizer, pieces, prepare, read_meta
from train import main

TEXT = 'def f(x):\r\n    return "héllo, wörld" + \'日本\' * 3  # <|endoftext|>\n\n\n\tend  \n' * 40


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


@pytest.mark.parametrize('vocab_size', [0, 255, 50258])
def test_another_vocabulary_size_is_refused(vocab_size):
    with pytest.raises(UserError, match=f'256.*50257.*got {vocab_size}'):
        get_tokenizer(vocab_size)


def test_without_network_or_cache_the_bpe_error_says_what_to_do(monkeypatch):
    def offline():
        raise ConnectionError('no route')
    monkeypatch.setattr(data.tiktoken_ext.openai_public, 'gpt2', offline)
    with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR.*--vocab_size=256'):
        get_tokenizer.__wrapped__(20000)


# Corpora


def ids_of(folder, split):
    return np.fromfile(folder / f'{split}.bin', np.uint16)


@pytest.mark.parametrize('length', [1, 7, 100, 10 ** 6])
def test_pieces_put_together_are_the_text_and_encode_to_what_the_whole_would(length):
    parts = [text for _, text in pieces(io.BytesIO(TEXT.encode()), length)]
    assert ''.join(parts) == TEXT and (len(parts) > 1 or length > len(TEXT))
    encoding = bpe(20000)
    assert sum((encoding.encode(p, disallowed_special=()) for p in parts), []) == encoding.encode(TEXT, disallowed_special=())


def test_a_file_gives_its_last_tenth_to_validation_and_loses_nothing(workplace):
    folder = prepare('text.txt', 256)
    train, val = ids_of(folder, 'train'), ids_of(folder, 'val')
    assert bytes(np.concatenate((train, val)).astype(np.uint8)) == (workplace / 'text.txt').read_bytes()
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.15
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['tokens'] == meta['bytes'] == dict(train=len(train), val=len(val)) and meta['vocab_size'] == 256
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
    assert get_tokenizer(256).decode(ids_of(prepare('text.txt', 256), 'train')[:6].tolist()) == 'caf\N{REPLACEMENT CHARACTER}'


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

    def broken(dataset):
        for i, item in enumerate(real(dataset)):
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
    meta = read_meta(folder)
    assert 5e6 < meta['tokens']['train'] < 3e7 and 0.02 < meta['tokens']['val'] / meta['tokens']['train'] < 0.1


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
        thread = threading.Thread(target=s.serve_forever)
        thread.start()
        yield s
        s.shutdown()
        thread.join()


def wikitext() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as z:
        for split in 'train', 'valid', 'test':
            z.writestr(f'wikitext-103-raw/wiki.{split}.raw', f' = {split} = \n\n' + f' a sentence of {split} .\n' * 200)
    return buffer.getvalue()


def test_wikitext_is_read_from_its_archive_and_fetched_once(workplace, server, monkeypatch):
    body = wikitext()
    server.files['/w.zip'] = body
    monkeypatch.setitem(data.DOWNLOADS, 'wikitext103', ([server.url + '/w.zip'], hashlib.sha256(body).hexdigest()))
    folder = prepare('wikitext103', 256)
    assert folder.name == 'wikitext103_256'
    text = {s: bytes(ids_of(folder, s).astype(np.uint8)).decode() for s in ('train', 'val')}
    assert text['train'].startswith(' = train') and text['val'].startswith(' = valid') and 'test' not in str(text)
    assert len(server.seen) == 1
    monkeypatch.setattr(data, 'get_tokenizer', lambda v: get_tokenizer(256))  # another vocabulary, the same archive
    prepare('wikitext103', 300)
    assert len(server.seen) == 1


def test_the_next_address_is_tried_and_a_bad_or_partial_file_is_never_used(workplace, server, monkeypatch):
    body = wikitext()
    server.files.update({'/bad.zip': body[:-1] + b'x', '/cut.zip': body[:500], '/good.zip': body})
    sha = hashlib.sha256(body).hexdigest()
    monkeypatch.setitem(data.DOWNLOADS, 'wikitext103', ([server.url + p for p in ('/none.zip', '/bad.zip', '/cut.zip')], sha))
    with pytest.raises(UserError) as e:
        prepare('wikitext103', 256)
    for part in 'none.zip: HTTP Error 403', 'bad.zip', 'another sha256', 'cut.zip', '--dataset=python':
        assert part in str(e.value)
    assert list((workplace / 'data').iterdir()) == []
    data.DOWNLOADS['wikitext103'][0].append(server.url + '/good.zip')
    assert prepare('wikitext103', 256).exists()


def test_no_network_ends_in_one_line_and_changes_nothing(run, workplace, monkeypatch):
    monkeypatch.setitem(data.DOWNLOADS, 'shakespeare', (['http://127.0.0.1:9/input.txt'], '0' * 64))
    code, out, err = run(main, *TINY, '--dataset=shakespeare')
    assert code == 1 and err.count('\n') == 1 and 'could not download shakespeare' in err and '--dataset=python' in err
    assert list((workplace / 'data').iterdir()) == [] and not (workplace / 'out').exists()


def test_the_real_addresses_and_hashes_are_those_of_the_design():
    urls, sha = data.DOWNLOADS['wikitext103']
    assert urls[0].startswith('https://huggingface.co/') and 'smerity' in urls[1] and sha.startswith('91c00ae2')
    shared = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'tinyshakespeare' / 'input.txt'
    if not shared.exists():
        pytest.skip('no copy of tiny Shakespeare beside the repository')
    assert hashlib.sha256(shared.read_bytes()).hexdigest() == data.DOWNLOADS['shakespeare'][1]
    assert os.path.getsize(shared) == 1115394
