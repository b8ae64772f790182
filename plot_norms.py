"""
See the blind spot: measure trained runs, print a table, draw one figure.

    python plot_norms.py out/A out/B …        (no run: every run under out/)

Runs that differ in nothing but the seed are one condition: their mean is drawn, and their range as a band. All
numbers come from log.jsonl and ckpt.pt, are measured on validation text, and are written beside the figure as JSON.
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
from train import FlagParser, TrainConfig, eval_batches, load_checkpoint, load_tokens, pick_device

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------
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
    """Norm and cross-entropy at each loop, to four times the trained depth. Exits before the last trained loop are
    read as they were trained."""
    def measure(idx, targets):
        states = model.states(idx, 4 * model.cfg.loops)
        ce = [token_ce(model.readout(h, final=k >= model.cfg.loops), targets).mean() for k, h in enumerate(states, 1)]
        return torch.stack([torch.stack([length(h).mean() for h in states]), torch.stack(ce)])
    norm, ce = mean_over(batches, measure)
    return dict(norm=norm, ce=ce)


@torch.no_grad()
def scale_sensitivity(model: LoopedGPT, batches) -> dict:
    """Cross-entropy after the last state is multiplied by a factor: flat where the readout is blind to scale."""
    factors = torch.logspace(-1, 1, 21).tolist()

    def measure(idx, targets):
        h = model.states(idx)[-1]
        return torch.stack([token_ce(model.readout(a * h), targets).mean() for a in factors])
    return dict(factor=factors, ce=mean_over(batches, measure))


def radial_gradient(model: LoopedGPT, batches) -> dict:
    """|<dCE_k/dh_k, h_k>| / (|dCE_k/dh_k| |h_k|) at each loop, mean over tokens: 0 where exit k is blind to scale."""
    def measure(idx, targets):
        with torch.no_grad():
            states = model.states(idx)
        shares = []
        for k, h in enumerate(states, 1):
            h.requires_grad_()
            grad, = torch.autograd.grad(token_ce(model.readout(h, k == len(states)), targets).sum(), h)
            shares.append(F.cosine_similarity(grad.double(), h.double(), dim=-1, eps=1e-30).abs().mean())
        return torch.stack(shares)
    return dict(share=mean_over(batches, measure))


@torch.no_grad()
def residual_expansion(model: LoopedGPT, batches) -> dict:
    """With h_k = s_k·u_k and |u_k| = 1, over 30 loops: s_{k+1} - s_k, |u_{k+1} - u_k| and that times s_k; and for
    each loop the length of what it adds to what it is fed, as a ratio."""
    def measure(idx, _):
        states, rows = model.states(idx, 30), []
        for before, after in zip(states, states[1:]):
            s, fed = length(before), model.carry(before)
            turn = length(F.normalize(after, dim=-1) - F.normalize(before, dim=-1))
            rows.append(torch.stack([x.mean() for x in (length(after) - s, turn, turn * s,
                                                        length(after - fed) / length(fed))]))
        return torch.stack(rows, dim=1)
    return dict(zip(('increment', 'turn', 'turn_times_scale', 'added_to_fed'), mean_over(batches, measure)))


@torch.no_grad()
def radial_clamp(model: LoopedGPT, batches) -> dict:
    """Cross-entropy and norm at K when, after each loop from the second on, nothing is changed; each token is
    rescaled to its norm after loop 1; or the radial part of the loop's update is taken out."""
    clamps = dict(none=lambda h, fed, first: h,
                  frozen=lambda h, fed, first: F.normalize(h, dim=-1) * length(first).unsqueeze(-1),
                  tangent=lambda h, fed, first: h - ((h - fed) * (u := F.normalize(fed, dim=-1))).sum(-1, True) * u)

    def measure(idx, targets):
        rows = []
        for clamp in clamps.values():
            h = first = model.states(idx, 1)[0]
            for _ in range(1, model.cfg.loops):
                fed = model.carry(h)
                h = clamp(model.loop(fed), fed, first)
            rows.append(torch.stack([token_ce(model.readout(h), targets).mean(), length(h).mean()]))
        return torch.stack(rows)
    return {name: dict(ce=ce, norm=norm) for name, (ce, norm) in zip(clamps, mean_over(batches, measure))}


@torch.no_grad()
def token_norms(model: LoopedGPT, batches) -> dict:
    """How the norm of h_K is spread over tokens."""
    norms = torch.cat([length(model.states(idx)[-1]).flatten() for idx, _ in batches])
    # not torch.quantile, which takes no more than 2^24 numbers
    p99 = norms.sort().values[min(len(norms) - 1, math.ceil(0.99 * len(norms)) - 1)]
    return dict(mean=norms.mean().item(), median=norms.median().item(), p99=p99.item(), max=norms.max().item(),
                std=norms.std().item())


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Confidence of each sequence: top logit minus the second, mean over positions. (B, T, V) -> (B,)"""
    top = logits.float().topk(2).values
    return (top[..., 0] - top[..., 1]).mean(-1)


def calibrate(margins: torch.Tensor, ce: torch.Tensor) -> float:
    """The threshold at which sequences leave earliest while perplexity stays within 1% of depth K.

    margins and ce (K, N): of each sequence at each depth. Every margin is a candidate; inf, which no sequence
    passes, always holds the bound."""
    best = (len(ce), math.inf)
    for threshold in [*margins.flatten().unique().tolist(), math.inf]:
        leaves = leave_at(margins, threshold)
        if ce.gather(0, leaves[None]).mean() <= ce[-1].mean() + math.log(1.01):
            best = min(best, (leaves.float().mean().item() + 1, threshold))
    return best[1]


def leave_at(margins: torch.Tensor, threshold: float) -> torch.Tensor:
    """Index of the first depth at which each sequence's margin passes, or of the last. (K, N) -> (N,)"""
    passed = margins > threshold
    passed[-1] = True
    return passed.int().argmax(0)


def halt(model: LoopedGPT, idx: torch.Tensor, threshold: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run the loops, and let each sequence leave at the first whose margin passes: the logits (T, V) and the number
    of loops (B,) of each. Sequences that have left are no longer in the batch."""
    alive, loops, logits = torch.arange(len(idx), device=idx.device), torch.zeros(len(idx)), [None] * len(idx)
    h = None
    for k in range(1, model.cfg.loops + 1):
        h = model.states(idx, 1)[0] if h is None else model.loop(model.carry(h))
        z = model.readout(h)
        out = margin(z) > threshold if k < model.cfg.loops else torch.ones(len(z), dtype=torch.bool, device=z.device)
        for i, row in zip(alive[out].tolist(), z[out]):
            logits[i], loops[i] = row, k
        alive, h = alive[~out], h[~out]
        if not len(alive):
            break
    return logits, loops


@torch.no_grad()
def exits(model: LoopedGPT, batches) -> dict:
    """Perplexity and tokens a second at every fixed depth, and with confidence halting: the threshold is calibrated
    on every other batch, all results are of the others."""
    K = model.cfg.loops

    def sequences(batches):
        rows = []
        for idx, targets in batches:
            logits = [model.readout(h) for h in model.states(idx)]
            rows.append(torch.stack([torch.stack((margin(z), token_ce(z, targets).mean(-1))) for z in logits], 1))
        return torch.cat(rows, dim=2).cpu()  # (2, K, N)

    def timed(run):
        start, tokens = time.perf_counter(), 0
        for idx, _ in test:
            run(idx)
            tokens += idx.numel()
        if idx.device.type == 'cuda':
            torch.cuda.synchronize()
        return tokens / (time.perf_counter() - start)
    calibration, test = batches[::2], batches[1::2]
    threshold = calibrate(*sequences(calibration))
    margins, ce = sequences(test)
    leaves = leave_at(margins, threshold)
    for idx, _ in test[:2]:
        model(idx)  # warm
    return dict(depth=list(range(1, K + 1)), perplexity=ce.mean(1).exp().tolist(),
                tokens_per_second=[timed(lambda idx: model(idx, loops=k)) for k in range(1, K + 1)],
                halting=dict(threshold=threshold, loops=(leaves + 1).float().mean().item(),
                             perplexity=ce.gather(0, leaves[None]).mean().exp().item(),
                             tokens_per_second=timed(lambda idx: halt(model, idx, threshold))))


MEASURES = dict(depth=depth, scale_sensitivity=scale_sensitivity, radial_gradient=radial_gradient,
                residual_expansion=residual_expansion, radial_clamp=radial_clamp, token_norms=token_norms, exits=exits)
PANELS = ['training', *MEASURES]


@dataclass
class PlotConfig:
    out: str = flag('blind_spot.png', 'the figure; its numbers go beside it as .json')
    panels: str = flag(','.join(PANELS), 'which to measure and draw, with commas between')
    eval_iters: int = flag(50, 'batches of validation text', low=2)
    device: str = flag('auto', 'auto is cuda, then mps, then cpu')

    def __post_init__(self):
        validate(self)
        for panel in self.panels.split(','):
            if panel not in PANELS:
                raise ValueError(f'panels must be of {", ".join(PANELS)}, got {panel!r}')


# ----------------------------------------------------------------------------------------------------------------
# Runs and conditions


def measure_run(path: Path, cfg: PlotConfig, device) -> tuple[TrainConfig, dict]:
    """The flags of a run and all that --panels asks for. UserError if it cannot be measured."""
    model, run, _ = load_checkpoint(path / 'ckpt.pt', device)
    tokens, _ = load_tokens(run)
    batches = list(eval_batches(tokens['val'], run, cfg.eval_iters, device))
    try:
        lines = [json.loads(line) for line in (path / 'log.jsonl').read_text().splitlines()]
        steps = [x for x in lines if 'loss' in x]
        training = dict(iter=[x['iter'] for x in steps], norm=[x['norms'][-1] for x in steps])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        raise UserError(f'{path}/log.jsonl does not read ({type(e).__name__})') from e
    result = dict(config=asdict(run), training=training)
    for panel in cfg.panels.split(','):
        if panel in MEASURES:
            result[panel] = MEASURES[panel](model, batches)
    return run, result


def conditions(runs: list[tuple[TrainConfig, dict]]) -> dict[str, list[dict]]:
    """Results by condition: runs with the same flags, whatever the seed, under the paper's words for them."""
    same = ('seed', 'out_dir', 'resume', 'overwrite', 'eval_only', 'device', 'compile', 'eval_interval', 'eval_iters',
            'log_interval')
    named = ('readout', 'alpha', 'recurrence', 'supervision', 'norm_penalty')
    flags = [{k: v for k, v in asdict(run).items() if k not in same} for run, _ in runs]
    vary = [k for k in (flags[0] if flags else ()) if k not in named and len({f[k] for f in flags}) > 1]
    groups = {}
    for f, (_, result) in zip(flags, runs):
        readout = f'alpha {f["alpha"]:g}' if f['readout'] == 'alpha' else f['readout'].replace('final_rms', 'final-only rms')
        name = f'{f["supervision"].replace("_", "-")} + {readout}'
        name += f' + penalty {f["norm_penalty"]:g}' if f['norm_penalty'] else ''
        name += {'residual': '', 'rms': ', rms recurrence', 'damped': ', damped recurrence'}.get(
            f['recurrence'], f', {f["recurrence"]} recurrence')
        name += ''.join(f', {k} {f[k]:g}' if isinstance(f[k], float) else f', {k} {f[k]}' for k in vary)
        groups.setdefault(name, []).append(result)
    return groups


def table(groups: dict[str, list[dict]]) -> str:
    """Markdown: norm at K, cross-entropy at exits 1, K/2 and K, mean ± standard deviation over seeds."""
    def cell(values, digits):
        t = torch.tensor(values, dtype=torch.float64)
        return f'{t.mean():.{digits}f}' + (f' ± {t.std():.{digits}f}' if len(t) > 1 else '')
    rows = ['| condition | seeds | norm at K | CE at exit 1 | CE at exit K/2 | CE at exit K |', '|---|---|---|---|---|---|']
    for name, results in groups.items():
        cells = [name, str(len(results))]
        K = results[0]['config']['loops']
        if 'depth' in results[0]:
            cells.append(cell([r['depth']['norm'][K - 1] for r in results], 1))
            cells += [cell([r['depth']['ce'][k - 1] for r in results], 3) for k in (1, max(1, K // 2), K)]
        else:
            cells += [cell([r['training']['norm'][-1] for r in results], 1) if results[0]['training']['norm'] else '–',
                      '–', '–', '–']
        rows.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows)


def exits_table(groups: dict[str, list[dict]]) -> str:
    """Markdown: perplexity at fixed depths and with confidence halting, and tokens a second against depth K."""
    rows = ['| condition | ppl at depth 1 | at K/2 | at K | best fixed depth | halting: mean loops | ppl | speed over depth K |',
            '|---|---|---|---|---|---|---|---|']
    for name, results in groups.items():
        e, K = [r['exits'] for r in results], results[0]['config']['loops']

        def mean(get):
            t = torch.tensor([get(x) for x in e], dtype=torch.float64)
            return f'{t.mean():.2f}' + (f' ± {t.std():.2f}' if len(t) > 1 else '')
        best = [1 + min(range(K), key=lambda k: x['perplexity'][k]) for x in e]
        rows.append('| ' + ' | '.join([
            name, *(mean(lambda x: x['perplexity'][k - 1]) for k in (1, max(1, K // 2), K)),
            ', '.join(str(b) for b in sorted(set(best))), mean(lambda x: x['halting']['loops']),
            mean(lambda x: x['halting']['perplexity']),
            mean(lambda x: x['halting']['tokens_per_second'] / x['tokens_per_second'][-1])]) + ' |')
    return '\n'.join(rows)


# ----------------------------------------------------------------------------------------------------------------
# The figure. Each drawing takes axes and lines: [(label, style, results of one condition)].

COLORS = ['#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']  # Okabe and Ito, colour-blind safe
DASHES = ['-', '--', ':', '-.']


def band(ax, x, ys, label, style, solid_to=None):
    """Mean over runs, their range as a band; beyond index solid_to fainter."""
    n = min(len(y) for y in ys)
    y, x = torch.tensor([y[:n] for y in ys], dtype=torch.float64), list(x)[:n]
    cut = solid_to or n
    ax.plot(x[:cut], y.mean(0)[:cut], label=label, **style)
    if cut < n:
        ax.plot(x[cut - 1:], y.mean(0)[cut - 1:], **{**style, 'alpha': 0.45})
    if len(ys) > 1:
        ax.fill_between(x, y.amin(0), y.amax(0), color=style['color'], alpha=0.18, linewidth=0)


def draw_training(axes, lines):
    ax, = axes
    for label, style, runs in lines:
        band(ax, runs[0]['training']['iter'], [r['training']['norm'] for r in runs], label, style)
    ax.set(title='Training lets the hidden scale walk away', xlabel='iteration', ylabel='norm of the last state',
           yscale='log')


def draw_depth(axes, lines):
    K = lines[0][2][0]['config']['loops']
    for ax, key in zip(axes, ('norm', 'ce')):
        for label, style, runs in lines:
            ys = [r['depth'][key] for r in runs]
            band(ax, range(1, len(ys[0]) + 1), ys, label, style, solid_to=runs[0]['config']['loops'])
        ax.axvline(K, color='grey', linewidth=1, linestyle=':')
        ax.annotate('extrapolation', (K, 0.02), xycoords=('data', 'axes fraction'), xytext=(4, 0),
                    textcoords='offset points', color='grey', fontsize=10)
        ax.set(xlabel='loop k')
    axes[0].set(title='Each loop adds to the state', ylabel='norm of the state', yscale='log')
    axes[1].set(title='Every loop is an exit', ylabel='cross-entropy (nats)')
    limit_ce(axes[1], [r['depth']['ce'] for _, _, runs in lines for r in runs])


def limit_ce(ax, curves):
    """Keep the interesting part in view when a curve explodes."""
    low = min(min(c) for c in curves)
    ax.set_ylim(low - 0.1, min(max(max(c) for c in curves) + 0.1, low + 2.5))


def draw_scale_sensitivity(axes, lines):
    ax, = axes
    for label, style, runs in lines:
        band(ax, runs[0]['scale_sensitivity']['factor'], [r['scale_sensitivity']['ce'] for r in runs], label, style)
    ax.set(title='Cross-entropy cannot see scale through a norm', xlabel='factor on the last state', xscale='log',
           ylabel='cross-entropy (nats)')
    limit_ce(ax, [r['scale_sensitivity']['ce'] for _, _, runs in lines for r in runs])


def draw_radial_gradient(axes, lines):
    ax, = axes
    for label, style, runs in lines:
        shares = [r['radial_gradient']['share'] for r in runs]
        band(ax, range(1, len(shares[0]) + 1), shares, label, {**style, 'marker': 'o', 'markersize': 4})
    ax.set(title='A blind exit sends no gradient along the state', xlabel='loop k', yscale='log',
           ylabel='radial share of dCE/dh')


def draw_residual_expansion(axes, lines):
    for ax, key in zip(axes, ('increment', 'turn')):
        for label, style, runs in lines:
            ys = [r['residual_expansion'][key] for r in runs]
            band(ax, range(1, len(ys[0]) + 1), ys, label, style, solid_to=runs[0]['config']['loops'] - 1)
        ax.set(xlabel='loop k')
    axes[0].set(title='Pre-norm loops add a length that settles', ylabel='growth of the norm in a loop')
    axes[0].set_yscale('symlog', linthresh=1)
    axes[1].set(title='so a large state hardly turns any more', ylabel='turn of the direction', yscale='log')


def draw_radial_clamp(axes, lines):
    ax, = axes
    for i, (label, style, runs) in enumerate(lines):
        for j, (clamp, hatch) in enumerate((('frozen', ''), ('tangent', '///'))):
            costs = [r['radial_clamp'][clamp]['ce'] - r['radial_clamp']['none']['ce'] for r in runs]
            mean = sum(costs) / len(costs)
            ax.barh(i + 0.4 * j - 0.2, mean, 0.38, color=style['color'], alpha=0.9 - 0.4 * j, hatch=hatch,
                    xerr=[[mean - min(costs)], [max(costs) - mean]] if len(costs) > 1 else None)
    ax.invert_yaxis()
    ax.set_xscale('symlog', linthresh=0.01)
    ax.axvline(0, color='black', linewidth=1)
    ax.set(title='What the radial part of a loop was doing', yticks=[],
           xlabel='change of CE: scale frozen (plain), radial update removed (hatched)')


def draw_token_norms(axes, lines):
    ax, = axes
    for i, (label, style, runs) in enumerate(lines):
        mean = {k: sum(r['token_norms'][k] for r in runs) / len(runs) for k in runs[0]['token_norms']}
        ax.plot([mean['median'], mean['max']], [i, i], color=style['color'], linewidth=2)
        for key, marker in ('median', 'o'), ('p99', '|'), ('max', '>'):
            ax.plot(mean[key], i, marker=marker, markersize=9, color=style['color'])
    ax.invert_yaxis()
    ax.set(title='The whole population of tokens has moved', yticks=[], xscale='log',
           xlabel='norm of the last state: median (o), 99% (|), max (>)')


def draw_exits(axes, lines):
    ax, = axes
    for label, style, runs in lines:
        e = [r['exits'] for r in runs]
        band(ax, e[0]['depth'], [x['perplexity'] for x in e], label, {**style, 'marker': 'o', 'markersize': 4})
        ax.plot(sum(x['halting']['loops'] for x in e) / len(e), sum(x['halting']['perplexity'] for x in e) / len(e),
                marker='*', markersize=15, color=style['color'], markeredgecolor='black')
    low = min(p for _, _, runs in lines for r in runs for p in r['exits']['perplexity'])
    high = max(p for _, _, runs in lines for r in runs for p in r['exits']['perplexity'])
    ax.set(title='Compute against perplexity', xlabel='loops a sequence; star: confidence halting', ylabel='perplexity',
           yscale='log', ylim=(0.95 * low, min(1.05 * high, 8 * low)))


WIDTH = dict(depth=2, residual_expansion=2)  # axes a panel


def draw(groups: dict[str, list[dict]], panels: list[str], out: Path):
    count = sum(WIDTH.get(p, 1) for p in panels)
    columns = min(3, count)
    rows = math.ceil(count / columns)
    with plt.rc_context({'font.size': 12, 'axes.titlesize': 13, 'axes.spines.top': False, 'axes.spines.right': False}):
        fig, grid = plt.subplots(rows, columns, figsize=(5.6 * columns, 4.1 * rows), squeeze=False)
        axes = grid.flatten().tolist()
        lines = [(name, dict(color=COLORS[i % len(COLORS)], linestyle=DASHES[i // len(COLORS) % len(DASHES)], linewidth=2.2),
                  results) for i, (name, results) in enumerate(groups.items())]
        for panel in panels:
            mine, axes = axes[:WIDTH.get(panel, 1)], axes[WIDTH.get(panel, 1):]
            globals()[f'draw_{panel}'](mine, lines)
        for ax in axes:
            ax.set_axis_off()
        fig.tight_layout(h_pad=2)
        handles = [plt.Line2D([], [], label=name, **style) for name, style, _ in lines]
        if axes:  # a place is free
            axes[0].legend(handles=handles, loc='upper left', frameon=False, ncols=math.ceil(len(handles) / 13))
        else:
            fig.legend(handles=handles, loc='upper center', bbox_to_anchor=(0.5, 0), frameon=False, ncols=2)
        fig.savefig(out, dpi=110, bbox_inches='tight')
        plt.close(fig)


def main(argv=None):
    parser = FlagParser(PlotConfig, __doc__)
    parser.add_argument('runs', nargs='*', help='folders of runs (default: all under out/)')
    cfg, given = parser.parse(argv)
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
        groups, panels = conditions(list(runs.values())), cfg.panels.split(',')
        print(table(groups))
        if 'exits' in panels:
            print('\n' + exits_table(groups))
        out = Path(cfg.out)
        out.with_suffix('.json').write_text(json.dumps({path: result for path, (_, result) in runs.items()}, indent=1))
        draw(groups, panels, out)
        print(f'\n{out} and {out.with_suffix(".json")}', file=sys.stderr)
    except (UserError, OSError) as e:
        sys.exit(f'plot_norms.py: {e}')
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    main()
