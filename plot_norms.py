"""
See the blind spot: measure trained runs, print a table, draw one figure.

    python plot_norms.py out/A out/B …          (no run: every run under out/)
    python plot_norms.py --panels=all           (without it: the argument in four panels)
    python plot_norms.py --out=training.gif     (a moving picture, of the logs alone)

Runs that differ in nothing but the seed are one condition: their mean is drawn, and their range as a band.
All numbers come from log.jsonl, ckpt.pt and validation text; they go beside the figure as JSON.
"""

import os
import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while torch is imported

import json
import math
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import matplotlib.figure
import torch
import torch.nn.functional as F
from PIL import Image

from data.prepare import UserError
from looped import LoopedGPT, flag, validate
from train import (FlagParser, TrainConfig, eval_batches, load_checkpoint, load_tokens, one_line_errors,
                   pick_device, read_log, result_flags, writing)

matplotlib.rcParams.update({'font.size': 12, 'axes.spines.top': False, 'axes.spines.right': False})

# ------------------------------------------------------------------------------------------------------------
# The diagnostics: of a model and batches [(idx, targets)], through embed, step, carry, states and readout


def averaged(diagnostic):
    """Makes of a diagnostic of one batch, {name: tensor}, one of many batches: {name: mean, as a list}."""
    def over(model: LoopedGPT, batches) -> dict:
        results = [diagnostic(model, idx, targets) for idx, targets in batches]
        return {name: torch.stack([r[name] for r in results]).mean(0).tolist() for name in results[0]}
    return torch.no_grad()(over)


def exit_ce(model: LoopedGPT, states, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy at exits 1, 2, … as they were trained, mean over tokens. K of (B, T, C) -> (K,)"""
    ce = [model.cross_entropy(model.expose(h, k), targets) for k, h in enumerate(states, 1)]
    return torch.stack(ce).mean((1, 2))


@averaged
def depth(model, idx, targets):
    """Norm and cross-entropy at each loop, to four times the trained depth K."""
    states = model.states(idx, 4 * model.cfg.loops)
    norm = torch.stack([h.float().norm(dim=-1).mean() for h in states])
    return dict(norm=norm, ce=exit_ce(model, states, targets))


@averaged
def scale_sensitivity(model, idx, targets):
    """Cross-entropy after the last state is multiplied by a factor: flat where the readout is blind to it."""
    h, factors = model.states(idx)[-1], torch.logspace(-1, 1, 21)
    ce = [model.cross_entropy(model.expose(a * h), targets).mean() for a in factors.tolist()]
    return dict(factor=factors, ce=torch.stack(ce))


@averaged
def radial_gradient(model, idx, targets):
    """|<dCE_k/dh_k, h_k>| / (|dCE_k/dh_k| |h_k|) at each loop, mean over tokens: 0 where exit k is blind."""
    states = [h.detach().requires_grad_() for h in model.states(idx)]
    with torch.enable_grad():
        grads = torch.autograd.grad(exit_ce(model, states, targets).sum(), states)
    cosine = F.cosine_similarity(torch.stack(grads), torch.stack(states), dim=-1, eps=1e-20)       # (K, B, T)
    return dict(share=cosine.abs().mean((1, 2)))


@torch.no_grad()
def rays(model, batches):
    """h_1 .. h_32 of a token in every 20th batch: how far each is along h_1, and how far across it."""
    idx = torch.cat([idx[-1:] for idx, _ in batches[::20]])
    h = torch.stack(model.states(idx, 32))[:, :, -1].cpu().double()  # (32, tokens, C)
    cosine = F.cosine_similarity(h, h[:1], dim=-1)
    along, across = h.norm(dim=-1) * cosine, h.norm(dim=-1) * (1 - cosine ** 2).clamp(min=0).sqrt()
    return dict(along=along.T.tolist(), across=across.T.tolist())


@averaged
def common(model, idx, _):
    """|mean h_k|² / mean |h_k|², what all tokens of a batch share of the squared norm; and |h_k| / |h_0|."""
    h, norm_0 = torch.stack(model.states(idx)).float(), model.embed(idx).float().norm(dim=-1)
    norm = h.norm(dim=-1)  # (K, B, T)
    share = h.mean((1, 2)).square().sum(-1) / norm.square().mean((1, 2))
    return dict(share=share, growth=(norm / norm_0).mean((1, 2)))


@averaged
def residual_expansion(model, idx, _):
    """Of h_k = s_k·u_k with |u_k| = 1, over 30 loops: s_{k+1} - s_k, turn = |u_{k+1} - u_k|, turn · s_k."""
    h = torch.stack(model.states(idx, 30)).float()
    s, turn = h.norm(dim=-1), F.normalize(h, dim=-1).diff(dim=0).norm(dim=-1)                     # (30, B, T)
    means = torch.stack((s.diff(dim=0), turn, turn * s[:-1])).mean((2, 3))
    return dict(zip(('increment', 'turn', 'turn_times_scale'), means))


@averaged
def radial_clamp(model, idx, targets):
    """Cross-entropy that each exit loses when every loop leaves each token at its norm after loop 1."""
    h_0 = model.embed(idx)
    clamped = [model.step(h_0, h_0, 1)]
    for k in range(2, model.cfg.loops + 1):
        direction = F.normalize(model.step(clamped[-1], h_0, k), dim=-1)
        clamped.append(direction * clamped[0].norm(dim=-1, keepdim=True))
    return dict(lost=exit_ce(model, clamped, targets) - exit_ce(model, model.states(idx), targets))


@torch.no_grad()
def token_norms(model, batches):
    """How the norm of h_K is spread over tokens: its quantiles, from the least to the greatest."""
    norms = torch.cat([model.states(idx)[-1].float().norm(dim=-1).flatten() for idx, _ in batches])
    share = torch.linspace(0, 1, 101)
    at = (share * (len(norms) - 1)).round().long()
    return dict(share=share.tolist(), norm=norms.cpu().sort().values[at].tolist())


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Confidence of each sequence: top logit minus the second, mean over positions. (B, T, V) -> (B,)"""
    return -logits.float().topk(2).values.diff(dim=-1).mean((1, 2))


def leave_at(margins: torch.Tensor, threshold: float) -> torch.Tensor:
    """Index of the first depth at which each sequence's margin passes, or of the last. (K, N) -> (N,)"""
    passed = margins > threshold
    passed[-1] = True
    return passed.int().argmax(0)


def calibrate(margins: torch.Tensor, ce: torch.Tensor) -> float:
    """The least threshold, so the earliest leave, with perplexity within 1% of depth K. (K, N), (K, N)"""
    for threshold in [-1.0, *margins.flatten().unique().tolist(), math.inf]:  # all pass -1, and none infinity
        if ce.gather(0, leave_at(margins, threshold)[None]).mean() <= ce[-1].mean() + math.log(1.01):
            break
    return threshold


def halt(model: LoopedGPT, idx: torch.Tensor, threshold: float) -> torch.Tensor:
    """Let each sequence leave the batch at the first loop whose margin passes: how many each ran. (B,)"""
    inside, loops = torch.arange(len(idx), device=idx.device), torch.zeros(len(idx), device=idx.device)
    h = h_0 = model.embed(idx)
    for k in range(1, model.cfg.loops + 1):
        h = model.step(h, h_0, k)
        loops[inside] = k
        stays = ~(margin(model.readout(h)) > threshold)
        inside, h, h_0 = inside[stays], h[stays], h_0[stays]
        if not len(inside):
            break
    return loops


@torch.no_grad()
def exits(model, batches):
    """Perplexity and tokens per second at depth k, model(idx, loops=k), and with confidence halting. Its
    threshold and the best depth are chosen on every other batch; all results are of the others."""
    def speed(run):  # tokens per second; what run returns is read at once, so that the device is waited for
        start = time.perf_counter()
        for idx, _ in batches[1::2]:
            run(idx).tolist()
        return len(batches[1::2]) * idx.numel() / (time.perf_counter() - start)
    rows = []
    for idx, targets in batches:
        states = model.states(idx)
        ce = torch.stack([model.cross_entropy(model.expose(h), targets).mean(-1) for h in states])
        rows.append(torch.stack((torch.stack([margin(model.readout(h)) for h in states]), ce)).cpu())
    margins, ce = torch.cat(rows[::2], dim=2)  # each (K, sequences)
    threshold, best = calibrate(margins, ce), ce.mean(1).argmin().item()
    margins, ce = torch.cat(rows[1::2], dim=2)
    leaves, perplexity = leave_at(margins, threshold), ce.mean(1).exp().tolist()
    speeds = [speed(lambda idx: model(idx, loops=k).norms) for k in range(1, model.cfg.loops + 1)]
    halting = dict(loops=(leaves + 1).float().mean().item(), threshold=threshold,
                   perplexity=ce.gather(0, leaves[None]).mean().exp().item(),
                   speedup=speed(lambda idx: halt(model, idx, threshold)) / speeds[-1])
    best_depth = dict(loops=best + 1, perplexity=perplexity[best], speedup=speeds[best] / speeds[-1])
    return dict(perplexity=perplexity, tokens_per_second=speeds, best_depth=best_depth, halting=halting)


# ------------------------------------------------------------------------------------------------------------
# The panels. Drawing takes lines, [(style, the results of a condition's runs)]; a result has panel: measured


def draw_curves(ax, panel, lines, key, x='loop', xlabel='loop (large: K)', floor=None, crop=False, **labels):
    """One curve per condition: the mean over its runs where all have a point, and their range as a band.
    floor: a value, and what to say of the grey zone below it; crop: keep all in view where one explodes."""
    lows = []
    for i, (style, runs) in enumerate(lines):
        points = [dict(zip(r[panel].get(x) or range(1, 100_000), r[panel][key])) for r in runs]
        at = sorted(set.intersection(*map(set, points)))
        y = torch.tensor([[p[v] for v in at] for p in points], dtype=torch.float64)
        y[~y.isfinite()] = math.nan  # a gap
        if floor:
            y = y.clamp(min=floor[0] * 0.5 * 0.8 ** i)  # side by side, so that none hides another
        lows += [y[~y.isnan()].min().item()] if y.isfinite().any() else []
        mean, look = y.mean(0), dict(style, markevery=max(1, len(at) // 8))
        K = runs[0]['config']['loops'] if x == 'loop' else len(at)
        ax.plot(at[:K], mean[:K], **look)
        if x == 'loop':
            ax.plot(at[K - 1:], mean[K - 1:], alpha=0.45, **look)
            ax.plot(at[K - 1:K], mean[K - 1:K], style['marker'] or 'o', color=style['color'], markersize=8)
        if len(runs) > 1:
            ax.fill_between(at, y.amin(0), y.amax(0), color=style['color'], alpha=0.18, linewidth=0)
        for star in [r[panel]['halting'] for r in runs if 'halting' in r[panel]]:
            ax.plot(star['loops'], star['perplexity'], '*', color=style['color'], mec='black', markersize=13)
    ax.set(xlabel=xlabel, **labels)
    if floor:
        ax.axhspan(floor[0] * 0.5 * 0.8 ** len(lines), floor[0], color='grey', alpha=0.15, linewidth=0)
        ax.text(0.98, floor[0], floor[1], transform=ax.get_yaxis_transform(), ha='right', va='top', c='grey')
        ax.set_ylim(top=max(ax.get_ylim()[1], 1000 * floor[0]))
    if crop and lows:
        ax.set_ylim(min(lows) - 0.1, min(ax.get_ylim()[1] + 0.1, max(min(lows) + 2.5, max(lows) + 0.5)))


def draw_rays(ax, panel, lines, _):
    """A strip for each condition, in its own unit: the states of the tokens of its first run."""
    ax.set_axis_off()
    for i, (style, runs) in enumerate(lines):
        x, y = (torch.tensor(runs[0][panel][key]) for key in ('along', 'across'))  # (tokens, 32)
        look, K = dict(color=style['color'], clip_on=False), runs[0]['config']['loops']
        strip = ax.inset_axes((0, 1 - (i + 0.86) / len(lines), 1, 0.66 / len(lines)))
        strip.plot(torch.stack((0 * x[:, 0], x[:, 0])), [0, 0], linewidth=2, **look)
        strip.plot(x.T, y.T, '.-', linewidth=1, markersize=4, **look)
        strip.plot(x[:, K - 1:K], y[:, K - 1:K], 'o', markersize=7, **look)
        norm, quarter = torch.hypot(x, y).nanmedian(0).values, torch.linspace(0, math.pi / 2, 50)
        strip.plot(norm[0] * quarter.cos(), norm[0] * quarter.sin(), ':', color='grey')
        far, high = (max([1e-9, *v[v.isfinite()].tolist()]) for v in (x, y))
        back = min([0.0, *x[x.isfinite()].tolist()])  # where a state has turned by more than 90 degrees
        strip.set(xlim=(back, far), ylim=(0, max(high, far / 6)), aspect='equal', anchor='W')
        strip.locator_params(axis='y', nbins=3)
        turned, name = torch.atan2(y, x)[:, -1].nanmedian().rad2deg(), style['label']
        name = name if len(name) < 36 else name[:35] + '…'
        norms = ', '.join(f'|h_{k}| {norm[k - 1]:.3g}' for k in sorted({1, min(K, 32), 32}))
        strip.set_title(f'{name}: {norms}, turned {turned:.0f}°', loc='left', fontsize=10,
                        color=style['color'])
    ax.text(0.5, -0.08, 'h_1 … h_32, along h_1 and across it (large: K)', ha='center')


LOG, SMALL = dict(yscale='log'), dict(yscale='log', floor=(1e-3, 'below 0.001'))
ROWS = [  # one curve per condition: panel, what to measure, key, title, ylabel, and how draw_curves shows it
    ('training', None, 'norm', 'How does the norm change in training?', 'norm at K',
     dict(x='iter', xlabel='iteration', yscale='log')),
    ('scale_sensitivity', scale_sensitivity, 'ce', 'Does the loss see the norm?', 'cross-entropy (nats)',
     dict(x='factor', xlabel='factor on the last state', xscale='log', crop=True)),
    ('radial_gradient', radial_gradient, 'share', 'Does the gradient act on the norm?',
     '|cosine| of dCE/dh and h', dict(yscale='log', floor=(1e-4, 'below 1e-4: rounding'))),
    ('states', rays, '', 'Do loops lengthen a state, or turn it?', '', {}),  # drawn by draw_rays
    ('depth', depth, 'norm', 'How does the norm change from loop to loop?', 'norm of the state', LOG),
    ('depth', depth, 'ce', 'How good is each exit?', 'cross-entropy (nats)', dict(crop=True)),
    ('common', common, 'share', 'How much of a state do all tokens share?', 'share of the squared norm', {}),
    ('common', common, 'growth', 'How large is a state against h_0?', 'norm over that of h_0', LOG),
    ('residual_expansion', residual_expansion, 'increment', 'How much norm does a loop add?',
     'growth of the norm', dict(yscale='symlog')),
    ('residual_expansion', residual_expansion, 'turn', 'How far does a loop turn a state?', 'turn', SMALL),
    ('radial_clamp', radial_clamp, 'lost', 'What if loops may not change the norm?', 'CE lost (nats)', SMALL),
    ('token_norms', token_norms, 'norm', 'Is the norm that of all tokens, or of a few?', 'norm at K',
     dict(x='share', xlabel='share of tokens with at most this norm', yscale='log')),
    ('exits', exits, 'perplexity', 'How good is it to stop early?', 'perplexity',
     dict(xlabel='loops per sequence (star: confidence halting)', crop=True)),
]
PANELS = {panel: diagnostic for panel, diagnostic, *_ in ROWS}

COLORS = {'rms': '#D55E00', 'rms + penalty': '#009E73', 'raw': '#0072B2', 'cut': '#000000',
          'layernorm': '#CC79A7', 'final_rms': '#E69F00', 'alpha': '#56B4E9'}  # Okabe and Ito's
DASHES = {'residual per_loop': '-', 'residual terminal': '--', 'rms per_loop': ':', 'damped per_loop': '-.'}
MARKERS = 's^vD<>pPXdhH'


def styles(groups: dict[str, list[dict]]) -> list[tuple]:
    """[(how a condition is drawn, its runs)]: colour for readout and penalty, dashes for recurrence and
    supervision, a marker for the rest; the same in every figure, unless two of one figure would coincide."""
    looks = {}
    for label in sorted(groups):
        config, flags = groups[label][0]['config'], groups[label][0]['flags']
        color = config['readout'] + (' + penalty' if config['norm_penalty'] else '')
        dash = f'{config["recurrence"]} {config["supervision"]}'
        shown = ['readout', 'recurrence', 'supervision'] if dash in DASHES else ['readout']
        rest = [flag for flag in flags.items() if flag[0] not in shown and flag != ('norm_penalty', 0.01)]
        other = matplotlib.colormaps['tab20b'](zlib.crc32(color.encode()) % 20)
        look = dict(color=COLORS.get(color, other), linewidth=2.2,
                    linestyle=DASHES.get(dash, (0, (6, 2, 1, 2, 1, 2))),
                    marker=MARKERS[zlib.crc32(str(rest).encode()) % len(MARKERS)] if rest else '')
        while look in looks.values():
            following = MARKERS[(MARKERS.find(look['marker'] or '?') + 1) % len(MARKERS)]
            look.update(marker=following, linewidth=look['linewidth'] * 0.9)
        looks[label] = look
    return [(dict(looks[label], label=label), runs) for label, runs in groups.items()]


def draw(groups: dict[str, list[dict]], panels: list[str], out: Path):
    """One figure of the chosen panels."""
    lines = styles(groups)
    pairs = [lines[i:i + 2] for i in range(0, len(lines), 2)]
    cells = [(row, some) for panel in panels for row in ROWS if row[0] == panel
             for some in (pairs if panel == 'states' else [lines])]
    columns = 2 if len(cells) in (2, 4) else min(3, len(cells))
    rows = math.ceil(len(cells) / columns)
    fig = matplotlib.figure.Figure(figsize=(max(8, 5.6 * columns), 4.1 * rows))
    for i, ((panel, _, key, title, ylabel, options), some) in enumerate(cells, 1):
        ax = fig.add_subplot(rows, columns, i, title=title, ylabel=ylabel)
        (draw_rays if panel == 'states' else draw_curves)(ax, panel, some, key, **options)
    fig.tight_layout(h_pad=2)
    handles = [matplotlib.lines.Line2D([], [], **style) for style, _ in lines]
    fig.legend(handles=handles, loc='upper center', bbox_to_anchor=(0.5, 0), ncols=2, frameon=False)
    with writing(out) as f:
        fig.savefig(f, format=out.name[-3:], dpi=110, bbox_inches='tight')


def cell(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    t = torch.tensor(values, dtype=torch.float64)
    return f'{t.mean():.{digits}f}' + (f' ± {t.std():.{digits}f}' if len(t) > 1 else '')


def animate(groups: dict[str, list[dict]], out: Path):
    """The first 120 iterations in the logs as a moving picture: the norm at every loop."""
    points, frames = [x for runs in groups.values() for r in runs for x in r['log']], []
    iterations = sorted({x['iter'] for x in points})[:120]
    norms = [n for x in points if x['iter'] <= iterations[-1] for n in x['norms'] if 0 < n < math.inf] or [1]
    for it in iterations:
        fig, handles = matplotlib.figure.Figure(figsize=(8, 4.2)), []
        ax = fig.add_axes((0.1, 0.15, 0.48, 0.74), title=f'iteration {it}', ylabel='norm of the state')
        for style, runs in styles(groups):
            now = [[x for x in r['log'] if x['iter'] <= it or x is r['log'][0]][-1] for r in runs]
            draw_curves(ax, 'frame', [(style, [dict(r, frame=x) for r, x in zip(runs, now)])], 'norms',
                        yscale='log', ylim=(0.7 * min(norms), 1.4 * max(norms)))
            words = style['label'].replace(', ', '\n') + f'\nnorm {cell([x["norms"][-1] for x in now], 1)}'
            words += f', loss {cell([x["loss"] for x in now], 2)}' if 'loss' in now[0] else ''
            handles.append(matplotlib.lines.Line2D([], [], **dict(style, label=words)))
        ax.legend(handles=handles, loc='center left', bbox_to_anchor=(1, 0.5), frameon=False,
                  fontsize=min(12, 70 / len(handles)))
        fig.savefig(buffer := BytesIO(), dpi=100)
        image, first = Image.open(buffer).convert('RGB'), (frames or [None])[0]  # whose palette is for all
        frames.append(image.quantize(64, Image.Quantize.MAXCOVERAGE, palette=first, dither=Image.Dither.NONE))
    ms = [60 + 600 * (b - a) // b for a, b in zip(iterations, iterations[1:])]  # the first are the slowest
    with writing(out) as f:
        frames[0].save(f, 'GIF', save_all=True, append_images=frames[1:], duration=ms + [3000], loop=0)


@dataclass
class PlotConfig:
    out: str = flag('blind_spot.png', 'the figure, its numbers beside it as .json; or a moving picture, .gif')
    panels: str = flag('training,scale_sensitivity,radial_gradient,states', f'all, or of\n{",".join(PANELS)}')
    eval_iters: int = flag(50, 'batches of validation text', low=2, high=10_000)
    device: str = flag('auto', 'auto is cuda, then mps, then cpu')

    def __post_init__(self):
        validate(self)
        self.panels = ','.join(PANELS) if self.panels == 'all' else self.panels
        if self.out[-4:] not in ('.png', '.pdf', '.svg', '.gif') or not Path(self.out).parent.is_dir():
            raise ValueError(f'out must end in .png, .pdf, .svg or .gif, in some folder, got {self.out!r}')
        if unknown := set(self.panels.split(',')) - set(PANELS):
            raise ValueError(f'panels must be all, or of {", ".join(PANELS)}, got {unknown.pop()!r}')


def describe(cfg: TrainConfig, iteration: int, log: list[dict]) -> dict:
    """What flags and log say of a run. Its label is its condition: the paper's words, then every
    flag that changes the result and is not at its default, but the seed. UserError: no evaluation yet."""
    flags = {k: v for k, v in result_flags(cfg).items() if k != 'seed'}
    flags |= {'changed at': x['iter'] for x in log if set(x.get('changed', ())) - {'max_iters'}}
    flags |= {'stopped at': iteration} if iteration < cfg.max_iters else {}
    readout = dict(alpha=f'alpha {cfg.alpha:.12g}', final_rms='final-only rms').get(cfg.readout, cfg.readout)
    label = f'{cfg.supervision.replace("_", "-")} + {readout}'
    label += f' + penalty {cfg.norm_penalty:.12g}' if cfg.norm_penalty else ''
    label += f', {cfg.recurrence} recurrence' if cfg.recurrence != 'residual' else ''
    said = {'readout', 'recurrence', 'supervision', 'norm_penalty', 'alpha' if cfg.readout == 'alpha' else ''}
    for name in [name for name in flags if name not in said]:
        value = f'{flags[name]:.12g}' if isinstance(flags[name], float) else flags[name]
        label += f', {dict(learning_rate="lr", loops="K =").get(name, name)} {value}'
    points = [x for x in log if x.get('norms') and ('loss' in x or x['iter'] == 0)]
    training = dict(iter=[x['iter'] for x in points], norm=[x['norms'][-1] for x in points])
    evaluations = [x for x in log if x.get('norms') and x.get('val_losses')]
    if not evaluations:
        raise UserError('nothing is evaluated in its log yet')
    return dict(label=label, seed=cfg.seed, flags=flags, config=asdict(cfg), evaluation=evaluations[-1],
                training=training, log=points)


def measure(path: Path, cfg: PlotConfig) -> dict:
    """All that is shown of a run. UserError or OSError: it is too young, damaged or foreign."""
    log = read_log(path / 'log.jsonl')
    if cfg.out[-4:] == '.gif':
        try:
            return describe(TrainConfig(**log[0]), log[-1]['iter'], log)
        except (TypeError, ValueError, LookupError) as e:
            raise UserError(f'{path / "log.jsonl"} has other flags than this train.py ({e})') from e
    model, run, state = load_checkpoint(path / 'ckpt.pt')
    result = describe(run, state['iter'], log)
    device = pick_device(cfg.device, run.n_embd)
    tokens, _ = load_tokens(run, state['corpus'])
    batches = list(eval_batches(tokens['val'], run, cfg.eval_iters, device))
    return result | {p: PANELS[p](model.to(device), batches) for p in cfg.panels.split(',') if PANELS[p]}


def tables(groups: dict[str, list[dict]], panels: list[str]) -> str:
    """Markdown, one row per condition: norm and cross-entropy at the exits, and what the exits are worth."""
    rows = ['Of the last evaluation in each log; mean ± standard deviation over seeds:\n',
            '| condition | seeds | norm at K | CE at exit 1 | at K/2 | at K |', '|---' * 6 + '|']
    worth = ['\n| condition | perplexity at depth 1 | at K/2 | at K | best depth | perplexity | speed over K '
             '| loops with halting | perplexity | speed over K |', '|---' * 10 + '|']
    for label, runs in groups.items():
        K, last = runs[0]['config']['loops'], [r['evaluation'] for r in runs]
        at = 1, max(1, K // 2), K
        cells = [cell([x['norms'][-1] for x in last], 1)]
        cells += [cell([x['val_losses'][k - 1] for x in last], 3) for k in at]
        rows.append(f'| {label} | {len(runs)} | {" | ".join(cells)} |')
        if 'exits' in panels:
            e = [r['exits'] for r in runs]
            cells = [cell([x['perplexity'][k - 1] for x in e], 2) for k in at]
            for way in 'best_depth', 'halting':
                cells += [cell([x[way][key] for x in e], 2) for key in ('loops', 'perplexity', 'speedup')]
            worth.append(f'| {label} | {" | ".join(cells)} |')
    return '\n'.join(rows + (worth if 'exits' in panels else []))


@one_line_errors
def main(argv=None):
    parser = FlagParser(PlotConfig, __doc__)
    parser.add_argument('runs', nargs='*', help='folders of runs (default: all under out/)')
    cfg, given = parser.parse(argv)
    out, start = Path(cfg.out), time.time()
    pick_device(cfg.device)  # a mistake in it ends here, and not once per run
    paths = [Path(p) for p in given['runs']] or sorted(p.parent for p in Path('out').glob('*/log.jsonl'))
    groups, doing = {}, 'reading its log' if cfg.out[-4:] == '.gif' else f'measuring {cfg.panels}'
    for i, path in enumerate(paths, 1):
        print(f'[{i}/{len(paths)}] {path}: {doing}', file=sys.stderr)
        try:
            result = measure(path, cfg)
            group = groups.setdefault(result['label'], [])
            if result['seed'] in [r['seed'] for r in group]:
                raise UserError('it is another copy of a run that is drawn')
            group.append(dict(result, path=str(path)))
        except (UserError, OSError, MemoryError) as e:
            print(f'{path}: left out,', *str(e).split(), file=sys.stderr)
    if not groups:
        raise UserError('none of these runs could be measured' if paths else
                        'no runs under out/: train some first, such as python train.py --readout=rms')
    print(tables(groups, cfg.panels.split(',')))
    if cfg.out[-4:] == '.gif':
        animate(groups, out)
    else:
        draw(groups, cfg.panels.split(','), out)
        with writing(out.with_suffix('.json'), 'w') as f:  # which holds no NaN and no Infinity
            json.dump(json.loads(json.dumps(groups), parse_constant=lambda _: None), f, indent=1)
    print(f'{out} is drawn, in {time.time() - start:.0f} s', file=sys.stderr)


if __name__ == '__main__':
    main()
