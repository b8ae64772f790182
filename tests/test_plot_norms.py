"""Every diagnostic of plot_norms.py on a case whose answer is known; conditions and their looks; the script
on good and bad runs."""

import itertools
import json
import math
import os
import shutil
from dataclasses import dataclass

import matplotlib.figure
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import plot_norms
import train
from conftest import TINY
from looped import LoopedConfig, LoopedGPT
from plot_norms import (PANELS, calibrate, common, depth, describe, draw, draw_curves, exits, halt, leave_at,
                        margin, radial_clamp, radial_gradient, rays, residual_expansion, scale_sensitivity,
                        styles, tables, token_norms)
from train import TrainConfig

B, T, C, V, K = 3, 8, 32, 61, 4


def make(loop=None, **flags) -> LoopedGPT:
    """A model with weights of some size; `loop` replaces all that a step does to a state."""
    torch.manual_seed(0)
    flags = dict(loops=K) | flags
    model = LoopedGPT(LoopedConfig(vocab_size=V, block_size=T, n_embd=C, n_layer=1, **flags))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    if loop:
        model.step = lambda h, h_0, k, cache=None: loop(h)
    return model.eval()


def batches(count=4):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (count, B, T + 1), generator=g)
    return [(x[:, :-1], x[:, 1:]) for x in ids]


def everything():
    return (torch.cat(x) for x in zip(*batches()))


def embedded(model, idx):
    return model.tok_emb(idx) + model.pos_emb.weight[:idx.size(1)]


def raw_ce(model, h, targets):
    return F.cross_entropy((h @ model.tok_emb.weight.T).flatten(0, 1), targets.flatten()).item()


def double(h):
    return 2 * h


def turn(h, angle=0.3):
    """Each pair of channels is turned by an angle, so that every state keeps its norm."""
    x, y = h[..., ::2], h[..., 1::2]
    return torch.stack((x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)),
                       dim=-1).flatten(-2)


# ------------------------------------------------------------------------------------------------------------
# The diagnostics


def test_depth_of_a_loop_that_doubles_the_state():
    model = make(double, readout='raw')
    got = depth(model, batches())
    assert len(got['norm']) == len(got['ce']) == 4 * K
    idx, targets = everything()
    h = embedded(model, idx)
    norm = h.norm(dim=-1).mean().item()
    loops = range(1, 4 * K + 1)
    assert got['norm'] == pytest.approx([norm * 2 ** k for k in loops], rel=1e-4)
    assert got['ce'] == pytest.approx([raw_ce(model, 2 ** k * h, targets) for k in loops], rel=1e-4)


def test_depth_reads_each_exit_as_it_was_trained_and_those_beyond_K_as_the_last():
    model, (idx, targets) = make(readout='final_rms'), everything()
    with torch.no_grad():
        states = model.states(idx, 4 * K)
        ce = [F.cross_entropy(model.readout(h, k).flatten(0, 1), targets.flatten()).item()
              for k, h in enumerate(states, 1)]
        last = F.cross_entropy(model.readout(states[K]).flatten(0, 1), targets.flatten()).item()
    assert depth(model, batches())['ce'] == pytest.approx(ce, rel=1e-4)
    assert ce[K] == pytest.approx(last) and ce[K - 2] == pytest.approx(raw_ce(model, states[K - 2], targets))


def test_scale_sensitivity_is_flat_for_a_blind_readout_and_a_formula_for_raw():
    blind = scale_sensitivity(make(readout='rms'), batches())
    assert min(blind['factor']) == pytest.approx(0.1) and max(blind['factor']) == pytest.approx(10)
    assert max(blind['ce']) - min(blind['ce']) < 1e-3
    model = make(lambda h: h, readout='raw')
    raw, (idx, targets) = scale_sensitivity(model, batches()), everything()
    for a, ce in zip(raw['factor'], raw['ce']):
        assert ce == pytest.approx(raw_ce(model, a * embedded(model, idx), targets), rel=1e-4)
    assert max(raw['ce']) - min(raw['ce']) > 1


def test_radial_gradient_is_zero_for_a_blind_readout_and_a_formula_for_raw():
    assert max(radial_gradient(make(readout='rms'), batches())['share']) < 1e-3
    assert max(radial_gradient(make(readout='cut'), batches())['share']) < 1e-3
    mixed = radial_gradient(make(readout='final_rms'), batches())['share']
    assert min(mixed[:-1]) > 0.03 and mixed[-1] < 1e-3
    model, (idx, targets) = make(lambda h: 0.5 * h, readout='raw'), everything()
    for k, share in enumerate(radial_gradient(model, batches())['share'], 1):
        h, W = 0.5 ** k * embedded(model, idx), model.tok_emb.weight
        grad = ((h @ W.T).softmax(-1) - F.one_hot(targets, V)) @ W
        want = (grad * h).sum(-1).abs() / (grad.norm(dim=-1) * h.norm(dim=-1))
        assert share == pytest.approx(want.mean().item(), rel=1e-3)


def test_a_loop_that_doubles_is_a_ray_and_a_loop_that_turns_is_an_arc():
    model = make(double)
    norm = embedded(model, batches()[0][0])[-1, -1].norm().item()
    (along,), (across,) = rays(model, batches()).values()
    assert along == pytest.approx([norm * 2 ** k for k in range(1, 33)], rel=1e-5)
    assert max(a / b for a, b in zip(across, along)) < 1e-6
    (along,), (across,) = rays(make(turn), batches()).values()
    assert along == pytest.approx([norm * math.cos(0.3 * k) for k in range(32)], abs=1e-4)
    assert across == pytest.approx([norm * abs(math.sin(0.3 * k)) for k in range(32)], abs=1e-2)
    assert len(rays(model, batches(41))['along']) == 3


def test_common_is_the_share_of_the_mean_state_and_the_growth_over_the_embedding():
    model = make(double)
    got = common(model, batches(1))
    h = embedded(model, batches(1)[0][0]).flatten(0, 1)
    share = (h.mean(0).square().sum() / h.square().sum(-1).mean()).item()
    assert got['share'] == pytest.approx([share] * K, rel=1e-4)
    assert got['growth'] == pytest.approx([2 ** k for k in range(1, K + 1)], rel=1e-4)
    far = torch.full((C,), 1000.0)
    assert common(make(lambda h: h + far), batches())['share'][-1] == pytest.approx(1, abs=1e-3)


def test_residual_expansion_of_a_loop_that_adds_a_constant():
    """h_k = h_0 + k·v: the norm grows by |v| in the end, and the turn fades."""
    v = torch.zeros(C)
    v[0] = 50.0
    model = make(lambda h: h + v)
    got = residual_expansion(model, batches())
    assert len(got['increment']) == 29 and got['increment'][-1] == pytest.approx(50, rel=1e-3)
    assert got['turn'][-1] < got['turn'][0] / 100
    h1 = embedded(model, next(everything())) + v
    turned = (F.normalize(h1 + v, dim=-1) - F.normalize(h1, dim=-1)).norm(dim=-1)
    assert got['turn'][0] == pytest.approx(turned.mean().item(), rel=1e-4)
    assert got['turn_times_scale'][0] == pytest.approx((turned * h1.norm(dim=-1)).mean().item(), rel=1e-4)


def test_residual_expansion_of_a_pre_norm_block_follows_lemma_2():
    """From a large state on, a block adds a norm that settles, and the turn times the norm is a constant."""
    model = make(readout='rms')
    with torch.no_grad():
        model.tok_emb.weight.mul_(30000)
    got = residual_expansion(model, batches())
    update = got['turn_times_scale'][0]  # the part of an update that turns the state, first loop to last
    assert update > 10 and got['turn_times_scale'] == pytest.approx([update] * 29, rel=0.05)
    assert got['increment'] == pytest.approx([got['increment'][0]] * 29, abs=0.05 * update)
    assert got['turn'][-1] < got['turn'][0]


def test_the_clamp_undoes_a_loop_that_only_scales_and_does_nothing_to_one_that_only_turns():
    model = make(double, readout='raw')
    got, free = radial_clamp(model, batches()), depth(model, batches())
    assert got['lost'] == pytest.approx([free['ce'][0] - ce for ce in free['ce'][:K]], abs=1e-4)
    assert abs(got['lost'][-1]) > 1
    assert radial_clamp(make(turn, readout='raw'), batches())['lost'] == pytest.approx([0] * K, abs=1e-5)


def test_token_norms_are_the_quantiles_of_states_of_known_length():
    model = make()
    lengths = torch.randperm(101, generator=torch.Generator().manual_seed(0)) + 1.0
    model.states = lambda idx: [F.one_hot(torch.zeros(1, 101, dtype=torch.int64), C) * lengths[:, None]]
    got = token_norms(model, batches(1))
    assert got['share'] == pytest.approx([i / 100 for i in range(101)])
    assert got['norm'] == pytest.approx([i + 1 for i in range(101)])


def test_margin_is_the_mean_distance_of_the_two_top_logits():
    z = torch.tensor([[[1.0, 5.0, 3.0], [0.0, 0.0, -1.0]]])
    assert margin(z).tolist() == [1.0]


def test_a_sequence_leaves_at_the_first_depth_that_passes_or_at_the_last():
    margins = torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert leave_at(margins, 1.5).tolist() == [1, 2, 0]
    assert leave_at(margins, math.inf).tolist() == [2, 2, 2]


def test_calibration_leaves_as_early_as_one_percent_of_perplexity_allows():
    margins = torch.tensor([[5.0, 4.0, 1.0, 0.5], [9.0, 9.0, 9.0, 9.0]])
    same = torch.full((2, 4), 2.0)
    assert leave_at(margins, calibrate(margins, same)).tolist() == [0, 0, 0, 0]
    worse = same.clone()
    worse[0, 2:] += 0.1  # the two unsure ones would lose
    assert leave_at(margins, calibrate(margins, worse)).tolist() == [0, 0, 1, 1]
    worse[0] += 1
    assert leave_at(margins, calibrate(margins, worse)).tolist() == [1, 1, 1, 1]
    assert calibrate(margins, worse * math.nan) == math.inf


@pytest.mark.parametrize('flags', [dict(readout='rms'), dict(readout='raw', inject=1.0),
                                   dict(readout='final_rms', recurrence='rms')])
def test_halting_lets_each_sequence_leave_where_its_own_margin_passes(flags):
    model, (idx, _) = make(**flags), batches(1)[0]
    with torch.no_grad():
        margins = torch.stack([margin(model(idx, loops=k).logits) for k in range(1, K + 1)])
        for threshold in (0.0, margins[:-1].median().item() + 1e-4, math.inf):
            assert (halt(model, idx, threshold) - 1).tolist() == leave_at(margins, threshold).tolist()


def test_exits_report_the_other_half_of_the_batches():
    model, all_batches = make(readout='final_rms'), batches(6)
    got = exits(model, all_batches)
    ce = [torch.stack([F.cross_entropy(model(i, loops=k).logits.flatten(0, 1), t.flatten())
                       for i, t in all_batches[1::2]]).mean().item() for k in range(1, K + 1)]
    assert got['perplexity'] == pytest.approx([math.exp(x) for x in ce], rel=1e-4)
    assert 1 <= got['halting']['loops'] <= K and got['halting']['speedup'] > 0
    assert len(got['tokens_per_second']) == K and min(got['tokens_per_second']) > 0


def test_the_best_depth_is_chosen_on_other_batches_than_it_is_reported_on():
    """Where the targets are 0, as in the batches of calibration, exit 2 is best; where they are 1, exit 4."""
    model, ce = make(lambda h: h), torch.tensor([[4.0, 1, 4, 4], [4, 3, 4, 1]])
    calls = itertools.count()  # one for each exit in turn
    model.cross_entropy = lambda x, targets: ce[targets, next(calls) % K]
    got = exits(model, [(idx, torch.full_like(idx, i % 2)) for i, (idx, _) in enumerate(batches())])
    assert got['best_depth']['loops'] == 2 and got['best_depth']['perplexity'] == pytest.approx(math.exp(3))
    assert min(got['perplexity']) == pytest.approx(math.exp(1))


def test_a_forks_own_carry_is_what_is_measured():
    """Fed nothing but h_0, every loop gives the same state."""
    model, (idx, targets) = make(), batches(1)[0]
    assert max(map(abs, residual_expansion(model, batches())['increment'])) > 1
    assert max(map(abs, radial_clamp(model, batches())['lost'])) > 0.01
    model.carry = lambda h, h_0: h_0
    assert residual_expansion(model, batches())['increment'] == pytest.approx([0] * 29, abs=1e-4)
    assert radial_clamp(model, batches())['lost'] == pytest.approx([0] * K, abs=1e-5)
    assert len(set(depth(model, batches())['norm'])) == 1
    with torch.no_grad():  # what did not leave at once will not before the end
        margins = margin(model(idx, loops=1).logits)
        threshold = margins.median().item()
        assert halt(model, idx, threshold).tolist() == [1 if m > threshold else K for m in margins]


def test_a_forks_own_step_is_what_is_measured():
    model = make(readout='raw')
    model.step = lambda h, h_0, k, cache=None: h_0 * k
    got, (idx, targets) = radial_clamp(model, batches()), everything()
    h = embedded(model, idx)
    ce = [raw_ce(model, k * h, targets) for k in range(1, K + 1)]
    assert got['lost'] == pytest.approx([ce[0] - x for x in ce], abs=1e-4)
    assert residual_expansion(model, batches())['turn'] == pytest.approx([0] * 29, abs=1e-5)


@pytest.mark.parametrize('panel', [panel for panel in PANELS if PANELS[panel]])
def test_every_diagnostic_measures_a_model_in_double_precision_and_one_of_a_single_loop(panel):
    single, precise = PANELS[panel](make(), batches()), PANELS[panel](make().double(), batches())
    for key in single:
        if isinstance(single[key], list) and key != 'tokens_per_second':
            got, want = torch.tensor(single[key]), torch.tensor(precise[key])
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    PANELS[panel](make(loops=1), batches())


# ------------------------------------------------------------------------------------------------------------
# Conditions and their looks


def result(norm=1.0, iteration=None, changed=None, config=TrainConfig, **flags):
    cfg = config(**flags)
    norms, losses = [norm] * cfg.loops, [2.0 - k / 10 for k in range(cfg.loops)]
    log = [dict(iter=1, loss=5.0, norms=norms), dict(iter=cfg.max_iters, norms=norms, val_losses=losses)]
    log += [dict(iter=7, changed=changed)] if changed else []
    return describe(cfg, cfg.max_iters if iteration is None else iteration, log)


def conditions(*results):
    groups = {}
    for r in results:
        groups.setdefault(r['label'], []).append(r)
    return groups


def label(**flags):
    return result(**flags)['label']


def test_conditions_are_named_in_the_papers_words():
    assert label() == 'per-loop + rms' == label(seed=7, device='cpu', out_dir='x', log_interval=3)
    assert label(readout='raw', supervision='terminal') == 'terminal + raw'
    assert label(readout='final_rms') == 'per-loop + final-only rms'
    assert label(readout='alpha', alpha=0.25) == 'per-loop + alpha 0.25'
    assert label(readout='alpha') == 'per-loop + alpha 0.5'
    assert label(norm_penalty=0.01, recurrence='damped') == 'per-loop + rms + penalty 0.01, damped recurrence'


def test_every_other_flag_that_changes_the_result_is_named_also_when_a_run_is_alone():
    assert label(weight_decay=1.0) == 'per-loop + rms, weight_decay 1'
    assert label(learning_rate=3e-3, loops=4) == 'per-loop + rms, K = 4, lr 0.003'
    assert label(output_bias='unigram', dataset='my/text') == (
        'per-loop + rms, output_bias unigram, dataset my/text')
    assert label(learning_rate=0.00123456789) != label(learning_rate=0.00123456788)


def test_a_forks_own_field_is_named():
    @dataclass
    class Forked(TrainConfig):
        gate: bool = False
        warmth: float = 1.0
    assert label(config=Forked) == 'per-loop + rms'
    assert label(config=Forked, gate=True, warmth=0.5) == 'per-loop + rms, gate True, warmth 0.5'


def test_a_run_that_was_stopped_or_changed_is_a_condition_of_its_own():
    assert label(iteration=300) == 'per-loop + rms, stopped at 300'
    late = label(changed=dict(norm_penalty=0.01), norm_penalty=0.01)
    assert late == 'per-loop + rms + penalty 0.01, changed at 7'
    assert label(changed=dict(max_iters=1600)) == 'per-loop + rms'  # it goes on as it would have anyway
    groups = conditions(result(), result(seed=2, iteration=2), result(seed=3))
    assert {k: len(v) for k, v in groups.items()} == {'per-loop + rms': 2, 'per-loop + rms, stopped at 2': 1}


def test_seeds_are_averaged_in_the_table_of_conditions():
    groups = conditions(result(10.0), result(20.0, seed=2), result(5.0, readout='raw'), result(loops=1))
    lines = tables(groups, ['training']).splitlines()
    assert 'last evaluation' in lines[0] and len(lines) == 7
    assert lines[4] == '| per-loop + rms | 2 | 15.0 ± 7.1 | 2.000 ± 0.000 | 1.700 ± 0.000 | 1.300 ± 0.000 |'
    assert lines[5] == '| per-loop + raw | 1 | 5.0 | 2.000 | 1.700 | 1.300 |'
    assert lines[6] == '| per-loop + rms, K = 1 | 1 | 1.0 | 2.000 | 2.000 | 2.000 |'


MANY = [dict(), dict(readout='raw'), dict(norm_penalty=0.01), dict(readout='cut'), dict(readout='layernorm'),
        dict(readout='final_rms'), dict(readout='alpha'), dict(readout='alpha', alpha=0.25),
        dict(readout='raw', norm_penalty=0.01), dict(norm_penalty=0.1), dict(recurrence='rms'),
        dict(recurrence='damped'), dict(supervision='terminal'), dict(supervision='terminal', readout='raw'),
        dict(supervision='terminal', recurrence='rms'), dict(supervision='terminal', recurrence='damped'),
        dict(output_bias='unigram'), dict(output_bias='learned'), dict(inject=1.0), dict(loops=1),
        dict(loops=4), dict(learning_rate=3e-3), dict(learning_rate=1e-2), dict(weight_decay=1.0),
        dict(iteration=300), *(dict(warmup_iters=i) for i in range(1, 21))]


def looks(*conditions_):
    return {style['label']: {k: v for k, v in style.items() if k != 'label'}
            for style, _ in styles(conditions(*(result(**flags) for flags in conditions_)))}


def test_no_two_conditions_look_the_same():
    drawn = [tuple(map(str, look.values())) for look in looks(*MANY).values()]
    assert len(drawn) == len(MANY) == len(set(drawn))


def test_the_look_of_a_condition_does_not_depend_on_what_is_beside_it():
    assert looks(*reversed(MANY)) == looks(*MANY)
    together = looks(*MANY[:16])
    for flags in MANY[:16]:
        (name, alone), = looks(flags).items()
        assert alone == together[name]


def test_colour_is_readout_and_penalty_and_line_style_is_recurrence_and_supervision():
    rms, raw, penalty, cut, recurrent, terminal, slow = looks(
        dict(), dict(readout='raw'), dict(norm_penalty=0.01), dict(readout='cut'), dict(recurrence='rms'),
        dict(supervision='terminal'), dict(learning_rate=1e-4)).values()
    assert len({look['color'] for look in (rms, raw, penalty, cut)}) == 4
    assert rms['color'] == recurrent['color'] == terminal['color'] == slow['color']
    assert len({look['linestyle'] for look in (rms, recurrent, terminal)}) == 3
    assert not rms['marker'] and slow['marker'] and rms['linestyle'] == slow['linestyle']


def test_a_forks_own_readout_and_recurrence_get_a_look(monkeypatch):
    from looped import READOUTS, RECURRENCES
    monkeypatch.setitem(READOUTS, 'mine', READOUTS['raw'])
    monkeypatch.setitem(READOUTS, 'yours', READOUTS['raw'])
    monkeypatch.setitem(RECURRENCES, 'mine', RECURRENCES['residual'])
    drawn = looks(*MANY[:16], dict(readout='mine'), dict(readout='yours'), dict(recurrence='mine'))
    assert len({str(look) for look in drawn.values()}) == 19
    assert drawn['per-loop + mine'] == looks(dict(readout='mine'))['per-loop + mine']


# ------------------------------------------------------------------------------------------------------------
# Drawing


def axes(lines, panel='p', **options):
    ax = matplotlib.figure.Figure().subplots()
    for style, runs in lines:
        for r in runs:
            r.setdefault('config', dict(loops=K))
    draw_curves(ax, panel, [(dict(color='red', marker='') | style, runs) for style, runs in lines], **options)
    return ax


def test_seeds_logged_at_other_intervals_are_averaged_where_both_have_a_line():
    often, seldom = dict(iter=[1, 2, 3, 4], norm=[1.0, 2.0, 3.0, 4.0]), dict(iter=[2, 4], norm=[4.0, 8.0])
    runs = [dict(p=often), dict(p=seldom)]
    ax = axes([({}, runs)], key='norm', x='iter')
    assert ax.lines[0].get_xydata().tolist() == [[2, 3], [4, 6]]
    assert ax.collections[0].get_paths()[0].get_extents().extents.tolist() == [2, 2, 4, 8]


def test_each_condition_has_its_own_mark_at_its_own_K():
    lines = [({}, [dict(p=dict(norm=[float(k) for k in range(1, 4 * loops + 1)]), config=dict(loops=loops))])
             for loops in (1, 4, 8)]
    ax = axes(lines, key='norm')
    trained, beyond, mark = ax.lines[::3], ax.lines[1::3], ax.lines[2::3]
    assert [line.get_xdata()[-1] for line in trained] == [1, 4, 8]
    assert [line.get_xdata()[0] for line in beyond] == [1, 4, 8] and not ax.texts
    assert [line.get_xydata().tolist() for line in mark] == [[[1, 1]], [[4, 4]], [[8, 8]]]


def test_noise_below_a_floor_is_no_curve_and_hides_nothing():
    noise = [[1e-8, 3e-7, 2e-8, 1e-7], [3e-8, 1e-8, 2e-7, 1e-9], [0.1, 0.1, 0.1, 0.1]]
    ax = axes([({}, [dict(p=dict(share=values))]) for values in noise], key='share', yscale='log',
              floor=(1e-4, 'noise below'))
    first, second, third = (set(line.get_ydata().tolist()) for line in ax.lines[::3])
    assert len(first) == len(second) == 1 and first != second and max(first | second) < 1e-4
    assert third == {0.1} and ax.get_ylim()[0] > 1e-5 and ax.texts[0].get_text() == 'noise below'


def test_a_curve_that_explodes_leaves_the_others_in_view():
    curves = [2.0, 1e6, 1e30, math.inf], [2.0, 2.1, 2.2, 2.3]
    ax = axes([({}, [dict(p=dict(ce=ce))]) for ce in curves], key='ce', crop=True)
    assert all(not math.isinf(y) for line in ax.lines for y in line.get_ydata())
    low, high = ax.get_ylim()
    assert 1.5 < low < 2 and 2.3 < high < 5


@pytest.mark.filterwarnings('ignore::RuntimeWarning', 'ignore::UserWarning')
@pytest.mark.parametrize('factor', [1e12, math.nan])
def test_no_panel_fails_on_numbers_that_are_not_finite(tmp_path, factor):
    """A grown model of K loops beside a sound one of a single loop."""
    grown = make(lambda h: factor * h, readout='raw')
    results = [result(readout='raw', loops=K), result(loops=1)]
    for r, model in zip(results, (grown, make(loops=1))):
        r.update({panel: PANELS[panel](model, batches()) for panel in PANELS if PANELS[panel]})
    results[0]['training']['norm'] = [math.inf]
    draw(conditions(*results), list(PANELS), tmp_path / 'x.png')
    assert (tmp_path / 'x.png').stat().st_size > 10_000


def test_states_are_drawn_two_conditions_to_an_axis(tmp_path, monkeypatch):
    results = [result(**flags) for flags in MANY[:5]]
    for r in results:
        r['states'] = dict(along=[[1.0, 2.0]], across=[[0.0, 0.5]])
    drawn = []
    monkeypatch.setattr(plot_norms, 'draw_rays', lambda ax, panel, lines, key: drawn.append(len(lines)))
    draw(conditions(*results), ['states'], tmp_path / 'x.png')
    assert drawn == [2, 2, 1]


# ------------------------------------------------------------------------------------------------------------
# The script

RUNS = {'rms': (), 'rms2': ('--seed=2',), 'raw': ('--readout=raw',)}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Three runs under out/, and their corpus, trained once for all tests here."""
    from data import prepare
    from conftest import TEXT
    folder, before, data = tmp_path_factory.mktemp('trained'), os.getcwd(), prepare.DATA
    os.chdir(folder)
    try:
        prepare.DATA = folder / 'data'
        prepare.DATA.mkdir()
        (folder / 'text.txt').write_text(TEXT)
        for name, flags in RUNS.items():
            with pytest.raises(SystemExit) as end:
                train.main(['--dataset=text.txt', *TINY, *flags, f'--out_dir=out/{name}'])
            assert not end.value.code
    finally:
        prepare.DATA = data
        os.chdir(before)
    return folder


@pytest.fixture
def runs(trained, workplace):
    shutil.copytree(trained / 'out', workplace / 'out')
    shutil.copytree(trained / 'data', workplace / 'data', dirs_exist_ok=True)
    return workplace / 'out'


def plot(run, *argv):
    return run(plot_norms.main, '--eval_iters=2', '--device=cpu', *argv)


def test_a_newcomer_gets_a_table_a_figure_of_four_panels_and_numbers(run, runs, workplace, monkeypatch):
    drawn, add_subplot = [], matplotlib.figure.Figure.add_subplot

    def watched(fig, *position, **options):
        drawn.append((position, options['title']))
        return add_subplot(fig, *position, **options)
    monkeypatch.setattr(matplotlib.figure.Figure, 'add_subplot', watched)
    code, out, err = plot(run)
    assert code == 0, err
    assert '| 2 |' in out and out.count('| condition |') == 1 and 'per-loop + raw, ' in out
    assert '[1/3] out/raw: measuring training,' in err and '[3/3]' in err and err.count('\n') == 4
    assert [position for position, _ in drawn] == [(2, 2, i) for i in (1, 2, 3, 4)]
    assert all(title.endswith('?') for _, title in drawn)
    assert (workplace / 'blind_spot.png').read_bytes()[:4] == b'\x89PNG'
    numbers = json.loads((workplace / 'blind_spot.json').read_text())
    measured = [r for runs in numbers.values() for r in runs]
    assert sorted(r['path'] for r in measured) == ['out/raw', 'out/rms', 'out/rms2']
    for r in measured:
        assert set(PANELS) & set(r) == {'training', 'scale_sensitivity', 'radial_gradient', 'states'}
        assert r['training']['iter'] == [0, 1, 2, 3, 4, 5, 6]


def test_all_panels_of_runs_of_one_loop_and_of_three(run, runs, workplace):
    assert run(train.main, '--dataset=text.txt', *TINY, '--loops=1', '--out_dir=out/one')[0] == 0
    code, out, err = plot(run, 'out/one', 'out/rms', '--panels=all', '--out=all.png')
    assert code == 0, err
    assert out.count('| condition |') == 2 and 'best depth' in out and out.count('K = 1') == 2
    conditions_, exits_ = out.split('\n\n')[1:]
    assert {line.count('|') for line in conditions_.splitlines()} == {7}
    assert {line.count('|') for line in exits_.splitlines()} == {11}
    for measured in json.loads((workplace / 'all.json').read_text()).values():
        assert set(PANELS) < set(measured[0])


def test_panels_picks_what_is_measured_and_drawn(run, runs, workplace):
    code, out, _ = plot(run, runs / 'rms', '--panels=depth,token_norms', '--out=a.pdf')
    assert code == 0 and (workplace / 'a.pdf').read_bytes()[:4] == b'%PDF' and out.count('| condition |') == 1
    (measured,), = json.loads((workplace / 'a.json').read_text()).values()
    assert set(PANELS) & set(measured) == {'training', 'depth', 'token_norms'}
    code, _, err = run(plot_norms.main, '--panels=dept')
    assert code == 2 and 'residual_expansion' in err and "'dept'" in err and err.count('\n') == 1


@pytest.mark.parametrize('flag', ['--out=a.xyz', '--out=nowhere/a.png', f'--eval_iters={10 ** 20}',
                                  '--eval_iters=10001', '--eval_iters=1', '--device=meta'])
def test_a_flag_that_cannot_work_is_one_line(run, workplace, flag):
    code, _, err = run(plot_norms.main, flag)
    assert code in (1, 2) and err.count('\n') == 1 and flag.split('=')[1] in err


def test_bad_runs_are_named_in_one_line_and_the_rest_is_drawn(run, runs, workplace):
    for name in 'cut', 'young', 'foreign', 'torn', 'moved', 'empty':
        shutil.copytree(runs / 'rms', runs / name)
    (runs / 'cut' / 'ckpt.pt').write_bytes((runs / 'cut' / 'ckpt.pt').read_bytes()[:1000])
    (runs / 'young' / 'ckpt.pt').unlink()
    (runs / 'foreign' / 'log.jsonl').write_text('5\n')
    log = (runs / 'torn' / 'log.jsonl').read_text()
    (runs / 'torn' / 'log.jsonl').write_text(log.replace('"iter"', '"i', 1))
    (runs / 'empty' / 'log.jsonl').write_text('')
    state = torch.load(runs / 'moved' / 'ckpt.pt', weights_only=True)
    state['config']['dataset'] = 'moved.txt'
    torch.save(state, runs / 'moved' / 'ckpt.pt')
    code, out, err = plot(run, '--panels=depth')
    assert code == 0 and out.count('per-loop') == 2
    left_out = {line.split(':')[0]: line for line in err.splitlines() if 'left out' in line}
    assert set(left_out) == {f'out/{name}' for name in ('cut', 'young', 'foreign', 'torn', 'moved', 'empty')}
    assert 'cannot be read' in left_out['out/cut'] and 'no checkpoint' in left_out['out/young']
    assert 'log.jsonl' in left_out['out/foreign'] and 'log.jsonl' in left_out['out/torn']
    assert 'moved.txt' in left_out['out/moved'] and err.count('\n') == 9 + 6 + 1


def test_a_corpus_with_another_content_is_refused(run, runs, workplace):
    (workplace / 'text.txt').write_text('another text. ' * 3000)
    code, _, err = plot(run)
    assert code == 1 and err.count('left out') == 3 and 'text.txt' in err and 'none of these runs' in err


def test_a_copied_folder_is_not_a_second_seed(run, runs, workplace):
    shutil.copytree(runs / 'rms', runs / 'rms_copy')
    code, out, err = plot(run, 'out/rms', 'out/rms_copy', 'out/rms2', '--panels=training')
    assert code == 0 and out.count('| 2 |') == 1
    left_out, = (line for line in err.splitlines() if 'left out' in line)
    assert left_out.startswith('out/rms_copy') and 'copy of a run' in left_out


def test_a_run_that_was_stopped_is_not_averaged_with_finished_ones(run, runs, workplace):
    state = torch.load(runs / 'rms2' / 'ckpt.pt', weights_only=True)
    torch.save(state | dict(iter=3), runs / 'rms2' / 'ckpt.pt')
    code, out, _ = plot(run, 'out/rms', 'out/rms2', '--panels=training')
    assert code == 0 and out.count('| 1 |') == 2 and 'stopped at 3 | 1 |' in out


def test_no_runs_at_all_says_what_to_do(run, workplace):
    code, _, err = run(plot_norms.main)
    assert code == 1 and err.count('\n') == 1 and 'train some first' in err
    code, _, err = run(plot_norms.main, 'nowhere')
    assert code == 1 and 'none of these runs' in err


def test_the_json_holds_no_infinity(run, runs, workplace):
    state = torch.load(runs / 'raw' / 'ckpt.pt', weights_only=True)
    state['model']['tok_emb.weight'] *= 1e30
    torch.save(state, runs / 'raw' / 'ckpt.pt')
    code, _, err = plot(run, 'out/raw', '--panels=depth')
    assert code == 0, err
    (raw,), = json.loads((workplace / 'blind_spot.json').read_text(), parse_constant=pytest.fail).values()
    assert None in raw['depth']['ce']


def test_a_failure_while_drawing_keeps_the_old_figure_and_the_old_numbers(run, runs, workplace, monkeypatch):
    def full(*args, **options):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', full)
    for name in 'png', 'json', 'gif':
        (workplace / f'blind_spot.{name}').write_text('old')
    for argv in ['--panels=training'], ['--out=blind_spot.gif']:
        code, _, err = plot(run, 'out/rms', *argv)
        assert code == 1 and 'No space left' in err and 'Traceback' not in err
    assert {(workplace / f'blind_spot.{name}').read_text() for name in ('png', 'json', 'gif')} == {'old'}
    assert not list(workplace.glob('*.tmp'))


def test_expected_errors_are_one_line_and_a_bug_keeps_its_traceback(run, runs, monkeypatch):
    def fails(error):
        def diagnostic(model, batches):
            raise error
        monkeypatch.setitem(PANELS, 'depth', diagnostic)
        return plot(run, 'out/rms', '--panels=depth')
    code, _, err = fails(MemoryError('too large'))
    assert code == 1 and 'left out' in err and 'too large' in err
    assert fails(KeyboardInterrupt())[0] == 130
    for bug in ZeroDivisionError(), KeyError('norm'), ValueError(), RuntimeError('shapes'):
        with pytest.raises(type(bug)):
            fails(bug)


def test_a_moving_picture_is_made_of_the_logs_alone(run, runs, workplace):
    for name in RUNS:
        (runs / name / 'ckpt.pt').unlink()
    (workplace / 'text.txt').unlink()
    code, out, err = plot(run, '--out=a.gif')
    assert code == 0, err
    assert '| 2 |' in out and not (workplace / 'a.json').exists()
    with Image.open(workplace / 'a.gif') as gif:
        assert gif.n_frames == 7 and gif.size == (800, 420) and gif.info['loop'] == 0
        durations = [gif.seek(i) or gif.info['duration'] for i in range(gif.n_frames)]
        assert durations[-1] == 3000 and all(50 < ms < 1000 for ms in durations[:-1])
        gif.seek(3)
        assert gif.convert('RGB').getpixel((2, 2)) == (255, 255, 255)


@pytest.fixture
def long_logs(runs):
    """Makes logs of 200 iterations, or of every n-th of them: one norm grows, the other does not."""
    def keep(every):
        for name in 'rms', 'raw':
            flags, start, *_, evaluation = (runs / name / 'log.jsonl').read_text().splitlines()
            lines = [flags, start]
            for it in range(1, 200, every):
                norms = [k * it if name == 'rms' else 20 + math.sin(it) for k in (1, 2, 3)]
                lines.append(json.dumps(dict(iter=it, loss=9 / it, norms=norms)))
            (runs / name / 'log.jsonl').write_text('\n'.join([*lines, evaluation]) + '\n')
    return keep


def test_a_moving_picture_shows_the_first_120_iterations_of_a_log(run, workplace, long_logs, monkeypatch):
    long_logs(every=1)
    drawn = itertools.count()

    def savefig(fig, f, dpi):
        image = Image.new('RGB', (200, 1))
        image.putpixel((next(drawn), 0), (255, 255, 255))
        image.save(f, 'PNG')
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', savefig)
    assert plot(run, 'out/rms', 'out/raw', '--out=a.gif')[0] == 0
    with Image.open(workplace / 'a.gif') as gif:
        assert gif.n_frames == 120 == next(drawn)


def test_120_frames_of_a_moving_picture_take_less_than_1500_kilobytes(run, workplace, long_logs):
    long_logs(every=14)
    assert plot(run, 'out/rms', 'out/raw', '--out=a.gif')[0] == 0
    with Image.open(workplace / 'a.gif') as gif:
        assert gif.n_frames == 16
    assert (workplace / 'a.gif').stat().st_size < 1_500_000 * 16 / 120


def test_a_log_of_other_flags_is_left_out_of_a_moving_picture(run, runs, workplace):
    log = runs / 'raw' / 'log.jsonl'
    log.write_text(log.read_text().replace('"readout"', '"eye"', 1))
    shutil.copytree(runs / 'rms', runs / 'begun')
    (runs / 'begun' / 'log.jsonl').write_text(log.read_text().splitlines()[0] + '\n')
    code, out, err = plot(run, '--out=a.gif')
    assert code == 0 and 'raw' not in out
    assert sum('left out' in line for line in err.splitlines()) == 2 and 'eye' in err
