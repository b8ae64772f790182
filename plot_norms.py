"""
See the blind spot: measure trained runs, print a table, draw one figure.

    python plot_norms.py out/A out/B …        (no run: every run under out/)

Runs that differ in nothing but the seed are one condition: their mean is drawn, and their range as a band.
All numbers come from log.jsonl and ckpt.pt and validation text; they go beside the figure as JSON.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

from data.prepare import UserError
from looped import LoopedGPT, flag, validate
from train import FlagParser, TrainConfig, eval_batches, load_checkpoint, load_tokens, pick_device, read_log

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# The diagnostics: functions of a model and of batches [(idx, targets)], over states, carry and readout


def length(h: torch.Tensor) -> torch.Tensor:
    """L2 norm of each token's state. (B, T, C) -> (B, T)"""
    return torch.linalg.vector_norm(h, dim=-1, dtype=torch.float32)


def token_ce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token. (B, T, V), (B, T) -> (B, T)"""
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction='none')


def mean_over(batches, measure) -> list:
    """measure(idx, targets) -> tensor, averaged over batches (all of one size), as nested lists."""
    return torch.stack([measure(idx, targets) for idx, targets in batches]).mean(0).tolist()


@torch.no_grad()
def depth(model: LoopedGPT, batches) -> dict:
    """Norm and cross-entropy at each loop, to four times the trained depth K. The exits before K are read as
    they were trained; those from K on as the last one was."""
    def measure(idx, targets):
        rows = []
        for k, h in enumerate(model.states(idx, 4 * model.cfg.loops), 1):
            logits = model.readout(h, final=k >= model.cfg.loops)
            rows.append(torch.stack((length(h).mean(), token_ce(logits, targets).mean())))
        return torch.stack(rows, dim=1)
    norm, ce = mean_over(batches, measure)
    return dict(norm=norm, ce=ce)


@torch.no_grad()
def scale_sensitivity(model: LoopedGPT, batches) -> dict:
    """Cross-entropy after the last state is multiplied by a factor: flat where the readout is blind to it."""
    factors = torch.logspace(-1, 1, 21).tolist()

    def measure(idx, targets):
        h = model.states(idx)[-1]
        return torch.stack([token_ce(model.readout(a * h), targets).mean() for a in factors])
    return dict(factor=factors, ce=mean_over(batches, measure))


def radial_gradient(model: LoopedGPT, batches) -> dict:
    """|<dCE_k/dh_k, h_k>| / (|dCE_k/dh_k| |h_k|) at each loop, mean over tokens: 0 where exit k is blind."""
    def measure(idx, targets):
        with torch.no_grad():
            states = model.states(idx)
        shares = []
        for k, h in enumerate(states, 1):
            h.requires_grad_()
            grad, = torch.autograd.grad(token_ce(model.readout(h, k == len(states)), targets).sum(), h)
            shares.append(F.cosine_similarity(grad, h, dim=-1, eps=1e-20).abs().mean())
        return torch.stack(shares)
    return dict(share=mean_over(batches, measure))


@torch.no_grad()
def residual_expansion(model: LoopedGPT, batches) -> dict:
    """With h_k = s_k·u_k and |u_k| = 1, over 30 loops: s_{k+1} - s_k, the turn |u_{k+1} - u_k|, turn · s_k;
    and how long what a loop adds is, against what it was fed."""
    def measure(idx, _):
        states, rows = model.states(idx, 30), []
        for before, after in zip(states, states[1:]):
            s, fed = length(before), model.carry(before)
            turn = length(F.normalize(after, dim=-1) - F.normalize(before, dim=-1))
            added = length(after - fed) / length(fed)
            rows.append(torch.stack([x.mean() for x in (length(after) - s, turn, turn * s, added)]))
        return torch.stack(rows, dim=1)
    return dict(zip(('increment', 'turn', 'turn_times_scale', 'added_to_fed'), mean_over(batches, measure)))


@torch.no_grad()
def radial_clamp(model: LoopedGPT, batches) -> dict:
    """Cross-entropy and norm at K when, after each loop from the second on, nothing is changed (none); each
    token is rescaled to its norm after loop 1 (frozen); the update's radial part is taken out (tangent)."""
    def frozen(h, fed, first):
        return F.normalize(h, dim=-1) * length(first).unsqueeze(-1)

    def tangent(h, fed, first):
        u = F.normalize(fed, dim=-1)
        return h - ((h - fed) * u).sum(-1, keepdim=True) * u
    clamps = dict(none=lambda h, fed, first: h, frozen=frozen, tangent=tangent)

    def measure(idx, targets):
        rows = []
        for clamp in clamps.values():
            h = first = model.states(idx, 1)[0]
            for _ in range(1, model.cfg.loops):
                fed = model.carry(h)
                h = clamp(model.loop(fed), fed, first)
            rows.append(torch.stack((token_ce(model.readout(h), targets).mean(), length(h).mean())))
        return torch.stack(rows)
    return {name: dict(ce=ce, norm=norm) for name, (ce, norm) in zip(clamps, mean_over(batches, measure))}


@torch.no_grad()
def token_norms(model: LoopedGPT, batches) -> dict:
    """How the norm of h_K is spread over tokens."""
    norms = torch.cat([length(model.states(idx)[-1]).flatten() for idx, _ in batches]).sort().values
    p99 = norms[math.ceil(0.99 * len(norms)) - 1]  # torch.quantile takes no more than 2^24 numbers
    return {k: v.item() for k, v in dict(mean=norms.mean(), median=norms.median(), p99=p99, max=norms[-1],
                                         std=norms.std()).items()}


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Confidence of each sequence: top logit minus the second, mean over positions. (B, T, V) -> (B,)"""
    top = logits.float().topk(2).values
    return (top[..., 0] - top[..., 1]).mean(-1)


def leave_at(margins: torch.Tensor, threshold: float) -> torch.Tensor:
    """Index of the first depth at which each sequence's margin passes, or of the last. (K, N) -> (N,)"""
    passed = margins > threshold
    passed[-1] = True
    return passed.int().argmax(0)


def calibrate(margins: torch.Tensor, ce: torch.Tensor) -> float:
    """The threshold at which sequences leave earliest while perplexity stays within 1% of depth K.

    margins and ce (K, N), of each sequence at each depth. The higher the threshold, the later all leave, so
    the first that fits is the best. A margin is never below 0, so all pass -1 at depth 1."""
    for threshold in [-1.0, *margins.flatten().unique().tolist()]:
        leaves = leave_at(margins, threshold)
        if ce.gather(0, leaves[None]).mean() <= ce[-1].mean() + math.log(1.01):
            return threshold
    return math.inf  # where ce is not a number


def halt(model: LoopedGPT, idx: torch.Tensor, threshold: float) -> tuple[list, torch.Tensor]:
    """Let each sequence leave the batch at the first loop whose margin passes: logits [(T, V)] and the number
    of loops (B,)."""
    inside = torch.arange(len(idx), device=idx.device)
    logits, loops = [None] * len(idx), torch.zeros(len(idx))
    h = model.states(idx, 1)[0]
    for k in range(1, model.cfg.loops + 1):
        z = model.readout(h)
        out = (margin(z) > threshold) | (k == model.cfg.loops)
        for i, row in zip(inside[out].tolist(), z[out]):
            logits[i], loops[i] = row, k
        inside, h = inside[~out], h[~out]
        if not len(inside):
            break
        h = model.loop(model.carry(h))
    return logits, loops


@torch.no_grad()
def exits(model: LoopedGPT, batches) -> dict:
    """Perplexity and tokens a second at every fixed depth and with confidence halting, its threshold
    calibrated on every other batch; all results are of the others. Depth k is model(idx, loops=k)."""
    def sequences(batches):
        rows = []
        for idx, targets in batches:
            both = []
            for h in model.states(idx):
                z = model.readout(h)
                both.append(torch.stack((margin(z), token_ce(z, targets).mean(-1))))
            rows.append(torch.stack(both, dim=1))
        return torch.cat(rows, dim=2).cpu()  # (2, K, N)

    def tokens_per_second(run):  # which gives a tensor, read at once, so that the device is waited for
        start = time.perf_counter()
        for idx, _ in test:
            run(idx).tolist()
        return len(test) * idx.numel() / (time.perf_counter() - start)
    calibration, test = batches[::2], batches[1::2]
    threshold = calibrate(*sequences(calibration))
    margins, ce = sequences(test)
    leaves = leave_at(margins, threshold)
    depths = range(1, model.cfg.loops + 1)
    return dict(depth=list(depths), perplexity=ce.mean(1).exp().tolist(),
                tokens_per_second=[tokens_per_second(lambda idx: model(idx, loops=k).norms) for k in depths],
                halting=dict(threshold=threshold, loops=(leaves + 1).float().mean().item(),
                             perplexity=ce.gather(0, leaves[None]).mean().exp().item(),
                             tokens_per_second=tokens_per_second(lambda idx: halt(model, idx, threshold)[1])))


# ------------------------------------------------------------------------------------------------------------
# The panels. Each drawing takes lines, [(style, results of the runs of a condition)], and its axes.

COLORS = ['#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']  # Okabe and Ito's
DASHES = ['-', '--', ':', '-.']


def band(ax, x, ys, style, trained=None):
    """The mean over runs, and their range; fainter beyond the first `trained` points."""
    y = torch.tensor(ys, dtype=torch.float64)
    ax.plot(x[:trained], y.mean(0)[:trained], **style)
    if trained:
        ax.plot(x[trained - 1:], y.mean(0)[trained - 1:], alpha=0.45, **style)
    if len(ys) > 1:
        ax.fill_between(x, y.amin(0), y.amax(0), color=style['color'], alpha=0.18, linewidth=0)


def limit(ax, curves):
    """Keep the lowest part of every curve in view where one explodes."""
    curves = [[x for x in c if math.isfinite(x)] or [0] for c in curves]
    low, best = min(map(min, curves)), max(map(min, curves))
    ax.set_ylim(low - 0.1, min(max(map(max, curves)) + 0.1, max(low + 2.5, best + 0.5)))


def name_rows(ax, lines):
    """Row i holds the condition's name, in its colour, above what is drawn at i + 0.1 to i + 0.7."""
    for i, (style, _) in enumerate(lines):
        ax.text(0.01, i, style['label'], color=style['color'], fontsize=10, va='center',
                transform=ax.get_yaxis_transform())
    ax.set(yticks=[], ylim=(len(lines) - 0.1, -0.4))


def draw_training(lines, ax):
    for style, runs in lines:
        logs = [dict(zip(r['training']['iter'], r['training']['norm'])) for r in runs]
        common = sorted(set.intersection(*map(set, logs)))
        band(ax, common, [[log[it] for it in common] for log in logs], style)
    ax.set(title='Training lets a hidden scale walk away', xlabel='iteration', yscale='log',
           ylabel='norm of the last state')


def draw_depth(lines, ax_norm, ax_ce):
    for ax, key in (ax_norm, 'norm'), (ax_ce, 'ce'):
        for style, runs in lines:
            K = runs[0]['config']['loops']
            band(ax, range(1, 4 * K + 1), [r['depth'][key] for r in runs], style, trained=K)
            ax.axvline(K, color='grey', linewidth=1, linestyle=':')
            ax.annotate(' beyond K', (K, 0.02), xycoords=('data', 'axes fraction'), color='grey')
        ax.set_xlabel('loop k')
    ax_norm.set(title='A scale that is carried grows with depth', ylabel='norm of the state', yscale='log')
    ax_ce.set(title='Every loop is an exit', ylabel='cross-entropy (nats)')
    limit(ax_ce, [r['depth']['ce'] for _, runs in lines for r in runs])


def draw_scale_sensitivity(lines, ax):
    for style, runs in lines:
        ys = [r['scale_sensitivity']['ce'] for r in runs]
        band(ax, runs[0]['scale_sensitivity']['factor'], ys, style)
    ax.set(title='Cross-entropy cannot see scale through RMSNorm', xlabel='factor on the last state',
           xscale='log', ylabel='cross-entropy (nats)')
    limit(ax, [r['scale_sensitivity']['ce'] for _, runs in lines for r in runs])


def draw_radial_gradient(lines, ax):
    for style, runs in lines:
        ys = [r['radial_gradient']['share'] for r in runs]
        band(ax, range(1, len(ys[0]) + 1), ys, style | dict(marker='o', markersize=4))
    ax.set(title='A blind exit sends no gradient along the state', xlabel='loop k', yscale='log',
           ylabel='radial share of dCE/dh')


def draw_residual_expansion(lines, ax_increment, ax_turn):
    for ax, key in (ax_increment, 'increment'), (ax_turn, 'turn'):
        for style, runs in lines:
            band(ax, range(1, 30), [r['residual_expansion'][key] for r in runs], style)
        ax.set_xlabel('loop k')
    ax_increment.set_yscale('symlog', linthresh=1)
    ax_increment.set(title='Residual loops add a length that settles', ylabel='growth of the norm')
    ax_turn.set(title='A large state turns less and less', ylabel='turn of the direction', yscale='log')
    ax_turn.set_ylim(bottom=max(1e-3, ax_turn.get_ylim()[0]))


def draw_radial_clamp(lines, ax):
    for i, (style, runs) in enumerate(lines):
        plain, hatched = dict(alpha=0.9), dict(alpha=0.5, hatch='///')
        for shift, clamp, look in (0.29, 'frozen', plain), (0.56, 'tangent', hatched):
            costs = [r['radial_clamp'][clamp]['ce'] - r['radial_clamp']['none']['ce'] for r in runs]
            mean = sum(costs) / len(costs)
            spread = [[mean - min(costs)], [max(costs) - mean]]
            ax.barh(i + shift, mean, 0.25, color=style['color'], xerr=spread, **look)
    ax.set_xscale('symlog', linthresh=0.01)
    ax.axvline(0, color='black', linewidth=1)
    name_rows(ax, lines)
    ax.set(title='What the radial part of a loop was doing',
           xlabel='CE lost: scale frozen (plain), radial update out (hatched)')


def draw_token_norms(lines, ax):
    for i, (style, runs) in enumerate(lines):
        mean = {k: sum(r['token_norms'][k] for r in runs) / len(runs) for k in runs[0]['token_norms']}
        ax.plot([mean['median'], mean['max']], [i + 0.4] * 2, color=style['color'], linewidth=2)
        for key, marker in ('median', 'o'), ('p99', '|'), ('max', '>'):
            ax.plot(mean[key], i + 0.4, marker=marker, markersize=9, color=style['color'])
    name_rows(ax, lines)
    ax.set(title='All tokens have moved, not a few', xscale='log',
           xlabel='norm of the last state: median (o), 99% (|), max (>)')


def draw_exits(lines, ax):
    curves = []
    for style, runs in lines:
        e = [r['exits'] for r in runs]
        curves += [x['perplexity'] for x in e]
        band(ax, e[0]['depth'], curves[-len(e):], style | dict(marker='o', markersize=4))
        for x in e:
            ax.plot(x['halting']['loops'], x['halting']['perplexity'], marker='*', markersize=13,
                    color=style['color'], markeredgecolor='black')
    low, high = min(map(min, curves)), max(map(max, curves))
    ax.set(title='Compute against perplexity', xlabel='loops a sequence (star: confidence halting)',
           ylabel='perplexity', ylim=(0.95 * low, min(1.05 * high, 3 * low)))


PANELS = {  # name: (what to measure, how to draw it, on how many axes)
    'training': (None, draw_training, 1),
    'depth': (depth, draw_depth, 2),
    'scale_sensitivity': (scale_sensitivity, draw_scale_sensitivity, 1),
    'radial_gradient': (radial_gradient, draw_radial_gradient, 1),
    'residual_expansion': (residual_expansion, draw_residual_expansion, 2),
    'radial_clamp': (radial_clamp, draw_radial_clamp, 1),
    'token_norms': (token_norms, draw_token_norms, 1),
    'exits': (exits, draw_exits, 1),
}


def draw(groups: dict[str, list[dict]], panels: list[str], out: Path):
    """One figure of the chosen panels; groups as from `conditions`."""
    count = sum(PANELS[p][2] for p in panels)
    columns = min(3, count)
    styles = [dict(color=COLORS[i % len(COLORS)], linestyle=DASHES[i // len(COLORS) % len(DASHES)],
                   linewidth=2.2, label=name) for i, name in enumerate(groups)]
    look = {'font.size': 12, 'axes.titlesize': 13, 'axes.spines.top': False, 'axes.spines.right': False}
    with plt.rc_context(look):
        fig, grid = plt.subplots(math.ceil(count / columns), columns, squeeze=False,
                                 figsize=(max(8, 5.6 * columns), 4.1 * math.ceil(count / columns)))
        free = grid.flatten().tolist()
        for panel in panels:
            _, drawing, n = PANELS[panel]
            drawing(list(zip(styles, groups.values())), *free[:n])
            free = free[n:]
        for ax in free:
            ax.set_axis_off()
        fig.tight_layout(h_pad=2)
        handles = [plt.Line2D([], [], **style) for style in styles]
        if free:
            free[0].legend(handles=handles, loc='upper left', frameon=False)
        else:
            fig.legend(handles=handles, loc='upper center', bbox_to_anchor=(0.5, 0), frameon=False,
                       ncols=max(2, columns))
        fig.savefig(out, dpi=110, bbox_inches='tight')
        plt.close(fig)


# ------------------------------------------------------------------------------------------------------------
# Runs and conditions


@dataclass
class PlotConfig:
    out: str = flag('blind_spot.png', 'the figure; its numbers go beside it as .json')
    panels: str = flag(','.join(PANELS), 'which to measure and draw, with commas between')
    eval_iters: int = flag(50, 'batches of validation text', low=2)
    device: str = flag('auto', 'auto is cuda, then mps, then cpu')

    def __post_init__(self):
        validate(self)
        if Path(self.out).suffix not in ('.png', '.pdf', '.svg'):
            raise ValueError(f'out must end in .png, .pdf or .svg, got {self.out!r}')
        for panel in self.panels.split(','):
            if panel not in PANELS:
                raise ValueError(f'panels must be of {", ".join(PANELS)}, got {panel!r}')


def measure_run(path: Path, cfg: PlotConfig, device) -> dict:
    """The flags of a run and all that --panels asks for. UserError or OSError if it cannot be measured."""
    model, run, _ = load_checkpoint(path / 'ckpt.pt')
    model.to(device)
    tokens, _ = load_tokens(run)
    batches = list(eval_batches(tokens['val'], run, cfg.eval_iters, device))
    steps = [x for x in read_log(path / 'log.jsonl') if 'loss' in x]
    training = dict(iter=[x['iter'] for x in steps], norm=[x['norms'][-1] for x in steps])
    measured = {p: PANELS[p][0](model, batches) for p in cfg.panels.split(',') if p != 'training'}
    return dict(config=asdict(run), training=training, **measured)


def conditions(results: list[dict]) -> dict[str, list[dict]]:
    """Results by condition: runs with the same flags, whatever the seed, under the paper's words for them."""
    ignored = ('seed', 'out_dir', 'resume', 'overwrite', 'eval_only', 'device', 'compile',
               'checkpoint_loops', 'eval_interval', 'eval_iters', 'log_interval')
    named = ('readout', 'alpha', 'recurrence', 'supervision', 'norm_penalty')
    flags = [{k: v for k, v in r['config'].items() if k not in ignored} for r in results]
    default = asdict(TrainConfig())
    vary = [k for k in flags[0] if k not in named and len({f[k] for f in flags}) > 1]
    groups = {}
    for f, result in zip(flags, results):
        words = dict(alpha=f'alpha {f["alpha"]:g}', final_rms='final-only rms')
        name = f'{f["supervision"].replace("_", "-")} + {words.get(f["readout"], f["readout"])}'
        name += f' + penalty {f["norm_penalty"]:g}' if f['norm_penalty'] else ''
        name += f', {f["recurrence"]} recurrence' if f['recurrence'] != 'residual' else ''
        name += ''.join(f', {dict(learning_rate="lr").get(k, k)} {f[k]}' for k in vary if f[k] != default[k])
        groups.setdefault(name, []).append(result)
    return groups


def cell(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    t = torch.tensor(values, dtype=torch.float64)
    return f'{t.mean():.{digits}f}' + (f' ± {t.std():.{digits}f}' if len(t) > 1 else '')


def tables(groups: dict[str, list[dict]], panels: list[str]) -> str:
    """Markdown, a row a condition: norm and cross-entropy at the exits, and what the exits are worth."""
    rows = ['| condition | seeds | norm at K | CE at exit 1 | at K/2 | at K |', '|---' * 6 + '|']
    worth = ['| condition | perplexity at depth 1 | at K/2 | at K | best depth | its speed | halting: loops '
             '| perplexity | speed |', '|---' * 9 + '|']  # speed: tokens a second, against depth K
    for name, runs in groups.items():
        K = runs[0]['config']['loops']
        at = (1, max(1, K // 2), K)
        if 'depth' in panels:
            cells = [cell([r['depth']['norm'][K - 1] for r in runs], 1),
                     *(cell([r['depth']['ce'][k - 1] for r in runs], 3) for k in at)]
            rows.append(f'| {name} | {len(runs)} | {" | ".join(cells)} |')
        if 'exits' in panels:
            e = [r['exits'] for r in runs]
            best = [x['perplexity'].index(min(x['perplexity'])) for x in e]
            cells = [*(cell([x['perplexity'][k - 1] for x in e], 2) for k in at),
                     ', '.join(str(k + 1) for k in sorted(set(best))),
                     cell([x['tokens_per_second'][k] / x['tokens_per_second'][-1]
                           for k, x in zip(best, e)], 2),
                     cell([x['halting']['loops'] for x in e], 2),
                     cell([x['halting']['perplexity'] for x in e], 2),
                     cell([x['halting']['tokens_per_second'] / x['tokens_per_second'][-1] for x in e], 2)]
            worth.append(f'| {name} | {" | ".join(cells)} |')
    asked = [table for panel, table in (('depth', rows), ('exits', worth)) if panel in panels]
    return '\n\n'.join('\n'.join(table) for table in asked)


def main(argv=None):
    parser = FlagParser(PlotConfig, __doc__)
    parser.add_argument('runs', nargs='*', help='folders of runs (default: all under out/)')
    cfg, given = parser.parse(argv)
    panels, out = cfg.panels.split(','), Path(cfg.out)
    try:
        device = pick_device(cfg.device)
        paths = [Path(p) for p in given['runs']] or sorted(p.parent for p in Path('out').glob('*/log.jsonl'))
        if not paths:
            raise UserError('no runs under out/: train some first, such as python train.py --readout=rms')
        runs = {}
        for i, path in enumerate(paths, 1):
            start = time.time()
            try:
                runs[str(path)] = measure_run(path, cfg, device)
                print(f'[{i}/{len(paths)}] {path}: measured in {time.time() - start:.1f} s', file=sys.stderr)
            except (UserError, OSError) as e:
                print(f'[{i}/{len(paths)}] {path}: left out, {e}', file=sys.stderr)
        if not runs:
            raise UserError('none of these runs could be measured')
        groups = conditions(list(runs.values()))
        print(tables(groups, panels))
        numbers = out.with_suffix('.json')
        numbers.write_text(json.dumps(runs, indent=1))
        draw(groups, panels, out)
        print(f'{out} and {numbers}', file=sys.stderr)
    except (UserError, OSError) as e:
        sys.exit(f'plot_norms.py: {e}')
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    main()
