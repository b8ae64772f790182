"""
Text to tokens: data/<dataset>_<vocab_size>/{train,val}.bin (uint16) and meta.json, and the tokenizer itself.
train.py calls this for a corpus it does not find. By hand: python data/prepare.py shakespeare

What is text: a file that decodes as UTF-8, holds no NUL byte and is not empty. Of a folder every such file is
read, except in folders whose name begins with a dot or that hold a run, and in data/ itself.
"""

import argparse
import codecs
import hashlib
import http.client
import json
import math
import os
import re
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import BinaryIO, Iterator

if sys.version_info < (3, 10):
    sys.exit('Python 3.10 or newer is needed')

import numpy as np
import tiktoken
import tiktoken_ext.openai_public

DATA = Path(__file__).resolve().parent
DOWNLOADS = {  # dataset: (urls in the order in which they are tried, sha256)
    'shakespeare': (['https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/'
                     'input.txt'], '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'),
    'wikitext103': (['https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main/'
                     'wikitext-103-raw-v1.zip', 'https://wikitext.smerity.com/wikitext-103-raw-v1.zip'],
                    '91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794')}
BUILTIN = ['python', *DOWNLOADS]
PIECE = 900_000  # bytes read at a time: tiktoken ends in an error at 999,999 white spaces in one text


class UserError(Exception):
    """A mistake that one line can explain: what was given, what is allowed, what to do next."""


def get_tokenizer(vocab_size: int) -> tiktoken.Encoding:
    """256: bytes. 257 to 50257: the first vocab_size - 1 ranks of GPT-2's BPE, and <|endoftext|> as the last
    id. Each merge is built from lower ranks, so the cut is a BPE and loses nothing. UserError otherwise."""
    if vocab_size == 256:
        return tiktoken.Encoding('bytes', pat_str=r'(?s:.){1,16}', special_tokens={},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if not 257 <= vocab_size <= 50257:
        raise UserError(f'vocab_size must be 256 (bytes) or 257 to 50257 (GPT-2 BPE), got {vocab_size}')
    try:
        gpt2 = tiktoken_ext.openai_public.gpt2()
    except (OSError, ValueError) as e:  # ValueError: something else came, such as a log-in page
        raise UserError(f'vocab_size {vocab_size} needs a download of the GPT-2 BPE ({type(e).__name__}): go '
                        f'online once, set TIKTOKEN_CACHE_DIR, or use --vocab_size=256') from e
    ranks = {token: rank for token, rank in gpt2['mergeable_ranks'].items() if rank < vocab_size - 1}
    return tiktoken.Encoding(f'gpt2_{vocab_size}', pat_str=gpt2['pat_str'], mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': vocab_size - 1})


def download(dataset: str, temporary: str) -> Path:
    """The dataset's file, fetched once into data/ and checked against its sha256. UserError if that fails."""
    urls, sha256 = DOWNLOADS[dataset]
    path = DATA / f'{dataset}-{urls[0].rsplit("/", 1)[1]}'
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    failures = []
    for url in urls:
        request = urllib.request.Request(url, headers={'User-Agent': 'Mozilla/5.0 (looped)'})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                print(f'downloading {response.headers["Content-Length"]} bytes from {url}')
                body = response.read()
            if hashlib.sha256(body).hexdigest() != sha256:
                raise OSError(f'{len(body):,} bytes with another sha256 than {sha256}')
            part = Path(temporary, 'download')
            part.write_bytes(body)
            return part.replace(path)
        except (OSError, http.client.HTTPException) as e:
            failures.append(f'{url}: {e}')
    raise UserError(f'could not download {dataset} ({"; ".join(failures)}): go online, make room on disk, '
                    f'put the file at {path} yourself, or use --dataset=python, which needs no network')


def local_files(dataset: str) -> list[Path]:
    """What may be text on this disk: of the standard library, or the user's file, or what is in a folder."""
    if dataset == 'python':
        root = Path(os.__file__).parent
        skip = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}
        return sorted(p for p in root.rglob('*.py') if not skip & set(p.relative_to(root).parts))

    found = [Path(dataset)]
    for folder, subfolders, names in os.walk(dataset):
        if 'log.jsonl' in names or os.path.realpath(folder) == os.path.realpath(DATA):
            subfolders.clear()  # so that os.walk goes no deeper
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith('.')]
        found += [Path(folder, name) for name in names]
    return sorted(p for p in found if os.path.isfile(p) and os.path.getsize(p) > 0)


def pieces(f: BinaryIO, val_start: float) -> Iterator[tuple[str, str]]:
    """(split, text) of a file, about 1 MB at a time; from byte val_start on it is validation. A piece ends
    where a word ends and white space begins, which no token of the GPT-2 BPE spans, so the pieces encode to
    what the whole would; where there is no such place nearby, anywhere. UnicodeError: not text."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    text = ''
    end = False
    while not end:
        length = min(PIECE, val_start - f.tell()) if f.tell() < val_start else PIECE
        block = f.read(length)
        end = len(block) < length
        text += decoder.decode(block, final=end)
        if '\0' in text:  # it decodes, but is UTF-16 or no text at all
            raise UnicodeError('a NUL byte')
        word_end = re.compile(r'(?s:.*)\S(?=\s)').match(text, len(text) * 19 // 20)
        cut = word_end.end() if word_end and not end else len(text)
        yield 'train' if f.tell() <= val_start else 'val', text[:cut]
        text = text[cut:]


def scan(dataset: str) -> tuple[list[Path], str]:
    """The files of a corpus that are text, and what tells one corpus from another: sha256 of the archive, or
    of the files' names and contents. What is not text is named and skipped."""
    if dataset in DOWNLOADS:
        return [], DOWNLOADS[dataset][1]
    files, skipped = [], []
    digest = hashlib.sha256()
    for path in local_files(dataset):
        name = os.path.relpath(path, files[0] if files else path)
        with_this = digest.copy()
        try:
            with_this.update(os.fsencode(f'{name}\0{path.stat().st_size}\0'))
            with open(path, 'rb') as f:
                for _, text in pieces(f, math.inf):
                    with_this.update(text.encode())
            files.append(path)
            digest = with_this
        except (OSError, UnicodeError):
            skipped.append(ascii(path.name))
    if not files:
        raise UserError(f'no text in {dataset!r}: give {", ".join(BUILTIN)}, or a file or folder of text '
                        f'that is saved as UTF-8')
    if skipped:
        print(f'skipped {len(skipped)} of {len(skipped) + len(files)} files, not readable as UTF-8 text: '
              f'{", ".join(skipped[:3])}{", …" * (len(skipped) > 3)}', file=sys.stderr)
    return files, digest.hexdigest()


def documents(dataset: str, files: list[Path], temporary: str) -> Iterator[tuple[str, str]]:
    """(split, text) of a whole corpus, in order. Validation is every 20th file; of fewer files, the end of
    each; of wikitext103, its own."""
    if dataset == 'wikitext103':
        with zipfile.ZipFile(download(dataset, temporary)) as z:
            for name, val_start in ('train', math.inf), ('valid', 0):
                with z.open(f'wikitext-103-raw/wiki.{name}.raw') as f:
                    yield from pieces(f, val_start)
        return
    if dataset in DOWNLOADS:
        files = [download(dataset, temporary)]
    for i, path in enumerate(files):
        if len(files) >= 20:
            val_start = 0 if i % 20 == 19 else math.inf
        else:  # about the last tenth: 12%
            size = path.stat().st_size
            val_start = size - max(1, size // 50 * 6)
        with open(path, 'rb') as f:
            yield from pieces(f, val_start)


def tokenize(texts: Iterator[tuple[str, str]], encoding: tiktoken.Encoding, folder: str) -> tuple[dict, dict]:
    """Write train.bin and val.bin. How many tokens, and how many bytes of text, each split has."""
    tokens = dict(train=0, val=0)
    size = dict(train=0, val=0)
    with open(f'{folder}/train.bin', 'wb') as train, open(f'{folder}/val.bin', 'wb') as val:
        for split, text in texts:
            ids = encoding.encode_to_numpy(text, disallowed_special=())
            file = train if split == 'train' else val
            file.write(ids.astype(np.uint16))
            tokens[split] += len(ids)
            size[split] += len(text.encode())
    return tokens, size


def check(dataset: str, tokens: dict, min_tokens: int):
    """UserError: too few tokens in a split."""
    if min(tokens.values()) < min_tokens:
        raise UserError(f'{dataset!r} has {tokens["train"]} train and {tokens["val"]} val tokens; at least '
                        f'{min_tokens} (block_size + 1) are needed: give more text or a smaller --block_size')


def read_meta(folder: Path) -> dict:
    """meta.json of a prepared corpus; where there is none, a hash that matches nothing."""
    try:
        return json.loads((folder / 'meta.json').read_text())
    except (OSError, ValueError):
        return dict(hash=None)


def prepare(dataset: str, vocab_size: int, min_tokens: int = 1) -> Path:
    """The folder of a prepared corpus, made where it is missing or its text has changed. UserError: no text,
    fewer than min_tokens tokens in a split, no network, no room."""
    dataset = os.path.expanduser(dataset)
    # Two files may have one name, and a name may hold anything: the hash of the path tells them apart.
    path = os.path.realpath(dataset)
    stem = re.sub(r'(?a)\W+', '_', Path(path).stem)[:40]
    own = f'{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}'
    folder = DATA / f'{dataset if dataset in BUILTIN else own}_{vocab_size}'

    files, hash_ = scan(dataset)
    meta = read_meta(folder)
    if meta['hash'] == hash_:
        check(dataset, meta['tokens'], min_tokens)
        return folder

    encoding = get_tokenizer(vocab_size)
    print(f'preparing {ascii(dataset)[1:-1]} with a vocabulary of {vocab_size:,} in data/{folder.name}')
    try:
        with tempfile.TemporaryDirectory(prefix='unfinished-', dir=DATA) as temporary:
            tokens, size = tokenize(documents(dataset, files, temporary), encoding, temporary)
            check(dataset, tokens, min_tokens)
            meta = dict(dataset=dataset, vocab_size=vocab_size, tokens=tokens, bytes=size, hash=hash_)
            Path(temporary, 'meta.json').write_text(json.dumps(meta, indent=1))
            if read_meta(folder)['hash'] != hash_:  # else another process has done the same meanwhile
                folder.mkdir(exist_ok=True)
                # The old text's meta.json goes first and the new one comes last: what is between, a kill
                # included, does not count as prepared.
                (folder / 'meta.json').unlink(missing_ok=True)
                for name in 'train.bin', 'val.bin', 'meta.json':
                    os.replace(f'{temporary}/{name}', folder / name)
    except OSError as e:
        raise UserError(f'could not write {folder} ({e}): make room in {DATA}, or make it writable') from e
    print(f'prepared {tokens["train"]:,} training and {tokens["val"]:,} validation tokens')
    return folder


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Prepare a corpus; train.py does it by itself.')
    parser.add_argument('dataset', help=f'{", ".join(BUILTIN)}, or a file or folder of text')
    parser.add_argument('--vocab_size', type=int, default=256, help='256 is bytes; 257 to 50257 GPT-2 BPE')
    try:
        prepare(**vars(parser.parse_args()))
    except UserError as e:
        sys.exit(f'prepare.py: {e}')
    except KeyboardInterrupt:  # nothing is left behind
        sys.exit(130)
