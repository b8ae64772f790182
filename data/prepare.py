"""
Text to tokens: data/<dataset>_<vocab_size>/{train,val}.bin (uint16) and meta.json, and the tokenizer itself.
train.py calls this for a corpus it does not find.

What is text: a file that decodes as UTF-8. Of a folder every such file is read, except in folders whose name
begins with a dot or that hold a run, and in data/ itself.
"""

import hashlib
import io
import json
import os
import re
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import Iterator

import numpy as np
import tiktoken
import tiktoken_ext.openai_public

DATA = Path(__file__).resolve().parent
DOWNLOADS = {  # dataset: (url, sha256)
    'shakespeare': ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/'
                    'input.txt', '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'),
    'wikitext103': ('https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main/'
                    'wikitext-103-raw-v1.zip',
                    '91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794')}
BUILTIN = ['python', *DOWNLOADS]
PIECE = 900_000  # characters encoded at a time: tiktoken fails at 999,999 white spaces in one text


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


def download(dataset: str) -> Path:
    """The dataset's file, fetched once into data/. UserError if that fails."""
    url, sha256 = DOWNLOADS[dataset]
    path = DATA / f'{dataset}-{url.rsplit("/", 1)[1]}'
    # the hash is checked before every use, so a file that is cut off halfway is only fetched again
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    print(f'downloading {url}')
    try:
        request = urllib.request.Request(url, headers={'User-Agent': 'Mozilla/5.0 (looped)'})
        with urllib.request.urlopen(request, timeout=30) as response:
            body = response.read()
        if hashlib.sha256(body).hexdigest() != sha256:
            raise OSError(f'{len(body):,} bytes with another sha256 than {sha256}')
        path.write_bytes(body)
    except Exception as e:  # whatever a network brings
        raise UserError(f'could not download {url} ({e}): go online, make room on disk, put the file '
                        f'at {path} yourself, or use --dataset=python, which needs no network') from e
    return path


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


def scan(dataset: str) -> tuple[list[Path], str]:
    """The files of a corpus that are text, and what tells one corpus from another: sha256 of the archive, or
    of the files' names and contents. What is not text is named and skipped."""
    if dataset in DOWNLOADS:
        return [], DOWNLOADS[dataset][1]
    files, skipped = [], []
    digest = hashlib.sha256()
    for path in local_files(dataset):
        try:
            text = path.read_bytes()
            text.decode()
        except (OSError, UnicodeError):
            skipped.append(ascii(path.name))
            continue
        files.append(path)
        name = os.path.relpath(path, files[0])  # the same for a copy elsewhere
        digest.update(os.fsencode(f'{name}\0{len(text)}\0') + text)
    if not files:
        raise UserError(f'no text in {dataset!r}: give {", ".join(BUILTIN)}, or a file or folder of text '
                        f'that is saved as UTF-8')
    if skipped:
        print(f'skipped {len(skipped)} of {len(skipped) + len(files)} files that are not UTF-8 text, such as '
              f'{", ".join(skipped[:3])}', file=sys.stderr)
    return files, digest.hexdigest()


def documents(dataset: str, files: list[Path]) -> Iterator[tuple[str, str]]:
    """(split, text) of a whole corpus, in order. Validation is every 20th file; of fewer files, the last
    tenth of each; of wikitext103, its own."""
    if dataset == 'wikitext103':
        with zipfile.ZipFile(download(dataset)) as z:
            for split, name in ('train', 'train'), ('val', 'valid'):
                f = io.TextIOWrapper(z.open(f'wikitext-103-raw/wiki.{name}.raw'), 'utf-8', newline='')
                while text := f.read(PIECE):  # whole, it would take gigabytes
                    yield split, text
        return
    if dataset in DOWNLOADS:
        files = [download(dataset)]
    for i, path in enumerate(files):
        text = path.read_bytes().decode()
        if len(files) < 20:
            end = len(text) * 9 // 10
            yield 'train', text[:end]
            yield 'val', text[end:]
        else:
            yield 'val' if i % 20 == 19 else 'train', text


def tokenize(texts: Iterator[tuple[str, str]], encoding: tiktoken.Encoding, folder: str) -> tuple[dict, dict]:
    """Write train.bin and val.bin. How many tokens, and how many bytes of text, each split has."""
    tokens = dict(train=0, val=0)
    size = dict(train=0, val=0)
    with open(f'{folder}/train.bin', 'wb') as train, open(f'{folder}/val.bin', 'wb') as val:
        for split, text in texts:
            file = train if split == 'train' else val
            for start in range(0, len(text), PIECE):
                ids = encoding.encode_to_numpy(text[start:start + PIECE], disallowed_special=())
                file.write(ids.astype(np.uint16))
                tokens[split] += len(ids)
            size[split] += len(text.encode())
    return tokens, size


def read_meta(folder: Path) -> dict:
    """meta.json of a prepared corpus; where there is none, a hash that matches nothing."""
    try:
        return json.loads((folder / 'meta.json').read_text())
    except (OSError, ValueError):
        return dict(hash=None)


def prepare(dataset: str, vocab_size: int, min_tokens: int = 1) -> tuple[Path, dict]:
    """The folder of a prepared corpus, made where it is missing or its text has changed, and its meta.json.
    UserError: no text, fewer than min_tokens tokens in a split, no network, no room."""
    dataset = os.path.expanduser(dataset)
    # Two files can have one name, and a name can hold anything: the folder's name has a hash of the path.
    path = os.path.realpath(dataset)
    stem = re.sub(r'(?a)\W+', '_', Path(path).stem)[:40]
    own = f'{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}'
    folder = DATA / f'{dataset if dataset in BUILTIN else own}_{vocab_size}'

    files, digest = scan(dataset)
    meta = read_meta(folder)
    if meta['hash'] != digest:
        encoding = get_tokenizer(vocab_size)
        print(f'preparing {dataset!a} with a vocabulary of {vocab_size:,} in data/{folder.name}')
        try:
            with tempfile.TemporaryDirectory(prefix='unfinished-', dir=DATA) as temporary:
                tokens, size = tokenize(documents(dataset, files), encoding, temporary)
                meta = dict(dataset=dataset, vocab_size=vocab_size, tokens=tokens, bytes=size, hash=digest)
                Path(temporary, 'meta.json').write_text(json.dumps(meta, indent=1))
                folder.mkdir(exist_ok=True)
                # The old text's meta.json goes first and the new one comes last: if this is killed between
                # the two, the corpus does not count as prepared.
                (folder / 'meta.json').unlink(missing_ok=True)
                for name in 'train.bin', 'val.bin', 'meta.json':
                    os.replace(f'{temporary}/{name}', folder / name)
        except OSError as e:
            raise UserError(f'could not write {folder} ({e}): make room, or make {DATA} writable') from e
        print(f'prepared {tokens["train"]:,} training and {tokens["val"]:,} validation tokens')

    tokens = meta['tokens']
    if min(tokens.values()) < min_tokens:
        raise UserError(f'{dataset!r} has {tokens["train"]} train and {tokens["val"]} val tokens; at least '
                        f'{min_tokens} (block_size + 1) are needed: give more text or a smaller --block_size')
    return folder, meta
