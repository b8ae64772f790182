"""
Text to tokens: data/<dataset>_<vocab_size>/{train,val}.bin (uint16) and meta.json, and the tokenizer itself.

train.py calls this for a corpus it does not find. By hand: python data/prepare.py shakespeare
"""

import argparse
import codecs
import difflib
import functools
import hashlib
import http.client
import io
import itertools
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator

import numpy as np
import tiktoken
import tiktoken_ext.openai_public

DATA = Path(__file__).resolve().parent

DOWNLOADS = {  # dataset: (urls in the order they are tried, sha256)
    'shakespeare': (['https://raw.githubusercontent.com/karpathy/char-rnn/master/data/'
                     'tinyshakespeare/input.txt'],
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'),
    'wikitext103': (['https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main/'
                     'wikitext-103-raw-v1.zip', 'https://wikitext.smerity.com/wikitext-103-raw-v1.zip'],
                    '91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794'),
}
BUILTIN = ['python', *DOWNLOADS]


class UserError(Exception):
    """A mistake that one line can explain: what was given, what is allowed, what to do next."""


@functools.cache
def get_tokenizer(vocab_size: int) -> tiktoken.Encoding:
    """256: bytes. 257 to 50257: the first vocab_size - 1 ranks of GPT-2's BPE, and <|endoftext|> as the last
    id. Each merge is built from lower ranks, so the cut is a BPE and loses nothing. UserError otherwise."""
    if vocab_size == 256:
        return tiktoken.Encoding('bytes', pat_str=r'(?s:.){1,16}', special_tokens={},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if not 256 < vocab_size <= 50257:
        raise UserError(f'vocab_size must be 256 (bytes) or 257 to 50257 (GPT-2 BPE), got {vocab_size}')
    try:
        gpt2 = tiktoken_ext.openai_public.gpt2()
    except OSError as e:
        raise UserError(f'vocab_size {vocab_size} needs the GPT-2 BPE, which tiktoken could not download '
                        f'({type(e).__name__}); go online once, set TIKTOKEN_CACHE_DIR, or use '
                        f'--vocab_size=256') from e
    ranks = {token: rank for token, rank in gpt2['mergeable_ranks'].items() if rank < vocab_size - 1}
    return tiktoken.Encoding(f'gpt2_{vocab_size}', pat_str=gpt2['pat_str'], mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': vocab_size - 1})


def download(dataset: str) -> Path:
    """The dataset's file, fetched once into data/ and checked against its sha256. UserError if that fails."""
    urls, sha256 = DOWNLOADS[dataset]
    path = DATA / f'{dataset}-{urls[0].rsplit("/", 1)[1]}'
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    failures = []
    for url in urls:
        part = Path(f'{path}.{os.getpid()}.part')
        try:
            request = urllib.request.Request(url, headers={'User-Agent': 'Mozilla/5.0 (looped)'})
            digest = hashlib.sha256()
            with urllib.request.urlopen(request, timeout=30) as response, open(part, 'wb') as f:
                total = int(response.headers.get('Content-Length') or 0)
                while block := response.read(1 << 20):
                    f.write(block)
                    digest.update(block)
                    progress(f'downloading {dataset}: {f.tell() / 1e6:.1f} of {total / 1e6:.1f} MB')
            progress(None)
            if digest.hexdigest() == sha256:
                os.replace(part, path)
                return path
            failures.append(f'{url}: {part.stat().st_size:,} bytes with another sha256 than {sha256}')
        except (OSError, http.client.HTTPException) as e:
            failures.append(f'{url}: {e}')
        finally:
            part.unlink(missing_ok=True)
    raise UserError(f'could not download {dataset} ({"; ".join(failures)}). Put the file at {path} yourself, '
                    f'or use --dataset=python, which needs no network')


def local_files(dataset: str) -> list[Path]:
    """The text files of a corpus on this disk: of the standard library, or of the user's file or folder."""
    if dataset == 'python':
        root = Path(sysconfig.get_path('stdlib'))
        skip = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}
        return sorted(p for p in root.rglob('*.py') if not skip & set(p.relative_to(root).parts))
    root = Path(dataset).resolve()
    return sorted(p for p in (root.rglob('*') if root.is_dir() else [root]) if p.is_file() and is_text(p))


def is_text(path: Path) -> bool:
    """Neither empty nor binary. UTF-16 counts as binary: save it as UTF-8."""
    with open(path, 'rb') as f:
        start = f.read(4096)
    return bool(start) and b'\0' not in start


def pieces(f: io.BufferedIOBase, length: int = 1 << 20) -> Iterator[tuple[int, str]]:
    """(bytes read so far, text), about `length` bytes at a time. Cut where a word ends and white space
    begins, which no token of the GPT-2 BPE spans, so the pieces encode to what the whole would."""
    decoder, rest, read = codecs.getincrementaldecoder('utf-8')(errors='replace'), '', 0
    while block := f.read(length):
        read += len(block)
        rest += decoder.decode(block)
        ends = (i for i in range(len(rest) - 1, 0, -1) if rest[i].isspace() and not rest[i - 1].isspace())
        cut = next(ends, len(rest) if len(rest) > 4096 else 0)  # text without white space is cut anywhere
        if cut:
            yield read, rest[:cut]
            rest = rest[cut:]
    yield read, rest + decoder.decode(b'', final=True)


def documents(dataset: str) -> Iterator[tuple[str, str]]:
    """(split, text) of a whole corpus, in order. Validation is every 20th file; of fewer files, the last
    tenth of each; of wikitext103, its own."""
    if dataset == 'wikitext103':
        with zipfile.ZipFile(download(dataset)) as z:
            for split, name in ('train', 'train'), ('val', 'valid'):
                with z.open(f'wikitext-103-raw/wiki.{name}.raw') as f:
                    yield from ((split, text) for _, text in pieces(f))
        return
    files = [download(dataset)] if dataset in DOWNLOADS else local_files(dataset)
    for i, path in enumerate(files):
        size = path.stat().st_size
        with open(path, 'rb') as f:
            for read, text in pieces(f, min(1 << 20, size // 50 + 1)):
                last = i % 20 == 19 if len(files) >= 20 else read > 0.9 * size
                yield 'val' if last else 'train', text


def fingerprint(dataset: str) -> str:
    """What tells a corpus from an edited one: sha256 of the archive, or of files' names, sizes and times."""
    if dataset in DOWNLOADS:
        return DOWNLOADS[dataset][1]
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in local_files(dataset)]
    if dataset == 'python':  # whose times say when it was installed
        stats = [s[:2] for s in stats]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def progress(line: str | None):
    """Overwrite one line of the terminal; None ends it. Silent where stderr is not a terminal."""
    if sys.stderr.isatty():
        print('\n' if line is None else f'\r{line}', end='', file=sys.stderr, flush=True)


def prepare(dataset: str, vocab_size: int, min_tokens: int = 1) -> Path:
    """The folder of a prepared corpus, made first where it is missing or its text has changed.

    Encodes on all cores in bounded memory. Files are written under a temporary name and renamed last.
    UserError: unknown dataset, no text, fewer than min_tokens tokens in a split, no network.
    """
    name = dataset
    if dataset not in BUILTIN:
        if not Path(dataset).exists():
            near = difflib.get_close_matches(dataset, BUILTIN, 1)
            raise UserError(f'no dataset {dataset!r}: give {", ".join(BUILTIN)}, or a file or folder of text'
                            + (f'; did you mean {near[0]}?' if near else ''))
        path = Path(dataset).resolve()
        name = f'{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}'
    encoding, folder, hash_ = get_tokenizer(vocab_size), DATA / f'{name}_{vocab_size}', fingerprint(dataset)

    def check(tokens):
        for split, count in tokens.items():
            if count < min_tokens:
                raise UserError(f'{dataset} has {count} {split} tokens, and at least {min_tokens} are needed '
                                f'(block_size + 1): give more text, as UTF-8, or a smaller --block_size')
    if folder.exists() and (meta := read_meta(folder))['hash'] == hash_:
        check(meta['tokens'])
        return folder

    start, workers = time.time(), os.cpu_count() or 1
    print(f'preparing {dataset} with {vocab_size:,} tokens in {folder}')
    tokens, size = dict(train=0, val=0), dict(train=0, val=0)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=DATA))
    temporary.chmod(0o755)
    try:
        with ThreadPoolExecutor(workers) as pool, open(temporary / 'train.bin', 'wb') as train, \
                open(temporary / 'val.bin', 'wb') as val:
            out, stream = dict(train=train, val=val), documents(dataset)

            def encode(text):  # tiktoken works outside the GIL
                return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

            while batch := list(itertools.islice(stream, 4 * workers)):
                for (split, text), ids in zip(batch, pool.map(encode, (text for _, text in batch))):
                    ids.tofile(out[split])
                    tokens[split] += len(ids)
                    size[split] += len(text.encode())
                progress(f'tokenizing: {sum(size.values()) / 1e6:.0f} MB, {sum(tokens.values()):,} tokens')
            progress(None)
        check(tokens)
        (temporary / 'meta.json').write_text(json.dumps(dict(
            dataset=dataset, vocab_size=vocab_size, tokens=tokens, bytes=size, hash=hash_), indent=1))
        if folder.exists() and read_meta(folder)['hash'] != hash_:
            shutil.rmtree(folder)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # else another process prepared the same corpus meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f'prepared {tokens["train"]:,} training and {tokens["val"]:,} validation tokens '
          f'of {sum(size.values()) / 1e6:.1f} MB in {time.time() - start:.1f} s')
    return folder


def read_meta(folder: Path) -> dict:
    """meta.json of a prepared corpus; where it or its files are not whole, a hash that matches nothing."""
    try:
        meta = json.loads((folder / 'meta.json').read_text())
        if all((folder / f'{split}.bin').stat().st_size == 2 * n for split, n in meta['tokens'].items()):
            return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return dict(hash=None)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Prepare a corpus; train.py does it by itself.')
    parser.add_argument('dataset', help=f'{", ".join(BUILTIN)}, or a file or folder of text')
    parser.add_argument('--vocab_size', type=int, default=256, help='256 is bytes; 257 to 50257 GPT-2 BPE')
    args = parser.parse_args()
    try:
        prepare(args.dataset, args.vocab_size)
    except (UserError, OSError) as e:
        sys.exit(f'prepare.py: {e}')
    except KeyboardInterrupt:
        sys.exit(130)
