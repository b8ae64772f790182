"""
See the blind spot: measure trained runs, draw one figure, print tables.

    python plot_norms.py out/A out/B ...        (no run named: every run under out/)
    python plot_norms.py --panels=all           (without it: the argument in four panels)

Runs that differ in nothing but the seed are one condition: the figure has their mean, and their range as a
band. All numbers come from checkpoints and validation text; they go beside the figure as JSON.
"""

import json
import math
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Callable, NamedTuple

import matplotlib.figure
import torch
import torch.nn.functional as F

from data.prepare import UserError
from looped import LoopedGPT, cross_entropy, flag, validate
from train import (TrainConfig, eval_batches, load_checkpoint, load_tokens, one_line_errors, parse_flags,
                   pick_device, result_flags, write_file)

matplotlib.rcParams.update({'font.size': 12, 'axes.titlesize': 12,
                            'axes.spines.top': False, 'axes.spines.right': False})

# ------------------------------------------------------------------------------------------------------------
# The diagnostics: functions of a model and of batches [(idx, targets)], which give {name: list}. They go
# through embed, step, states and readout alone, so a fork that edits those is measured as it was trained; and
# they hold the logits of one exit at a time (loss_gradient: after model.recompute()), so a model that could
# be trained can be measured.


def averaged(diagnostic):
    """Decorates diagnostic(model, idx, targets) -> {name: tensor}, which is written for one batch, and is
    called with a list of batches: diagnostic(model, batches) -> {name: list}, the means over them."""
    @torch.no_grad()
    def over_batches(model: LoopedGPT, batches: list) -> dict:
        results = [diagnostic(model, idx, targets) for idx, targets in batches]
        return {name: torch.stack([r[name] for r in results]).mean(0).tolist() for name in results[0]}
    return over_batches


def exit_losses(model: LoopedGPT, states: list, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy at exits 1, 2, ... as they were trained. K states (B, T, C) -> (K,)"""
    return torch.stack([model.exit_ce(h, targets, k).mean() for k, h in enumerate(states, 1)])


def exit_gradient(model: LoopedGPT, h: torch.Tensor, k: int, targets: torch.Tensor) -> torch.Tensor:
    """dCE_k/dh_k of each token's own cross-entropy at exit k. (B, T, C) -> (B, T, C)"""
    h = h.detach().requires_grad_()
    with torch.enable_grad():
        loss = model.exit_ce(h, targets, k).sum()
    return torch.autograd.grad(loss, h)[0]


def mean_norms(states: list) -> torch.Tensor:
    return torch.stack([h.float().norm(dim=-1).mean() for h in states])


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(a, b, dim=-1, eps=1e-20)  # gradients are small


@averaged
def depth(model, idx, targets):
    """Norm and cross-entropy at each loop, to four times the trained depth K."""
    states = model.states(idx, 4 * model.cfg.loops)
    return dict(norm=mean_norms(states), ce=exit_losses(model, states, targets))


@averaged
def scale_sensitivity(model, idx, targets):
    """Cross-entropy after the last state is multiplied by a factor: flat where the readout hides the norm."""
    h = model.states(idx)[-1]
    factors = torch.logspace(-1, 1, 21)
    losses = [model.exit_ce(a * h, targets, None).mean() for a in factors.tolist()]
    return dict(factor=factors, ce=torch.stack(losses))


@averaged
def radial_gradient(model, idx, targets):
    """r_k = |<g, h_k>| / (|g| |h_k|) with g = dCE_k/dh_k, 0 where exit k hides the norm; and, with its sign,
    the slope dCE_k / d log|h_k| = <g, h_k>. Means over tokens."""
    shares, slopes = [], []
    for k, h in enumerate(model.states(idx), 1):
        g = exit_gradient(model, h, k, targets)
        shares.append(cosine(g, h).abs().mean())
        slopes.append((g * h).sum(-1).mean())
    return dict(share=torch.stack(shares), slope=torch.stack(slopes))


@averaged
def loss_gradient(model, idx, targets):
    """|cos| and cos of h_k and the gradient that the WHOLE loss sends to it, as it is trained: every exit
    with its weight, the later ones through the loops between, and the norm penalty. Beside them |cos| of exit
    k's own loss, and the shape of the paper's bound on what later exits send: C·t/s_k, where t = K - k loops
    follow and s_k is the mean norm, with the C that makes it meet the curve at k = 1."""
    with torch.enable_grad():
        states = model.states(idx)
        model.states = lambda *_: states  # forward starts from these very tensors
        loss = model(idx, targets).loss
        del model.states  # the method again
    gradients = torch.autograd.grad(loss, states)  # in eval mode each exit is in the loss, if with weight 0
    whole, signed, own = [], [], []
    for k, (h, g) in enumerate(zip(states, gradients), 1):
        whole.append(cosine(g, h).abs().mean())
        signed.append(cosine(g, h).mean())
        own.append(cosine(exit_gradient(model, h, k, targets), h).abs().mean())
    bound = torch.arange(model.cfg.loops - 1, -1, -1, device=idx.device) / mean_norms(states)
    bound = bound * whole[0] / bound[0]
    return dict(whole=torch.stack(whole), signed=torch.stack(signed), own=torch.stack(own), bound=bound)


@averaged
def residual_expansion(model, idx, _):
    """Over 30 loops, with h_k = s_k·u_k and |u_k| = 1: s_{k+1} - s_k, and the turn |u_{k+1} - u_k| times the
    scale s_k. And the update h_{k+1} - h_k from h_10 on, in RMS over channels: a_rad (along h_k), across it,
    and whole."""
    h = torch.stack(model.states(idx, 30)).float()  # (30, B, T, C)
    s = h.norm(dim=-1)
    u = F.normalize(h, dim=-1)
    turn = u.diff(dim=0).norm(dim=-1)
    update = h.diff(dim=0)[9:]  # h_11 - h_10 .. h_30 - h_29
    u = u[9:-1]
    along = (update * u).sum(-1)
    across = (update - along[..., None] * u).norm(dim=-1)
    rms = torch.stack((along, across, update.norm(dim=-1))) / h.size(-1) ** 0.5
    return dict(increment=s.diff(dim=0).mean((1, 2)), turn_times_scale=(turn * s[:-1]).mean((1, 2)),
                update=rms.mean((1, 2, 3)))


@averaged
def radial_clamp(model, idx, targets):
    """Every loop leaves each token at its norm after loop 1, before it is decoded and carried on: at each
    exit, the change of cross-entropy, and the mean norm over the one without the clamp."""
    h_0, free = model.embed(idx), model.states(idx)
    clamped = free[:1]
    for k in range(2, model.cfg.loops + 1):
        h = model.step(clamped[-1], h_0, k)
        clamped.append(F.normalize(h, dim=-1) * free[0].norm(dim=-1, keepdim=True))
    change = exit_losses(model, clamped, targets) - exit_losses(model, free, targets)
    return dict(change=change, ratio=mean_norms(clamped) / mean_norms(free))


@torch.no_grad()
def token_norms(model, batches):
    """How the norm of h_K is spread over tokens: quantiles from the least to the greatest, and the mean."""
    norms = torch.cat([model.states(idx)[-1].float().norm(dim=-1).flatten() for idx, _ in batches])
    share = torch.linspace(0, 1, 101)
    at = (share * (len(norms) - 1)).round().long()
    return dict(share=share.tolist(), norm=norms.cpu().sort().values[at].tolist(), mean=[norms.mean().item()])


# Early exits with confidence halting: a sequence leaves at the first exit that is sure enough


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Confidence of each sequence: top logit minus the second, mean over positions. (B, T, V) -> (B,)"""
    top = logits.float().topk(2).values
    return (top[..., 0] - top[..., 1]).mean(1)


def confidence(model: LoopedGPT, batches: list) -> torch.Tensor:
    """Margin and cross-entropy of each of N sequences at each exit. -> (2, K, N)"""
    results = []
    for idx, targets in batches:
        per_exit = []
        for k, h in enumerate(model.states(idx), 1):
            logits = model.readout(h, k)
            per_exit.append(torch.stack((margin(logits), cross_entropy(logits, targets).mean(-1))))
        results.append(torch.stack(per_exit, dim=1))  # (2, K, B)
    return torch.cat(results, dim=2)


def leave(margins: torch.Tensor, ce: torch.Tensor, threshold: float) -> tuple:
    """Each sequence leaves at the first exit whose margin passes, or at the last: mean loops, and mean
    cross-entropy. (K, N), (K, N)"""
    passed = margins > threshold
    passed[-1] = True
    first = passed.int().argmax(0, keepdim=True)
    return first.float().mean() + 1, ce.gather(0, first).mean()


def calibrate(margins: torch.Tensor, ce: torch.Tensor) -> float:
    """The least threshold, so the earliest leave, with perplexity within 1% of exit K's. (K, N), (K, N)"""
    # at -1 all leave at exit 1; at the greatest margin all stay to exit K
    for threshold in [-1.0, *margins.unique().tolist()]:
        if leave(margins, ce, threshold)[1] <= ce[-1].mean() + math.log(1.01):
            break
    return threshold


def seconds(model: LoopedGPT, batches: list, first: int, threshold: float) -> float:
    """Time for all batches, if exits `first` to K are read and a sequence leaves where its margin passes."""
    start = time.perf_counter()
    for idx, _ in batches:
        h = h_0 = model.embed(idx)
        for k in range(1, model.cfg.loops + 1):
            h = model.step(h, h_0, k)
            if k >= first:
                stays = ~(margin(model.readout(h, k)) > threshold)  # also where it is nan
                h, h_0 = h[stays], h_0[stays]  # a mask as index waits for the device
            if len(h) == 0:
                break
    return time.perf_counter() - start


@torch.no_grad()
def exits(model, batches):
    """Perplexity at each exit; and with halting [mean loops, perplexity, speed over that of exit K]. Its
    threshold is chosen on every other batch; all that is reported is of the rest."""
    threshold = calibrate(*confidence(model, batches[::2]))
    rest = batches[1::2]
    margins, ce = confidence(model, rest)
    loops, halted = leave(margins, ce, threshold)
    speedup = seconds(model, rest, model.cfg.loops, math.inf) / seconds(model, rest, 1, threshold)
    return dict(perplexity=ce.mean(1).exp().tolist(), halting=[loops.item(), halted.exp().item(), speedup])


# ------------------------------------------------------------------------------------------------------------
# Conditions: their names, and how they look


def describe(cfg: TrainConfig, iteration: int, log: list[dict]) -> dict:
    """Name and flags of a run that is saved at `iteration`, and what its log has. Runs that agree in both are
    one condition."""
    name = f'{cfg.supervision.replace("_", "-")} + {cfg.readout}'
    flags = []
    for key, value in result_flags(cfg).items():
        if key not in ('supervision', 'readout', 'seed'):
            flags.append(f'{key} {value}')
    if cfg.eval_iters != TrainConfig.eval_iters:  # means over other batches are not averaged with these
        flags.append(f'eval_iters {cfg.eval_iters}')
    for line in log:
        if set(line.get('changed', ())) - {'max_iters'}:  # a longer run of the same flags is no change
            flags.append(f'changed at {line["iter"]}')
    if iteration < cfg.max_iters:
        flags.append(f'stopped at {iteration}')

    evaluations = [line for line in log if 'val_losses' in line]
    if not evaluations:
        raise UserError('it was stopped before its first evaluation: --resume it')
    steps = [evaluations[0]]  # the first weights, then every step that is logged
    steps += [line for line in log if 'loss' in line]
    curve = dict(iter=[line['iter'] for line in steps], norm=[line['norms'][-1] for line in steps])
    return dict(name=name, flags=flags, seed=cfg.seed, config=asdict(cfg), training=evaluations[-1] | curve)


def conditions(results: list[dict]) -> tuple[str, dict[str, list[dict]]]:
    """The flags that all runs share, and {name and other flags: the runs of a condition}."""
    shared = [f for f in results[0]['flags'] if all(f in r['flags'] for r in results)]
    groups = {}
    for r in results:
        own = [f for f in r['flags'] if f not in shared]
        groups.setdefault(', '.join([r['name'], *own]), []).append(r)
    return ', '.join(shared), groups


# told apart by the colour-blind (Okabe and Ito)
COLORS = {'rms': '#D55E00', 'rms + penalty': '#009E73', 'raw': '#0072B2', 'final_rms': '#E69F00'}
SPARE = ['#332288', '#44AA99', '#882255', '#999933', '#AA4499', '#117733', '#88CCEE', '#DDCC77', '#CC6677',
         *matplotlib.colormaps['tab20b'].colors]


def styles(groups: dict[str, list[dict]]) -> list[tuple]:
    """[(how a condition is drawn, its runs)]. Its colour is that of readout and penalty, or a spare one where
    that is taken. Dashed: the loss is not at every exit."""
    lines = []
    for label, runs in groups.items():
        config = runs[0]['config']
        penalty = ' + penalty' if config['norm_penalty'] else ''
        color = COLORS.get(config['readout'] + penalty)
        if color is None or color in [style['color'] for style, _ in lines]:
            color = SPARE[len(lines) % len(SPARE)]
        dash = '-' if config['supervision'] == 'per_loop' else '--'
        lines.append((dict(color=color, linestyle=dash, linewidth=2.2, label=drawable(label, 46)), runs))
    return lines


def drawable(text: str, width: int) -> str:
    """`text` as matplotlib draws it literally, in lines of `width`: no $ begins a formula, and characters
    that its font lacks, such as Chinese, are written as escapes."""
    text = ''.join(c if c < '\u2e80' else ascii(c)[1:-1] for c in text)
    return textwrap.fill(text, width).replace('$', r'\$')


# ------------------------------------------------------------------------------------------------------------
# Drawing takes an axis, lines [(style, results of a condition's runs)], and a panel with one of its rows


def gather(runs: list[dict], panel: str, row: 'Row') -> tuple[list, torch.Tensor]:
    """Where all runs of a condition have a point, x (N,), and what each has there, y (runs, N)."""
    curves = []
    for r in runs:
        values = r[panel][row.key]
        x = r[panel].get(row.x, range(1, len(values) + 1))
        curves.append(dict(zip(x, values)))
    x = sorted(set.intersection(*[set(curve) for curve in curves]))
    return x, torch.tensor([[curve[at] for at in x] for curve in curves], dtype=torch.float64)


def draw_curves(ax, lines: list, panel: str, row: 'Row'):
    """One curve per condition: the mean over its runs, and their range as a band."""
    least = 1e9
    for style, runs in lines:
        x, y = gather(runs, panel, row)
        least = min(least, y.nan_to_num(1e9, 1e9).min().item())
        if row.ylim:
            y = y.clamp(*row.ylim)  # 0, which has no place on a log axis, is at its bottom
        mean = y.mean(0)
        ax.plot(x, mean, **style)
        ax.fill_between(x, y.amin(0), y.amax(0), color=style['color'], alpha=0.18, linewidth=0)
        if row.x == 'loop':
            K = runs[0]['config']['loops']
            ax.plot(x[K - 1:K], mean[K - 1:K], 'o', color=style['color'], markersize=8)
    if row.ylim:
        ax.set_ylim(row.ylim)
    if row.crop:  # what explodes leaves the others in view
        ax.set_ylim(0.97 * least, min(ax.get_ylim()[1], 2 * least))


def draw_loss_gradient(ax, lines: list, panel: str, row: 'Row'):
    """Curves of the whole loss; thin, of each exit's own loss; dotted, the bound's shape."""
    thin = [(dict(style, linewidth=1), runs) for style, runs in lines]
    draw_curves(ax, thin, panel, row._replace(key='own'))
    draw_curves(ax, lines, panel, row)
    for style, runs in lines:
        x, y = gather(runs, panel, row._replace(key='bound'))
        ax.plot(x[:-1], y.mean(0)[:-1], ':', color='black', linewidth=1.5, zorder=3)


def draw_quadrant(ax, lines: list, panel: str, row: 'Row'):
    """One point per run, of the last evaluation in its log."""
    for style, runs in lines:
        for r in runs:
            norm, losses = r['training']['norms'][-1], r['training']['val_losses']
            ax.plot(norm, losses[0] - losses[-1], 'o', color=style['color'], markersize=10, alpha=0.8)
    ax.axhline(0, color='grey', linewidth=0.8, linestyle=':')
    # so that left and low have a meaning
    ax.set_xlim(min(ax.get_xlim()[0], 1), max(ax.get_xlim()[1], 1e4))
    ax.set_ylim(min(ax.get_ylim()[0], -0.05), max(ax.get_ylim()[1], 0.3))


class Row(NamedTuple):
    """One axis of the figure: what it draws, and the words around it."""
    key: str  # of what the panel's diagnostic gives
    title: str  # a question, and how to read the answer
    ylabel: str
    draw: Callable = draw_curves
    x: str = 'loop'
    xlabel: str = 'loop k (dot: K)'
    xscale: str = 'linear'
    yscale: str = 'linear'
    ylim: tuple | None = None  # None: around the curves
    crop: bool = False  # not higher than twice the least value


class Panel(NamedTuple):
    """What is measured, its axes, and its table: [(heading, format, key, index in that list)]."""
    diagnostic: Callable | None  # None: every result has it, from the log
    rows: list[Row]
    columns: list[tuple] = []


PANELS = {
    'training': Panel(None, [
        Row('norm', 'How does the norm change in training?\n'
            'A large tick is ten times the one below. Band: all seeds.',
            'norm at K', x='iter', xlabel='iteration', yscale='log')], [
        ('norm at K', '.1f', 'norms', -1), ('CE at exit 1', '.3f', 'val_losses', 0),
        ('at K/2', '.3f', 'val_losses', 'K/2'), ('at K', '.3f', 'val_losses', -1)]),
    'quadrant': Panel(None, [
        Row('norms', 'Is the norm held, and is exit 1 of use?\nLeft: held. Low: exit 1 is as good as K.',
            'CE at exit 1 minus CE at K', draw_quadrant, xscale='log',
            xlabel='norm at K (one point per run)')]),
    'scale_sensitivity': Panel(scale_sensitivity, [
        Row('ce', 'Does the loss see the norm?\nFlat: no. A valley: yes, and it prefers one norm.',
            'cross-entropy (nats)', x='factor', xlabel='factor on the last state', xscale='log', crop=True)]),
    'token_norms': Panel(token_norms, [
        Row('norm', 'Are all states long, or a few?\nSteep at the right: a few.',
            'norm at K', x='share', xlabel='share of tokens with at most this norm', yscale='log')], [
        ('mean', '.1f', 'mean', 0), ('median', '.1f', 'norm', 50), ('p99', '.1f', 'norm', 99),
        ('max', '.1f', 'norm', 100)]),
    'radial_gradient': Panel(radial_gradient, [
        Row('share', "Does an exit's own loss act on the norm?\n0: no. What is below 1e-6 is rounding of 0.",
            'r_k = |cos| of dCE_k/dh_k and h_k', yscale='log', ylim=(1e-9, 1))], [
        ('r_1', '.1e', 'share', 0), ('r_K', '.1e', 'share', -1),
        (r'g_K = dCE_K / d log \|h_K\|', '+.1e', 'slope', -1)]),
    'depth': Panel(depth, [
        Row('norm', 'How does the norm change from loop to loop?\nRight of the dot: deeper than trained.',
            'norm of the state', yscale='log'),
        Row('ce', 'How good is each exit?\nRight of the dot: deeper than trained.',
            'cross-entropy (nats)', crop=True)]),
    'loss_gradient': Panel(loss_gradient, [
        Row('whole', 'Does the whole loss act on the norm?\nThin: exit k alone. Dotted: C·(K − k) / norm.',
            '|cos| of dL/dh_k and h_k', draw_loss_gradient, yscale='log', ylim=(1e-9, 1)),
        Row('signed', 'Which way does the whole loss act?\nNegative: descent lengthens h_k.',
            'mean cos of dL/dh_k and h_k')], [
        (r'\|cos\| at 1', '.1e', 'whole', 0), (r'\|cos\| at K/2', '.1e', 'whole', 'K/2'),
        (r'\|cos\| at K', '.1e', 'whole', -1), ('cos at 1', '+.1e', 'signed', 0),
        ('cos at K/2', '+.1e', 'signed', 'K/2'), ('cos at K', '+.1e', 'signed', -1)]),
    'radial_clamp': Panel(radial_clamp, [
        Row('change', 'What if every token stays at its norm after loop 1?\n0: exit k does as well.',
            'change of cross-entropy (nats)')], [
        ('norm at K over unclamped', '.3f', 'ratio', -1), ('change of CE at K', '+.4f', 'change', -1)]),
    'residual_expansion': Panel(residual_expansion, [
        Row('increment', 'How much norm does a loop add?\nLevel: each one adds the same.',
            'norm of h_k+1 minus that of h_k', yscale='symlog'),
        Row('turn_times_scale', 'Does a loop turn a long state less?\nLevel: yes, in proportion to 1 / norm.',
            'turn |u_k+1 - u_k| times |h_k|', yscale='log')], [
        ('a_rad (update along h_k, RMS, k from 10 on)', '.3f', 'update', 0),
        ('across', '.3f', 'update', 1), ('whole', '.3f', 'update', 2)]),
    'exits': Panel(exits, [
        Row('perplexity', 'How good is it to stop early?\nLevel: loops that change nothing.',
            'perplexity', crop=True)], [
        ('perplexity at exit 1', '.2f', 'perplexity', 0), ('at K/2', '.2f', 'perplexity', 'K/2'),
        ('at K', '.2f', 'perplexity', -1), ('loops with halting', '.2f', 'halting', 0),
        ('perplexity with halting', '.2f', 'halting', 1), ('speed over K', '.2f', 'halting', 2)]),
}

# ------------------------------------------------------------------------------------------------------------
# The figure and the tables


def draw(shared: str, groups: dict[str, list[dict]], panels: list[str], out: Path):
    """One figure of the chosen panels."""
    lines = styles(groups)
    axes = [(panel, row) for panel in panels for row in PANELS[panel].rows]
    columns = 2 if len(axes) == 4 else min(3, len(axes))  # 2 x 2, else up to three in a row
    height = math.ceil(len(axes) / columns)
    fig = matplotlib.figure.Figure(figsize=(max(8, 5.6 * columns), 4.3 * height))
    for i, (panel, row) in enumerate(axes, 1):
        ax = fig.add_subplot(height, columns, i, xscale=row.xscale, yscale=row.yscale)
        ax.set(title=row.title, xlabel=row.xlabel, ylabel=row.ylabel)
        row.draw(ax, lines, panel, row)
    fig.tight_layout(h_pad=2)
    title = drawable(f'All runs: {shared}', 50 * columns) if shared else None
    handles = [ax.plot([], [], **style)[0] for style, _ in lines]
    fig.legend(handles=handles, title=title, loc='upper center', bbox_to_anchor=(0.5, 0),
               ncols=min(2, columns), frameon=False)
    buffer = BytesIO()
    fig.savefig(buffer, format=out.suffix[1:], dpi=110, bbox_inches='tight')
    write_file(out, buffer.getvalue())


def cell(values, form: str) -> str:
    """Mean ± standard deviation over seeds."""
    t = torch.as_tensor(values, dtype=torch.float64)
    text = format(t.mean().item(), form)
    if len(t) > 1:
        text += f' ± {format(t.std().item(), form.lstrip("+"))}'
    return text


def tables(shared: str, groups: dict[str, list[dict]], panels: list[str]) -> str:
    """Markdown: a table per panel that has one, with one row per condition."""
    also = f' All runs: {shared}.' if shared else ''
    text = f'Mean ± standard deviation over seeds.{also}\n'
    for name, panel in PANELS.items():
        if not panel.columns or name not in panels:
            continue
        headings = ['condition', 'seeds', *[heading for heading, *_ in panel.columns]]
        question = panel.rows[0].title.split('\n')[0]
        text += f'\n{question}\n\n| {" | ".join(headings)} |\n{"|---" * len(headings)}|\n'
        for label, runs in groups.items():
            cells = [label, str(len(runs))]
            for _, form, key, which in panel.columns:
                lists = [r[name][key] for r in runs]
                half = max(1, len(lists[0]) // 2) - 1
                index = half if which == 'K/2' else which
                cells.append(cell([values[index] for values in lists], form))
            text += f'| {" | ".join(cells)} |\n'
    return text


# ------------------------------------------------------------------------------------------------------------


@dataclass
class PlotConfig:
    out: str = flag('blind_spot.png', 'the figure; its numbers stand beside it as .json')
    panels: str = flag('training,scale_sensitivity,radial_gradient,quadrant',
                       f'all, or of\n{",".join(PANELS)}')
    eval_iters: int = flag(50, 'batches of validation text; halting is calibrated on half of them',
                           low=2, high=10_000)
    device: str = flag('auto', 'auto is cuda, then mps, then cpu')

    def __post_init__(self):
        validate(self)
        out = Path(self.out)
        if out.suffix not in ('.png', '.pdf', '.svg') or not out.parent.is_dir():
            raise ValueError(f'out must be a .png, .pdf or .svg in a folder that exists, got {out}')
        if self.panels == 'all':
            self.panels = ','.join(PANELS)
        for panel in self.panels.split(','):
            if panel not in PANELS:
                raise ValueError(f'panels must be all, or of {", ".join(PANELS)}, got {panel!r}')


def measure(path: Path, cfg: PlotConfig) -> dict:
    """All that is shown of a run. UserError: it is damaged or foreign."""
    model, run, state = load_checkpoint(path / 'ckpt.pt')
    result = dict(describe(run, state['iter'], state['log'][1:]), path=str(path))  # its first line: the flags
    chosen = [panel for panel in cfg.panels.split(',') if PANELS[panel].diagnostic]
    if chosen:
        device = pick_device(cfg.device, run.n_embd)
        tokens, _ = load_tokens(run, state['corpus'])
        batches = list(eval_batches(tokens['val'], run, cfg.eval_iters, device))
        model.to(device)
        model.recompute()  # a gradient then needs the graph of one loop or exit at a time
    for panel in chosen:
        result[panel] = PANELS[panel].diagnostic(model, batches)
    return result


@one_line_errors
def main(argv):
    runs = dict(nargs='*', help='folders of runs (default: all under out/)')
    cfg, typed = parse_flags(PlotConfig, __doc__, argv, runs=runs)
    pick_device(cfg.device)  # a mistake in it ends here, and not once per run
    paths = [Path(p) for p in typed['runs']] or sorted(p.parent for p in Path('out').glob('*/ckpt.pt'))
    if not paths:
        raise UserError('no runs under out/: train some first, such as python train.py --readout=rms')

    results = []
    for i, path in enumerate(paths, 1):
        print(f'[{i}/{len(paths)}] {path}', file=sys.stderr)
        try:
            result = measure(path, cfg)
            if any(all(r[key] == result[key] for key in ('name', 'flags', 'seed')) for r in results):
                raise UserError('it is another copy of a run that is drawn')
            results.append(result)
        except UserError as e:
            message = ' '.join(str(e).split())  # one line
            print(f'{path}: left out, {message}', file=sys.stderr)
    if not results:
        raise UserError('none of these runs could be measured')

    out, panels = Path(cfg.out), cfg.panels.split(',')
    shared, groups = conditions(results)
    draw(shared, groups, panels, out)
    write_file(out.with_suffix('.json'), json.dumps(groups, indent=1).encode())
    print(f'{out} is drawn', file=sys.stderr)
    print(tables(shared, groups, panels), flush=True)  # last, as stdout may be closed


if __name__ == '__main__':
    main()
