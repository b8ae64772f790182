"""
Text to tokens: data/<dataset>_<vocab_size>/{train,val}.bin (uint16) and meta.json, and the tokenizer itself.
train.py calls this for a corpus it does not find. By hand: python data/prepare.py shakespeare
"""

import argparse
import codecs
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Iterator

import numpy as np
import tiktoken
import tiktoken_ext.openai_public

DATA = Path(__file__).resolve().parent
DOWNLOADS = {  # dataset: (urls in the order they are tried, sha256)
    'shakespeare': (['https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/'
                     'input.txt'], '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'),
    'wikitext103': (['https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main/'
                     'wikitext-103-raw-v1.zip', 'https://wikitext.smerity.com/wikitext-103-raw-v1.zip'],
                    '91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794')}
BUILTIN = ['python', *DOWNLOADS]


class UserError(Exception):
    """A mistake that one line can explain: what was given, what is allowed, what to do next."""


def get_tokenizer(vocab_size: int) -> tiktoken.Encoding:
    """256: bytes. 257 to 50257: the first vocab_size - 1 ranks of GPT-2's BPE, and <|endoftext|> as the last
    id. Each merge is built from lower ranks, so the cut is a BPE and loses nothing. UserError otherwise."""
    if vocab_size == 256:
        return tiktoken.Encoding('bytes', pat_str=r'(?s:.){1,16}', special_tokens={},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if not 256 < vocab_size <= 50257:
        raise UserError(f'vocab_size must be from 256 (bytes) to 50257 (GPT-2 BPE), got {vocab_size}')
    try:
        gpt2 = tiktoken_ext.openai_public.gpt2()
    except (OSError, ValueError) as e:  # ValueError: something else came, such as a log-in page
        raise UserError(f'vocab_size {vocab_size} needs a download of the GPT-2 BPE ({type(e).__name__}): go '
                        f'online once, set TIKTOKEN_CACHE_DIR, or use --vocab_size=256') from e
    ranks = {token: rank for token, rank in gpt2['mergeable_ranks'].items() if rank < vocab_size - 1}
    return tiktoken.Encoding(f'gpt2_{vocab_size}', pat_str=gpt2['pat_str'], mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': vocab_size - 1})


def progress(line: str):
    """Show a line that the next one overwrites. Silent where stderr is not a terminal."""
    if sys.stderr.isatty():
        print(f'{line:<79}', end='\r', file=sys.stderr, flush=True)


def download(dataset: str, temporary: Path = DATA) -> Path:
    """The dataset's file, fetched once into data/ and checked against its sha256. UserError if that fails."""
    urls, sha256 = DOWNLOADS[dataset]
    path, failures = DATA / f'{dataset}-{urls[0].rsplit("/", 1)[1]}', []
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    for url in urls:
        request = urllib.request.Request(url, headers={'User-Agent': 'Mozilla/5.0 (looped)'})
        part, digest = Path(temporary, f'{path.name}.part'), hashlib.sha256()
        try:
            with urllib.request.urlopen(request, timeout=30) as response, open(part, 'wb') as f:
                while block := response.read(1 << 20):
                    f.write(block)
                    digest.update(block)
                    progress(f'{path.name}: {f.tell() >> 20} MiB, {(response.length or 0) >> 20} MiB to go')
            if digest.hexdigest() == sha256:
                return part.replace(path)
            failures.append(f'{url}: {part.stat().st_size:,} bytes with another sha256 than {sha256}')
        except (OSError, http.client.HTTPException) as e:
            failures.append(f'{url}: {e}')
    raise UserError(f'could not download {dataset} ({"; ".join(failures)}): go online, make room on disk, '
                    f'put the file at {path} yourself, or use --dataset=python, which needs no network')


def local_files(dataset: str) -> list[Path]:
    """The text files of a corpus on this disk: of the standard library, or of the user's file or folder."""
    if dataset == 'python':
        root = Path(os.__file__).parent
        skip = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}
        return sorted(p for p in root.rglob('*.py') if not skip & set(p.relative_to(root).parts))

    def fault(path):  # why it is not read as text, or nothing
        if not path.is_file():
            return 'missing, or not a regular file'
        with open(path, 'rb') as f:
            start = f.read(4096)
        if b'\0' in start or start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return 'skipped as binary or UTF-16: save text as UTF-8'
        return '' if start else 'an empty file'
    root = Path(os.path.realpath(dataset))
    found = sorted(p for p in root.rglob('*') if not p.is_dir()) if os.path.isdir(dataset) else [root]
    faults = [fault(path) for path in found]
    if all(faults):
        raise UserError(f'no text in {dataset!r} ({"; ".join(sorted(set(faults))) or "an empty folder"}): '
                        f'give {", ".join(BUILTIN)}, or a file or folder of text')
    return [path for path, why in zip(found, faults) if not why]


def fingerprint(dataset: str) -> str:
    """What tells one corpus from another: sha256 of the archive, or of the files' names and contents."""
    if dataset in DOWNLOADS:
        return DOWNLOADS[dataset][1]
    files, digest = local_files(dataset), hashlib.sha256()
    for path in files:
        digest.update(os.fsencode(f'{os.path.relpath(path, files[0])}\0{path.stat().st_size}\0'))
        with open(path, 'rb') as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def pieces(f: BinaryIO, length: int = 1 << 20) -> Iterator[tuple[int, str]]:
    """(bytes read so far, text), about `length` bytes at a time. Cut where a word ends and white space
    begins, which no token of the GPT-2 BPE spans, so the pieces encode to what the whole would."""
    decoder, rest, read = codecs.getincrementaldecoder('utf-8')(errors='replace'), '', 0
    while block := f.read(length):
        read += len(block)
        rest += decoder.decode(block)
        ends = (i for i in range(len(rest) - 1, 0, -1) if rest[i].isspace() and not rest[i - 1].isspace())
        cut = next(ends, len(rest) if len(rest) > 4096 else 0)  # text without white space is cut anywhere
        yield read, rest[:cut]
        rest = rest[cut:]
    yield read, rest + decoder.decode(b'', final=True)


def documents(dataset: str, temporary: Path = DATA) -> Iterator[tuple[str, str]]:
    """(split, text) of a whole corpus, in order. Validation is every 20th file; of fewer files, the last
    tenth of each; of wikitext103, its own."""
    if dataset == 'wikitext103':
        with zipfile.ZipFile(download(dataset, temporary)) as z:
            for split, name in ('train', 'train'), ('val', 'valid'):
                with z.open(f'wikitext-103-raw/wiki.{name}.raw') as f:
                    yield from ((split, text) for _, text in pieces(f))
        return
    files = [download(dataset, temporary)] if dataset in DOWNLOADS else local_files(dataset)
    for i, path in enumerate(files):
        size = path.stat().st_size
        with open(path, 'rb') as f:
            for read, text in pieces(f, min(1 << 20, size // 50 + 1)):
                last = i % 20 == 19 if len(files) >= 20 else read > 0.9 * size
                yield 'val' if last else 'train', text


def prepare(dataset: str, vocab_size: int, min_tokens: int = 1) -> Path:
    """The folder of a prepared corpus, made where it is missing or its text has changed: on all cores and in
    bounded memory. UserError: no text, fewer than min_tokens tokens in a split, no network, no room."""
    path = Path(os.path.realpath(dataset))
    own = re.sub(r'(?a)^$|\W+', '_', path.stem)[:40] + '-' + hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    folder, hash_ = DATA / f'{dataset if dataset in BUILTIN else own}_{vocab_size}', fingerprint(dataset)
    for left in DATA.glob('.tmp-*'):  # of killed processes: one at work writes every few seconds
        with suppress(OSError):
            if time.time() - max(p.stat().st_mtime for p in (left, *left.iterdir())) > 600:
                shutil.rmtree(left)

    def check(tokens):
        for split in 'train', 'val':
            if tokens[split] < min_tokens:
                raise UserError(f'{dataset!r} has {tokens[split]} {split} tokens, and at least {min_tokens} '
                                f'(block_size + 1) are needed: give more text or a smaller --block_size')
        if 256 < vocab_size and tokens['train'] < 10 * vocab_size:
            print(f'warning: {tokens["train"]:,} training tokens are few for a vocabulary of {vocab_size:,}, '
                  f'all of which every step computes: --vocab_size=256 is faster', file=sys.stderr)
    if (meta := read_meta(folder))['hash'] == hash_:
        check(meta['tokens'])
        return folder

    tokens, size, encoding = dict(train=0, val=0), dict(train=0, val=0), get_tokenizer(vocab_size)
    print(f'preparing {ascii(dataset)[1:-1]} with a vocabulary of {vocab_size:,} in data/{folder.name}')
    try:
        with tempfile.TemporaryDirectory(prefix='.tmp-', dir=DATA, ignore_cleanup_errors=True) as temporary:
            stream = documents(dataset, temporary)
            with ThreadPoolExecutor() as pool, open(f'{temporary}/train.bin', 'wb') as train, \
                    open(f'{temporary}/val.bin', 'wb') as val:
                while batch := list(itertools.islice(stream, 4 * (os.cpu_count() or 1))):
                    encoded = pool.map(lambda x: encoding.encode_to_numpy(x[1], disallowed_special=()), batch)
                    for (split, text), ids in zip(batch, encoded):
                        (train if split == 'train' else val).write(ids.astype(np.uint16))
                        tokens[split] += len(ids)
                        size[split] += len(text.encode())
                    progress(f'tokenized {sum(size.values()) / 1e6:.0f} MB, {sum(tokens.values()):,} tokens')
            check(tokens)
            meta = dict(dataset=dataset, vocab_size=vocab_size, tokens=tokens, bytes=size, hash=hash_)
            Path(temporary, 'meta.json').write_text(json.dumps(meta, indent=1))
            if read_meta(folder)['hash'] != hash_:  # else another process did the same meanwhile
                folder.mkdir(exist_ok=True)
                for file in 'train.bin', 'val.bin', 'meta.json':  # the last makes it count as prepared
                    os.replace(f'{temporary}/{file}', folder / file)
    except OSError as e:
        raise UserError(f'could not write {folder} ({e}): make room in {DATA}, or make it writable') from e
    print(f'prepared {tokens["train"]:,} training and {tokens["val"]:,} validation tokens')
    return folder


def read_meta(folder: Path) -> dict:
    """meta.json of a prepared corpus; where it or its files are not whole, a hash that matches nothing."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        meta = json.loads((folder / 'meta.json').read_text())
        tokens, size = meta['tokens'], meta['bytes']
        if all((folder / f'{split}.bin').stat().st_size == 2 * tokens[split]
               and 0 < tokens[split] <= size[split] <= 128 * tokens[split] for split in ('train', 'val')):
            return {'hash': None, **meta}
    return dict(hash=None)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Prepare a corpus; train.py does it by itself.')
    parser.add_argument('dataset', help=f'{", ".join(BUILTIN)}, or a file or folder of text')
    parser.add_argument('--vocab_size', type=int, default=256, help='256 is bytes; 257 to 50257 GPT-2 BPE')
    try:
        prepare(**vars(parser.parse_args()))
    except (UserError, OSError) as e:
        sys.exit(f'prepare.py: {e}')
    except KeyboardInterrupt:
        sys.exit(130)
