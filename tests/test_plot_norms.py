"""Every diagnostic of plot_norms.py on a case whose answer is known; conditions and their looks; the figure;
the program on good and bad runs."""

import itertools
import json
import math
import shutil
import weakref
from dataclasses import dataclass

import matplotlib.figure
import pytest
import torch
import torch.nn.functional as F

import plot_norms
import train
from conftest import TEXT, TINY
from data import prepare
from looped import READOUTS, SUPERVISIONS, LoopedConfig, LoopedGPT
from plot_norms import (PANELS, PlotConfig, calibrate, conditions, confidence, depth, describe, draw,
                        drawable, exits, leave, loss_gradient, margin, radial_clamp, radial_gradient,
                        residual_expansion, scale_sensitivity, seconds, styles, tables, token_norms)
from train import TrainConfig

B, T, C, V, K = 3, 8, 32, 61, 4
DIAGNOSTICS = {name: panel.diagnostic for name, panel in PANELS.items() if panel.diagnostic}


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


def ce_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def raw_ce(model, h, targets):
    return ce_of(h @ model.tok_emb.weight.T, targets).item()


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
    model, (idx, targets) = make(double, readout='raw'), everything()
    got, h = depth(model, batches()), embedded(model, idx)
    loops = range(1, 4 * K + 1)
    assert got['norm'] == pytest.approx([h.norm(dim=-1).mean().item() * 2 ** k for k in loops], rel=1e-4)
    assert got['ce'] == pytest.approx([raw_ce(model, 2 ** k * h, targets) for k in loops], rel=1e-4)


def test_early_exits_are_read_as_they_were_trained_and_those_beyond_K_as_the_last():
    model, (idx, targets) = make(readout='final_rms'), everything()
    with torch.no_grad():
        states = model.states(idx, 4 * K)
    early = [raw_ce(model, h, targets) for h in states[:K - 1]]
    late = [ce_of(model.readout(h), targets).item() for h in states[K - 1:]]
    assert depth(model, batches())['ce'] == pytest.approx(early + late, rel=1e-4)
    margins, ce = confidence(model, batches())
    assert ce.mean(1).tolist() == pytest.approx(early + late[:1], rel=1e-4)
    torch.testing.assert_close(margins[1], margin(states[1] @ model.tok_emb.weight.T))


def test_scale_sensitivity_is_flat_for_a_blind_readout_and_a_formula_for_raw():
    blind = scale_sensitivity(make(readout='rms'), batches())
    assert min(blind['factor']) == pytest.approx(0.1) and max(blind['factor']) == pytest.approx(10)
    assert max(blind['ce']) - min(blind['ce']) < 1e-3
    model = make(lambda h: h, readout='raw')
    raw, (idx, targets) = scale_sensitivity(model, batches()), everything()
    h = embedded(model, idx)
    assert raw['ce'] == pytest.approx([raw_ce(model, a * h, targets) for a in raw['factor']], rel=1e-4)
    assert max(raw['ce']) - min(raw['ce']) > 1


def test_radial_gradient_is_zero_for_a_blind_readout_and_a_formula_for_raw():
    for readout in 'rms', 'cut':
        got = radial_gradient(make(readout=readout), batches())
        assert max(got['share']) < 1e-3 and max(map(abs, got['slope'])) < 1e-3
    mixed = radial_gradient(make(readout='final_rms'), batches())['share']
    assert min(mixed[:-1]) > 0.03 and mixed[-1] < 1e-3
    model, (idx, targets) = make(lambda h: 0.5 * h, readout='raw'), everything()
    for k, share in enumerate(radial_gradient(model, batches())['share'], 1):
        h, W = 0.5 ** k * embedded(model, idx), model.tok_emb.weight
        grad = ((h @ W.T).softmax(-1) - F.one_hot(targets, V)) @ W
        want = (grad * h).sum(-1).abs() / (grad.norm(dim=-1) * h.norm(dim=-1))
        assert share == pytest.approx(want.mean().item(), rel=1e-3)


@pytest.mark.parametrize('readout', ['raw', 'alpha', 'final_rms'])
def test_the_slope_is_what_cross_entropy_changes_by_when_every_state_grows_by_a_small_factor(readout):
    model, (idx, targets), eps = make(readout=readout).double(), everything(), 1e-5
    for k, slope in enumerate(radial_gradient(model, batches())['slope'], 1):
        h = model.states(idx)[k - 1]
        up, down = (ce_of(model.readout(h * math.exp(e), k), targets).item() for e in (eps, -eps))
        assert slope == pytest.approx((up - down) / (2 * eps), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize('flags', [dict(), dict(readout='raw', norm_penalty=0.1), dict(loops=1),
                                   dict(readout='alpha', supervision='terminal', inject=0.5),
                                   dict(readout='final_rms', recurrence='damped', norm_penalty=0.01)])
def test_the_gradient_of_the_whole_loss_is_that_of_the_formula_through_all_later_loops(flags):
    model, (idx, targets) = make(**flags).double(), batches(1)[0]
    got, cfg, states = loss_gradient(model, [(idx, targets)]), model.cfg, model.states(idx)
    ce = [ce_of(model.readout(h, k), targets) for k, h in enumerate(states, 1)]
    loss = sum(weight * x for weight, x in zip(SUPERVISIONS[cfg.supervision](cfg.loops), ce))
    loss = loss + cfg.norm_penalty * torch.stack([h.square().mean() for h in states]).mean()

    def cosines(gradients):
        return [F.cosine_similarity(g, h, dim=-1, eps=1e-20) for g, h in zip(gradients, states)]
    whole = cosines(torch.autograd.grad(loss, states, retain_graph=True))
    own = cosines(torch.autograd.grad(x, h, retain_graph=True)[0] for x, h in zip(ce, states))
    assert got['signed'] == pytest.approx([c.mean().item() for c in whole], abs=1e-9)
    assert got['whole'] == pytest.approx([c.abs().mean().item() for c in whole], abs=1e-9)
    assert got['own'] == pytest.approx([c.abs().mean().item() for c in own], abs=1e-9)
    shape = [(cfg.loops - k) / h.norm(dim=-1).mean().item() for k, h in enumerate(states, 1)]
    if cfg.loops > 1:
        assert got['bound'] == pytest.approx([got['whole'][0] * s / shape[0] for s in shape])


def test_through_rms_later_exits_act_on_the_norm_where_an_exit_itself_does_not():
    got = loss_gradient(make(readout='rms').double(), batches())
    assert max(got['own']) < 1e-6 < 1e-3 < min(got['whole'][:-1]) and got['whole'][-1] < 1e-6


def test_a_state_that_no_loss_reaches_has_a_gradient_of_0():
    """Terminal, in a fork that stops the gradient between loops."""
    model = make(readout='raw', supervision='terminal')
    model.carry = lambda h, h_0, k: h_0 if k == 1 else h.detach()
    whole = loss_gradient(model, batches())['whole']
    assert whole[:-1] == [0] * (K - 1) and whole[-1] > 1e-3


def test_the_update_of_a_loop_that_adds_along_the_state_and_of_one_that_turns_it():
    model, (idx, _) = make(lambda h: h + 3 * F.normalize(h, dim=-1)), everything()
    got = residual_expansion(model, batches())
    assert got['increment'] == pytest.approx([3] * 29, rel=1e-3) and max(got['turn_times_scale']) < 1e-3
    assert got['update'] == pytest.approx([3 / C ** 0.5, 0, 3 / C ** 0.5], abs=1e-3)
    got, norm = residual_expansion(make(turn), batches()), embedded(model, idx).norm(dim=-1).mean().item()
    chord, parts = 2 * math.sin(0.15), (math.cos(0.3) - 1, math.sin(0.3), 2 * math.sin(0.15))
    assert got['update'] == pytest.approx([part * norm / C ** 0.5 for part in parts], rel=1e-3)
    assert got['turn_times_scale'] == pytest.approx([chord * norm] * 29, rel=1e-3)
    model.step = lambda h, h_0, k, cache=None: h * (100 if k <= 10 else 1)  # the updates up to h_10
    assert residual_expansion(model, batches())['update'] == pytest.approx([0, 0, 0], abs=1e-3)


def test_the_clamp_undoes_a_loop_that_only_scales_and_does_nothing_to_one_that_only_turns():
    model = make(double, readout='raw')
    got, free = radial_clamp(model, batches()), depth(model, batches())
    assert got['change'] == pytest.approx([free['ce'][0] - ce for ce in free['ce'][:K]], abs=1e-4)
    assert got['ratio'] == pytest.approx([0.5 ** k for k in range(K)], rel=1e-4)
    got = radial_clamp(make(turn, readout='raw'), batches())
    assert got['change'] == pytest.approx([0] * K, abs=1e-5) and got['ratio'] == pytest.approx([1] * K)


def test_a_clamped_state_is_what_the_next_loop_is_fed():
    model, (idx, targets) = make(lambda h: h + 1, readout='raw'), everything()
    free = model.states(idx)
    h, want = free[0], [0.0]
    for k in range(1, K):
        h = F.normalize(h + 1, dim=-1) * free[0].norm(dim=-1, keepdim=True)
        want.append(raw_ce(model, h, targets) - raw_ce(model, free[k], targets))
    assert radial_clamp(model, batches())['change'] == pytest.approx(want, abs=1e-4)


def test_token_norms_are_the_quantiles_and_the_mean_of_states_of_known_length():
    model = make()
    lengths = torch.randperm(101, generator=torch.Generator().manual_seed(0)) + 1.0
    model.states = lambda idx: [F.one_hot(torch.zeros(1, 101, dtype=torch.int64), C) * lengths[:, None]]
    got = token_norms(model, batches(1))
    assert got['share'] == pytest.approx([i / 100 for i in range(101)])
    assert got['norm'] == pytest.approx([i + 1 for i in range(101)]) and got['mean'] == [51]


def test_a_sequence_leaves_where_its_margin_passes_and_as_early_as_one_percent_of_perplexity_allows():
    assert margin(torch.tensor([[[1.0, 5.0, 3.0], [0.0, 0.0, -1.0]]])).tolist() == [1.0]
    margins = torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    ce = torch.tensor([[9.0, 9.0, 1.0], [2.0, 9.0, 9.0], [9.0, 6.0, 9.0]])
    assert [x.item() for x in leave(margins, ce, 1.5)] == [2, 3]  # loops 2, 3, 1
    assert [x.item() for x in leave(margins, ce, math.inf)] == [3, 8]
    margins = torch.tensor([[5.0, 4.0, 1.0, 0.5], [9.0, 9.0, 9.0, 9.0]])
    for more, threshold in (0.0, -1), (0.009, -1), (0.015, 1), ([0.0, 0.0, 0.1, 0.1], 1), (1.0, 5):
        ce = torch.full((2, 4), 2.0)
        ce[0] += torch.tensor(more)
        assert calibrate(margins, ce) == threshold


@pytest.mark.parametrize('flags', [dict(readout='rms'), dict(readout='raw', inject=1.0),
                                   dict(readout='final_rms', recurrence='rms')])
def test_the_loops_that_are_timed_are_those_that_halting_would_run(flags):
    model, (idx, targets) = make(**flags), batches(1)[0]
    with torch.no_grad():
        margins = torch.stack([margin(model.readout(h, k)) for k, h in enumerate(model.states(idx), 1)])
        step, ran = model.step, []
        model.step = lambda h, h_0, k: ran.append(len(h)) or step(h, h_0, k)
        for threshold in (0.0, margins[:-1].median().item() + 1e-4, math.inf):
            assert seconds(model, [(idx, targets)], 1, threshold) > 0
            assert sum(ran) == pytest.approx(B * leave(margins, margins, threshold)[0].item())
            ran.clear()
        seconds(model, [(idx, targets)], 3, -1.0)  # all leave at exit 3, the first that is read
        assert ran == [B, B, B]


def test_the_threshold_is_chosen_on_every_other_batch_and_all_that_is_reported_is_of_the_rest(monkeypatch):
    data, asked = batches(4), []
    chosen = torch.tensor([[[5.0, 4.0, 1.0, 0.5], [9.0] * 4], [[2.0, 2.0, 2.1, 2.1], [2.0] * 4]])
    rest = torch.tensor([[[0.9, 3.0], [9.0] * 2], [[1.0, 3.5], [2.0] * 2]])  # (2, K, N)

    def confidence(model, half):
        asked.append([idx for idx, _ in half])
        return [chosen, rest][len(asked) - 1]

    def seconds(model, half, first, threshold):
        asked.append([idx for idx, _ in half])
        return {(2, math.inf): 6.0, (1, 1.0): 2.0}[first, threshold]  # exit K alone, and halting
    monkeypatch.setattr(plot_norms, 'confidence', confidence)
    monkeypatch.setattr(plot_norms, 'seconds', seconds)
    got = exits(make(loops=2), data)
    halves = [[id(idx) for idx, _ in data[i::2]] for i in (0, 1, 1, 1)]
    assert [list(map(id, half)) for half in asked] == halves
    assert got['halting'] == pytest.approx([1.5, math.exp(2.75), 3])  # the threshold is 1
    assert got['perplexity'] == pytest.approx([math.exp(2.25), math.exp(2)])


# What a fork does is what is measured


def test_a_forks_own_carry_and_step_are_what_is_measured():
    """Fed nothing but h_0, every loop gives the same state, and no exit is reached through a later loop."""
    model = make(readout='raw')
    assert max(map(abs, residual_expansion(model, batches())['increment'])) > 1
    assert max(map(abs, radial_clamp(model, batches())['change'])) > 0.01
    model.carry = lambda h, h_0, k: h_0
    assert residual_expansion(model, batches())['increment'] == pytest.approx([0] * 29, abs=1e-4)
    assert radial_clamp(model, batches())['change'] == pytest.approx([0] * K, abs=1e-5)
    assert len(set(depth(model, batches())['norm'])) == 1
    got = loss_gradient(model, batches())
    assert got['whole'] == pytest.approx(got['own'], abs=1e-6)
    model.step = lambda h, h_0, k, cache=None: h_0.roll(k, dims=-1)  # one norm, and directions by k
    assert radial_clamp(model, batches())['change'] == pytest.approx([0] * K, abs=1e-5)


def test_a_softcap_in_readout_changes_every_diagnostic_that_reads_logits_and_no_other():
    plain, capped = make(readout='raw'), make(readout='raw')
    capped.readout = lambda h, k=None: 2 * torch.tanh(plain.readout(h, k) / 2)
    changed = set()
    for panel, diagnostic in DIAGNOSTICS.items():
        before, after = diagnostic(plain, batches()), diagnostic(capped, batches())
        for measured in before, after:
            if panel == 'exits':
                measured['halting'].pop()  # the speed, which is another each time
        changed |= {f'{panel} {key}' for key in before if before[key] != after[key]}
    assert changed == {'depth ce', 'scale_sensitivity ce', 'radial_gradient share', 'radial_gradient slope',
                       'loss_gradient whole', 'loss_gradient signed', 'loss_gradient own',
                       'loss_gradient bound', 'radial_clamp change', 'exits perplexity', 'exits halting'}


@pytest.mark.parametrize('panel', DIAGNOSTICS)
def test_the_logits_of_one_exit_are_there_at_a_time(panel):
    model, alive, most = make(loops=12), [], 0
    readout = model.readout

    def watch(tensor):
        nonlocal most
        if tensor.numel() == B * T * V:  # logits, or what autograd keeps of them
            alive.append(weakref.ref(tensor.untyped_storage()))
            most = max(most, sum(ref() is not None for ref in alive))
        return tensor
    model.readout = lambda h, k=None: watch(readout(h, k))
    model.recompute()  # as `measure` does
    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        DIAGNOSTICS[panel](model, batches())
    assert most <= 3  # this one, the one before it that a name still holds, and a softmax


@pytest.mark.parametrize('panel', DIAGNOSTICS)
def test_every_diagnostic_measures_a_model_in_double_precision_and_one_of_a_single_loop(panel):
    single, precise = DIAGNOSTICS[panel](make(), batches()), DIAGNOSTICS[panel](make().double(), batches())
    for key in set(single) - {'halting'}:
        got, want = torch.tensor(single[key]), torch.tensor(precise[key])
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    DIAGNOSTICS[panel](make(loops=1), batches())


# ------------------------------------------------------------------------------------------------------------
# Conditions and their looks


@dataclass
class Forked(TrainConfig):
    gate: bool = False
    warmth: float = 1.0


def result(norm=1.0, iteration=None, changed=None, config=TrainConfig, **flags):
    cfg = config(**flags)
    norms, losses = [norm] * cfg.loops, [2.0 - k / 10 for k in range(cfg.loops)]
    log = [dict(iter=0, norms=norms, val_losses=losses), dict(iter=1, loss=5.0, norms=norms)]
    log += [dict(iter=7, changed=changed)] if changed else []
    return describe(cfg, cfg.max_iters if iteration is None else iteration, log)


def groups(*results):
    return conditions([*results, result(readout='cut')])[1]  # one that shares no flag


@pytest.mark.parametrize('flags, label', [
    (dict(seed=7, device='cpu', out_dir='x', log_interval=3), 'per-loop + rms'),
    (dict(readout='raw', supervision='terminal'), 'terminal + raw'),
    (dict(readout='final_rms'), 'per-loop + final_rms'),
    (dict(readout='alpha', alpha=1.0), 'per-loop + alpha, alpha 1.0'),
    (dict(norm_penalty=0.01, recurrence='damped', loops=4),
     'per-loop + rms, loops 4, recurrence damped, norm_penalty 0.01'),
    (dict(learning_rate=0.003, output_bias='unigram', dataset='my/text'),
     'per-loop + rms, output_bias unigram, dataset my/text, learning_rate 0.003'),
    (dict(config=Forked), 'per-loop + rms'),
    (dict(config=Forked, gate=True, warmth=0.5), 'per-loop + rms, gate True, warmth 0.5'),
    (dict(iteration=300), 'per-loop + rms, stopped at 300'),
    (dict(changed=dict(inject=1.0), inject=1.0), 'per-loop + rms, inject 1.0, changed at 7'),
    (dict(changed=dict(max_iters=1600)), 'per-loop + rms'),  # it goes on as it would have anyway
    (dict(eval_iters=7), 'per-loop + rms, eval_iters 7')])
def test_a_condition_is_named_after_all_that_changes_its_result(flags, label):
    assert list(groups(result(**flags)))[0] == label


def test_flags_that_all_runs_share_stand_once():
    same = dict(loops=4, weight_decay=0.5)
    shared, by_label = conditions([result(**same), result(**same, seed=2),
                                   result(**same, readout='raw', inject=1.0)])
    assert shared == 'loops 4, weight_decay 0.5'
    assert {k: len(v) for k, v in by_label.items()} == {'per-loop + rms': 2, 'per-loop + raw, inject 1.0': 1}
    assert 'All runs: loops 4, weight_decay 0.5.' in tables(shared, by_label, ['training'])


def test_seeds_are_averaged_in_the_table():
    runs = [result(10.0), result(20.0, seed=2), result(5.0, readout='raw'), result(loops=1)]
    for run in runs:
        run['token_norms'] = dict(norm=list(range(101)), mean=[7.0])
    by_label = conditions(runs)[1]
    assert '| per-loop + raw | 1 | 7.0 | 50.0 | 99.0 | 100.0 |' in tables('', by_label, ['token_norms'])
    table = tables('', by_label, ['training']).splitlines()
    assert len(table) == 9
    assert table[6:9] == [
        '| per-loop + rms | 2 | 15.0 ± 7.1 | 2.000 ± 0.000 | 1.700 ± 0.000 | 1.300 ± 0.000 |',
        '| per-loop + raw | 1 | 5.0 | 2.000 | 1.700 | 1.300 |',
        '| per-loop + rms, loops 1 | 1 | 1.0 | 2.000 | 2.000 | 2.000 |']


def test_every_condition_has_a_colour_of_its_own_and_those_of_the_paper_theirs(monkeypatch):
    monkeypatch.setitem(READOUTS, 'mine', READOUTS['raw'])

    def looks(*many):
        return [style for style, _ in styles(conditions([result(**flags) for flags in many])[1])]
    sweep = [dict(weight_decay=0.1 * i) for i in range(1, 20)]
    drawn = looks(dict(), *sweep, dict(readout='mine'), dict(recurrence='rms'), dict(supervision='terminal'),
                  dict(readout='raw'), dict(norm_penalty=0.01))
    assert len({str(look['color']) for look in drawn}) == len(drawn)
    rms, raw = looks(dict(), dict(readout='raw'))
    assert (rms['color'], raw['color']) == (drawn[0]['color'], drawn[-2]['color'])
    assert [look['linestyle'] for look in drawn[-4:]] == ['-', '--', '-', '-']


# ------------------------------------------------------------------------------------------------------------
# Drawing


def axes(conditions_, panel, key):
    row, = (row for row in PANELS[panel].rows if row.key == key)
    ax = matplotlib.figure.Figure().add_subplot(xscale=row.xscale, yscale=row.yscale)
    lines = [(dict(color='red'), [dict(r, config=dict(loops=K)) for r in runs]) for runs in conditions_]
    row.draw(ax, lines, panel, row)
    return ax


def test_seeds_logged_at_other_intervals_are_averaged_where_both_have_a_line():
    often, seldom = dict(iter=[1, 2, 3, 4], norm=[1.0, 2.0, 3.0, 4.0]), dict(iter=[2, 4], norm=[4.0, 8.0])
    ax = axes([[dict(training=often), dict(training=seldom)]], 'training', 'norm')
    assert ax.lines[0].get_xydata().tolist() == [[2, 3], [4, 6]]
    assert ax.collections[0].get_paths()[0].get_extents().extents.tolist() == [2, 2, 4, 8]


def test_rounding_and_a_gradient_stand_far_apart_on_an_axis_that_is_always_the_same():
    shares = [0.0, 1e-8, 1e-8, 2e-8], [0.07, 0.07, 0.07, 0.08]
    for some in shares[:1], shares[1:], shares:
        ax = axes([[dict(radial_gradient=dict(share=values))] for values in some], 'radial_gradient', 'share')
        assert ax.get_ylim() == (1e-9, 1)
    curve, dot = ax.lines[:2]
    assert curve.get_ydata().tolist() == [1e-9, 1e-8, 1e-8, 2e-8]  # 0 is at the bottom
    assert dot.get_xydata().tolist() == [[K, 2e-8]]


def test_a_curve_that_explodes_leaves_the_others_in_view():
    low, high = axes([[dict(depth=dict(ce=ce))] for ce in (
        [2.0, 1e6, 1e30, math.inf], [2.0, 2.1, 2.2, 2.3])], 'depth', 'ce').get_ylim()
    assert 1.5 < low < 2 and 2.3 < high < 5


def test_the_quadrant_has_one_point_per_run():
    runs = [dict(training=dict(norms=[1.0, norm], val_losses=[2.2, 2.0])) for norm in (10.0, 3000.0)]
    ax = axes([runs], 'quadrant', 'norms')
    points = [line.get_xydata()[0].tolist() for line in ax.lines[:2]]
    assert points == [pytest.approx([10, 0.2]), pytest.approx([3000, 0.2])]
    assert (ax.get_xlim(), ax.get_ylim()) == ((1, 1e4), (-0.05, 0.3))


def measured(run: dict, model: LoopedGPT) -> dict:
    return run | {panel: diagnostic(model, batches()) for panel, diagnostic in DIAGNOSTICS.items()}


@pytest.mark.filterwarnings('ignore::RuntimeWarning', 'ignore::UserWarning')
def test_no_panel_and_no_table_fails_on_numbers_that_are_not_finite(tmp_path):
    """Two models that overflow beside a sound one of a single loop."""
    grown = measured(result(math.inf, readout='raw', loops=K), make(lambda h: 1e12 * h, readout='raw'))
    broken = measured(result(math.nan, readout='cut', loops=K), make(lambda h: math.nan * h, readout='cut'))
    sound = measured(result(loops=1), make(loops=1))
    _, by_label = conditions([grown, broken, sound])
    draw('', by_label, list(PANELS), tmp_path / 'x.png')
    assert (tmp_path / 'x.png').stat().st_size > 10_000
    text = tables('', by_label, list(PANELS))
    assert text.count('\n| per-loop') == 3 * sum(panel.columns != [] for panel in PANELS.values())


@pytest.mark.filterwarnings('error')
def test_a_name_is_drawn_literally_whatever_it_holds(tmp_path):
    assert drawable('a$x$, $b', 46) == r'a\$x\$, \$b' and drawable('中 é я', 46) == r'\u4e2d é я'
    many = groups(*(result(dataset=name) for name in ('a$x$', 'a$b', '中文', 'é\n', '|', '$' * 300)))
    draw('dataset $x$ 中', many, ['training', 'quadrant'], tmp_path / 'x.svg')
    assert 'a$x$' in (tmp_path / 'x.svg').read_text()  # beside its glyphs matplotlib notes what they say


@pytest.mark.parametrize('panels', [PlotConfig().panels.split(','), list(PANELS)])
def test_no_title_or_label_overlaps_another(monkeypatch, tmp_path, panels):
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', lambda self, *_, **__: figures.append(self))
    runs = [measured(result(readout=readout), make(readout=readout)) for readout in ('rms', 'raw')]
    draw('', conditions(runs)[1], panels, tmp_path / 'x.png')
    figures[0].draw_without_rendering()  # every text is then where it will be
    texts = [text for ax in figures[0].axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label)]
    for a, b in itertools.combinations(texts, 2):
        assert not a.get_window_extent().overlaps(b.get_window_extent()), (a, b)


# ------------------------------------------------------------------------------------------------------------
# The program

RUNS = {'rms': (), 'rms2': ('--seed=2',), 'raw': ('--readout=raw',)}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Three runs under out/, and their corpus, trained once for all tests here."""
    folder = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(prepare, 'DATA', folder / 'data')
        prepare.DATA.mkdir()
        (folder / 'text.txt').write_text(TEXT)
        for name, flags in RUNS.items():
            train.main(['--dataset=text.txt', *TINY, *flags, f'--out_dir=out/{name}'])
    return folder


@pytest.fixture
def plot(run, trained, workplace):
    """plot(flags…) in a folder with those three runs -> (exit code, stdout, stderr)"""
    shutil.copytree(trained / 'out', workplace / 'out')
    prepare.prepare('text.txt', 256)
    return lambda *argv: run(plot_norms.main, '--eval_iters=2', '--device=cpu', *argv)


def change_checkpoint(folder, change):
    state = torch.load(folder / 'ckpt.pt', weights_only=True)
    change(state)
    torch.save(state, folder / 'ckpt.pt')


def test_a_newcomer_gets_a_figure_of_four_panels_numbers_and_tables(plot, workplace, monkeypatch):
    recomputed = []
    monkeypatch.setattr(LoopedGPT, 'recompute', lambda self: recomputed.append(self))
    code, out, err = plot()
    assert code == 0, err
    assert len(recomputed) == 3  # what was trained within memory is measured within it
    assert ', loops 3, ' in out and '| per-loop + rms | 2 |' in out and '| per-loop + raw | 1 |' in out
    assert '[1/3] out/raw' in err and '[3/3]' in err and err.count('\n') == 4
    assert (workplace / 'blind_spot.png').read_bytes()[:4] == b'\x89PNG'
    numbers = json.loads((workplace / 'blind_spot.json').read_text())
    results = [r for runs in numbers.values() for r in runs]
    assert sorted(r['path'] for r in results) == ['out/raw', 'out/rms', 'out/rms2']
    for r in results:
        assert set(DIAGNOSTICS) & set(r) == {'scale_sensitivity', 'radial_gradient'}
        assert r['training']['iter'] == [0, 1, 2, 3, 4, 5, 6]


def test_all_panels_print_the_papers_tables_for_runs_of_one_loop_and_of_three(run, plot, workplace):
    assert run(train.main, '--dataset=text.txt', *TINY, '--loops=1', '--out_dir=out/one')[0] == 0
    code, out, err = plot('out/one', 'out/rms', 'out/rms2', '--panels=all', '--out=all.png')
    assert code == 0, err
    for heading in ('norm at K', 'CE at exit 1', 'median', 'p99', 'max', 'r_1', 'r_K', 'g_K', 'a_rad',
                    'norm at K over unclamped', 'perplexity at exit 1', 'loops with halting'):
        assert f'| {heading}' in out, heading
    assert out.count('| condition |') == out.count('loops 1 | 1 |') == 7
    for table in out.split('\n\n')[2::2]:
        widths = {line.replace(r'\|', '').count('|') for line in table.strip().splitlines()[:4]}
        assert len(widths) == 1
    for group in json.loads((workplace / 'all.json').read_text()).values():
        assert set(DIAGNOSTICS) < set(group[0])


@pytest.mark.parametrize('flag', ['--out=a.xyz', '--out=nowhere/a.png', '--panels=dept', '--eval_iters=1',
                                  '--device=meta'])
def test_a_flag_that_cannot_work_is_one_line(run, flag):
    code, _, err = run(plot_norms.main, flag)
    assert code in (1, 2) and err.count('\n') == 1 and flag.split('=')[1] in err


def test_bad_runs_are_named_in_one_line_and_the_rest_is_drawn(plot, workplace):
    runs = workplace / 'out'
    for name in 'cut', 'young', 'early', 'foreign', 'moved', 'rms_copy':
        shutil.copytree(runs / 'rms', runs / name)
    (runs / 'cut' / 'ckpt.pt').write_bytes((runs / 'cut' / 'ckpt.pt').read_bytes()[:1000])
    (runs / 'young' / 'ckpt.pt').unlink()
    change_checkpoint(runs / 'early', lambda state: state.update(log=state['log'][:1]))
    change_checkpoint(runs / 'foreign', lambda state: state['config'].update(eye='of a fork'))
    change_checkpoint(runs / 'moved', lambda state: state['config'].update(dataset='moved.txt'))
    code, out, err = plot('--panels=depth,training')
    assert code == 0 and '| per-loop + rms | 2 |' in out and '| per-loop + raw | 1 |' in out
    left_out = {line.split(':')[0]: line for line in err.splitlines() if 'left out' in line}
    said = {'out/cut': 'cannot be read', 'out/foreign': "'eye'", 'out/moved': 'moved.txt',
            'out/rms_copy': 'copy of a run', 'out/early': 'stopped before its first evaluation'}
    assert set(left_out) == set(said) and all(said[name] in line for name, line in left_out.items())
    assert err.count('\n') == 8 + 5 + 1  # a folder without a checkpoint is no run
    assert 'no checkpoint' in plot('out/young', 'out/rms')[2]


def test_where_nothing_can_be_measured_the_last_line_says_so(run, plot, workplace):
    (workplace / 'text.txt').write_text('another text. ' * 3000)
    code, _, err = plot()
    assert code == 1 and err.count('left out') == 3 and 'text.txt' in err and 'none of these runs' in err
    assert plot('--panels=training')[0] == 0  # what the log has needs no text
    shutil.rmtree('out')
    code, _, err = plot()
    assert code == 1 and err.count('\n') == 1 and 'train some first' in err
