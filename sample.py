"""
Continue a prompt with a trained model, at any depth, or at every depth one under the other.

    python sample.py out/RUN --prompt="def " --loops=4
    python sample.py out/RUN --prompt="def " --every_depth
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.prepare import UserError, get_tokenizer
from looped import LoopedGPT, flag, validate
from train import load_checkpoint, one_line_errors, parse_flags, pick_device


@dataclass
class SampleConfig:
    prompt: str = flag('\n', 'text to continue; FILE:path reads a file')
    loops: int = flag(0, 'depth; 0 is the trained one', high=10_000)
    every_depth: bool = flag(False, 'depths 1, 2, 4 .. K and 2K, one under the other')
    num_samples: int = flag(1, 'samples per depth', low=1)
    max_new_tokens: int = flag(300, 'tokens per sample')
    temperature: float = flag(0.8, '0 is greedy', high=1000)
    top_k: int = flag(200, 'sample from the k likeliest tokens; 0 is all')
    seed: int = flag(1, 'of the first sample; the next has seed + 1', high=2 ** 32)
    device: str = flag('auto', 'auto is cuda, or else cpu')

    __post_init__ = validate


def read_prompt(prompt: str) -> str:
    """The text itself, or that of FILE:path. UserError if there is none."""
    if prompt.startswith('FILE:'):
        path = Path(prompt[5:]).expanduser()
        try:
            prompt = path.read_text(encoding='utf-8', errors='replace')
        except OSError as e:
            raise UserError(f'could not read the prompt {path} ({e.strerror})') from e
    if not prompt:
        raise UserError('the prompt is empty: give at least one character')
    return prompt


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
    """Print idx (1, T) with one continuation, and below it the norm of its last state."""
    torch.manual_seed(seed)
    idx = model.generate(idx, cfg.max_new_tokens, depth, cfg.temperature, cfg.top_k or None)
    norm = model(idx[:, -model.cfg.block_size:], loops=depth).norms[-1]
    print(f'{encoding.decode(idx[0].tolist())}\n--- {depth} loops, seed {seed}: state norm {norm:.1f}\n')


@one_line_errors
def main(argv):
    run = dict(help='the folder of a run, as out/python-raw-residual-per_loop')
    cfg, given = parse_flags(SampleConfig, __doc__, argv, run=run)
    path = Path(given['run']).expanduser()
    # a checkpoint can be shared as a file, too
    model, trained, _ = load_checkpoint(path if path.is_file() else path / 'ckpt.pt')
    device = pick_device(cfg.device, trained.n_embd)
    model.to(device)
    encoding = get_tokenizer(trained.vocab_size)
    idx = torch.tensor([encoding.encode(read_prompt(cfg.prompt), disallowed_special=())], device=device)
    asked = cfg.loops or trained.loops
    depths = [asked]
    if cfg.every_depth:
        # 1, 2, 4 .. asked, and twice asked
        depths = sorted({2 ** i for i in range(asked.bit_length())} | {asked, 2 * asked})
        likeliest(model, encoding, idx, depths)
        print(f'\nand how the text goes on, each depth from seed {cfg.seed}:\n')
    for depth in depths:
        for i in range(cfg.num_samples):
            sample(model, encoding, idx, depth, cfg, cfg.seed + i)


if __name__ == '__main__':
    main()
