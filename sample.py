"""
Continue a prompt with a trained model, at any depth, or at every depth one under the other.

    python sample.py out/RUN --prompt="def " --loops=4
    python sample.py out/RUN --prompt="def " --every_depth
"""

import codecs
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data.prepare import UserError, get_tokenizer
from looped import LoopedGPT, flag, validate
from train import FlagParser, load_checkpoint, one_line_errors, pick_device


@dataclass
class SampleConfig:
    out_dir: str = flag('', 'the folder of a run, if it is not given by itself')
    prompt: str = flag('\n', 'text to continue; FILE:path reads a file, - standard input')
    loops: int = flag(0, 'depth; 0 is the trained one', high=10_000)
    every_depth: bool = flag(False, 'depths 1, 2, 4 .. K and 2K, one under the other')
    num_samples: int = flag(1, 'samples per depth', low=1)
    max_new_tokens: int = flag(300, 'tokens per sample')
    temperature: float = flag(0.8, '0 is greedy', high=1000)
    top_k: int = flag(200, 'sample from the k likeliest tokens; 0 is all')
    seed: int = flag(1, 'of the first sample; the next has seed + 1', high=2 ** 32)
    device: str = flag('auto', 'auto is cuda, then mps, then cpu')

    __post_init__ = validate


def read_prompt(prompt: str) -> str:
    """The text itself, of FILE:path or of standard input. UserError if there is none."""
    if prompt == '-':
        data = sys.stdin.buffer.read()
    elif prompt.startswith('FILE:'):
        path = Path(prompt[5:]).expanduser()
        try:
            data = path.read_bytes()
        except OSError as e:
            raise UserError(f'could not read the prompt {path} ({e.strerror})') from e
    else:
        data = prompt.encode(errors='replace')
    if not data:
        raise UserError('the prompt is empty: give at least one character')
    return data.decode(errors='replace')


@torch.no_grad()
def likeliest(model: LoopedGPT, encoding, idx: torch.Tensor, depths: list[int]):
    """Print the five likeliest next tokens after idx (1, T) and their probabilities, one row per depth."""
    print('the five likeliest next tokens: what does another loop change?')
    for depth in depths:
        logits = model(idx[:, -model.cfg.block_size:], loops=depth).logits[0, -1]
        top = logits.float().softmax(-1).topk(min(5, len(logits)))
        row = f'{depth:>4} loops'
        for token, p in zip(top.indices.tolist(), top.values.tolist()):
            row += f' {encoding.decode([token])!r:>8} {p:.3f}'
        print(row)


@torch.no_grad()
def sample(model: LoopedGPT, encoding, idx: torch.Tensor, depth: int, cfg: SampleConfig, seed: int):
    """Print one continuation as it is made, and below it the norm of its last state; the speed on stderr."""
    torch.manual_seed(seed)
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # a character may span tokens
    start = time.perf_counter()
    for token in model.stream(idx, cfg.max_new_tokens, depth, cfg.temperature, cfg.top_k or None):
        print(decoder.decode(encoding.decode_single_token_bytes(token.item())), end='', flush=True)
        idx = torch.cat((idx, token), dim=1)
    seconds = time.perf_counter() - start
    norm = model(idx[:, -model.cfg.block_size:], loops=depth).norms[-1]
    print(f'{decoder.decode(b"", final=True)}\n--- {depth} loops, seed {seed}: state norm {norm:.1f}\n')
    print(f'{cfg.max_new_tokens / seconds:,.0f} tokens per second', file=sys.stderr)


@one_line_errors
def main(argv):
    parser = FlagParser(SampleConfig, __doc__)
    parser.add_argument('run', nargs='?', help='the folder of a run, as out/python-raw-residual-per_loop')
    cfg, given = parser.parse(argv)
    run = Path(given['run'] or cfg.out_dir).expanduser()
    model, trained, _ = load_checkpoint(run if run.is_file() else run / 'ckpt.pt')
    device = pick_device(cfg.device, trained.n_embd)
    model.to(device)
    encoding = get_tokenizer(trained.vocab_size)
    prompt = read_prompt(cfg.prompt)
    idx = torch.tensor([encoding.encode(prompt, disallowed_special=())], device=device)
    asked = cfg.loops or model.cfg.loops
    depths = [asked]
    if cfg.every_depth:
        depths = sorted({2 ** i for i in range(asked.bit_length())} | {asked, 2 * asked})
        likeliest(model, encoding, idx, depths)
        print(f'\nand how the text goes on, each depth from seed {cfg.seed}:\n')
    for depth in depths:
        for i in range(cfg.num_samples):
            print(prompt, end='')
            sample(model, encoding, idx, depth, cfg, cfg.seed + i)


if __name__ == '__main__':
    main()
