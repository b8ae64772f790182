"""Every diagnostic of plot_norms.py on a case whose answer is known, and the script on good and bad runs."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import plot_norms
import train
from conftest import TINY
from looped import LoopedConfig, LoopedGPT
from plot_norms import (calibrate, conditions, depth, exits, halt, leave_at, margin, radial_clamp, radial_gradient,
                        residual_expansion, scale_sensitivity, tables, token_norms)
from train import TrainConfig

B, T, C, V, K = 3, 8, 32, 61, 4


def make(loop=None, **flags) -> LoopedGPT:
    """A model with weights of some size; `loop` replaces what its blocks do to a state."""
    torch.manual_seed(0)
    model = LoopedGPT(LoopedConfig(vocab_size=V, block_size=T, n_embd=C, loops=K, n_layer=1, **flags))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    if loop:
        model.loop = lambda h, cache=None: loop(h)
    return model.eval()


def batches(count=4):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (count, B, T + 1), generator=g)
    return [(x[:, :-1], x[:, 1:]) for x in ids]


def embedded(model, idx):
    return model.tok_emb(idx) + model.pos_emb.weight[:idx.size(1)]


def test_depth_of_a_loop_that_doubles_the_state():
    model = make(loop=lambda h: 2 * h, readout='raw')
    got = depth(model, batches())
    assert len(got['norm']) == len(got['ce']) == 4 * K
    first = sum(2 * embedded(model, idx).norm(dim=-1).mean().item() for idx, _ in batches()) / 4
    assert got['norm'] == pytest.approx([first * 2 ** k for k in range(4 * K)], rel=1e-4)
    idx, targets = (torch.cat(x) for x in zip(*batches()))
    ce = [F.cross_entropy((2 ** k * embedded(model, idx) @ model.tok_emb.weight.T).flatten(0, 1), targets.flatten()).item()
          for k in range(1, 4 * K + 1)]
    assert got['ce'] == pytest.approx(ce, rel=1e-4)


def test_scale_sensitivity_is_flat_for_a_blind_readout_and_a_formula_for_raw():
    blind = scale_sensitivity(make(readout='rms'), batches())
    assert min(blind['factor']) == pytest.approx(0.1) and max(blind['factor']) == pytest.approx(10)
    assert max(blind['ce']) - min(blind['ce']) < 1e-3
    model = make(loop=lambda h: h, readout='raw')
    raw = scale_sensitivity(model, batches())
    idx, targets = (torch.cat(x) for x in zip(*batches()))
    for a, ce in zip(raw['factor'], raw['ce']):
        z = a * embedded(model, idx) @ model.tok_emb.weight.T
        assert ce == pytest.approx(F.cross_entropy(z.flatten(0, 1), targets.flatten()).item(), rel=1e-4)
    assert max(raw['ce']) - min(raw['ce']) > 1


def test_radial_gradient_is_zero_for_a_blind_readout_and_a_formula_for_raw():
    assert max(radial_gradient(make(readout='rms'), batches())['share']) < 1e-3
    mixed = radial_gradient(make(readout='final_rms'), batches())['share']
    assert min(mixed[:-1]) > 0.03 and mixed[-1] < 1e-3
    model = make(loop=lambda h: h, readout='raw')
    idx, targets = (torch.cat(x) for x in zip(*batches()))
    h, W = embedded(model, idx), model.tok_emb.weight
    grad = ((h @ W.T).softmax(-1) - F.one_hot(targets, V)) @ W
    want = ((grad * h).sum(-1).abs() / (grad.norm(dim=-1) * h.norm(dim=-1))).mean().item()
    assert radial_gradient(model, batches())['share'] == pytest.approx([want] * K, rel=1e-3)


def test_residual_expansion_of_a_loop_that_adds_a_constant():
    """h_k = h_0 + k·v: the norm grows by |v| in the end, and the turn times the scale fades."""
    v = torch.zeros(C)
    v[0] = 50.0
    got = residual_expansion(make(loop=lambda h: h + v), batches())
    assert len(got['increment']) == 29 and got['increment'][-1] == pytest.approx(50, rel=1e-3)
    assert got['turn'][-1] < got['turn'][0] / 100
    model = make(loop=lambda h: h + v)
    idx = torch.cat([i for i, _ in batches()])
    h1 = embedded(model, idx) + v
    h2 = h1 + v
    turn = (F.normalize(h2, dim=-1) - F.normalize(h1, dim=-1)).norm(dim=-1)
    assert got['turn'][0] == pytest.approx(turn.mean().item(), rel=1e-4)
    assert got['turn_times_scale'][0] == pytest.approx((turn * h1.norm(dim=-1)).mean().item(), rel=1e-4)
    assert got['added_to_fed'][0] == pytest.approx((50 / h1.norm(dim=-1)).mean().item(), rel=1e-4)


def test_residual_expansion_of_a_pre_norm_block_follows_lemma_2():
    """Started from a large state, a real block adds a length that settles, and turn times scale is a constant."""
    model = make(readout='rms')
    with torch.no_grad():
        model.tok_emb.weight.mul_(30000)
    got = residual_expansion(model, batches())
    update = got['turn_times_scale'][0]  # the part of an update that turns the state, from the first loop to the last
    assert update > 10 and got['turn_times_scale'] == pytest.approx([update] * 29, rel=0.05)
    assert got['increment'] == pytest.approx([got['increment'][0]] * 29, abs=0.05 * update)
    assert got['turn'][-1] < got['turn'][0]


def test_radial_clamps_on_a_loop_that_only_scales():
    """Nothing but scale happens, so both clamps leave h_1 as it is, at h_1's cross-entropy."""
    model = make(loop=lambda h: 2 * h, readout='raw')
    got, alone = radial_clamp(model, batches()), depth(model, batches())
    assert got['none']['norm'] == pytest.approx(alone['norm'][K - 1], rel=1e-4)
    assert got['none']['ce'] == pytest.approx(alone['ce'][K - 1], rel=1e-4)
    for clamp in 'frozen', 'tangent':
        assert got[clamp]['norm'] == pytest.approx(alone['norm'][0], rel=1e-4)
        assert got[clamp]['ce'] == pytest.approx(alone['ce'][0], rel=1e-4)


def test_the_tangent_clamp_keeps_an_update_across_the_state():
    """An update at right angles to the state has no radial part: the clamp does nothing."""
    def turn(h):
        return h + torch.stack((-h[..., 1::2], h[..., ::2]), -1).flatten(-2)
    got = radial_clamp(make(loop=turn), batches())
    assert got['tangent']['ce'] == pytest.approx(got['none']['ce'], rel=1e-4)
    assert got['tangent']['norm'] == pytest.approx(got['none']['norm'], rel=1e-4) and got['frozen']['norm'] < got['none']['norm']


def test_token_norms_of_states_of_known_length():
    model = make()
    lengths = torch.randperm(100, generator=torch.Generator().manual_seed(0)) + 1.0
    model.states = lambda idx: [F.one_hot(torch.zeros(1, 100, dtype=torch.int64), C) * lengths[:, None]]
    got = token_norms(model, batches(1))
    assert got == pytest.approx(dict(mean=50.5, median=50, p99=99, max=100, std=math.sqrt(100 * 101 / 12)))


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


@pytest.mark.parametrize('recurrence', ['residual', 'rms'])
@pytest.mark.parametrize('readout', ['rms', 'raw', 'final_rms'])
def test_halting_gives_each_sequence_the_logits_of_its_own_depth(readout, recurrence):
    model, (idx, _) = make(readout=readout, recurrence=recurrence), batches(1)[0]
    with torch.no_grad():
        margins = torch.stack([margin(model(idx, loops=k).logits) for k in range(1, K + 1)])
        threshold = margins[:-1].median().item()
        logits, loops = halt(model, idx, threshold)
        assert (loops - 1).tolist() == leave_at(margins, threshold).tolist()
        for i, k in enumerate(loops.int().tolist()):
            torch.testing.assert_close(logits[i], model(idx, loops=k).logits[i], atol=1e-4, rtol=1e-4)


def test_exits_calibrate_on_one_half_and_report_the_other():
    model, all_batches = make(readout='raw'), batches(6)
    got = exits(model, all_batches)
    ce = [torch.stack([F.cross_entropy(model(i, loops=k).logits.flatten(0, 1), t.flatten()) for i, t in all_batches[1::2]]).mean()
          for k in range(1, K + 1)]
    assert got['perplexity'] == pytest.approx([x.exp().item() for x in ce], rel=1e-4)
    assert 1 <= got['halting']['loops'] <= K and got['halting']['tokens_per_second'] > 0
    assert len(got['tokens_per_second']) == K and min(got['tokens_per_second']) > 0


def result(norm, **config):
    return dict(config=asdict(TrainConfig(**config)), training=dict(iter=[1], norm=[norm]),
                depth=dict(norm=[norm] * 32, ce=[2.0, 0, 0, 1.5, 0, 0, 0, 1.25] + [9] * 24))


def test_seeds_are_averaged_and_conditions_are_kept_apart_by_name():
    groups = conditions([result(10.0), result(20.0, seed=2), result(5.0, readout='raw', supervision='terminal'),
                         result(1.0, readout='alpha', alpha=0.25, recurrence='damped', norm_penalty=0.01)])
    assert {k: len(v) for k, v in groups.items()} == {
        'per-loop + rms': 2, 'terminal + raw': 1, 'per-loop + alpha 0.25 + penalty 0.01, damped recurrence': 1}
    lines = tables(groups, ['depth']).splitlines()
    assert lines[2] == '| per-loop + rms | 2 | 15.0 ± 7.1 | 2.000 ± 0.000 | 1.500 ± 0.000 | 1.250 ± 0.000 |'
    assert lines[3] == '| terminal + raw | 1 | 5.0 | 2.000 | 1.500 | 1.250 |'


def test_a_flag_that_varies_is_named():
    assert list(conditions([result(1.0), result(1.0, learning_rate=1e-3)])) == [
        'per-loop + rms', 'per-loop + rms, lr 0.001']


@pytest.fixture
def runs(run, workplace):
    for flags in ['--readout=rms'], ['--readout=rms', '--seed=2'], ['--readout=raw']:
        assert run(train.main, '--dataset=text.txt', *TINY, *flags)[0] == 0
    return [workplace / 'out' / f'text-{x}-k3' for x in ('rms-residual-per_loop', 'raw-residual-per_loop')]


def test_a_newcomer_gets_table_figure_and_numbers_of_every_run_under_out(run, runs, workplace):
    code, out, err = run(plot_norms.main, '--eval_iters=4', '--device=cpu')
    assert code == 0, err
    assert '| per-loop + rms | 2 |' in out and '| per-loop + raw | 1 |' in out and out.count('| condition |') == 2
    assert (workplace / 'blind_spot.png').read_bytes()[:4] == b'\x89PNG'
    numbers = json.loads((workplace / 'blind_spot.json').read_text())
    assert len(numbers) == 3
    for measured in numbers.values():
        assert set(measured) == {'config', *plot_norms.PANELS}
        assert measured['training']['iter'] == [1, 2, 3, 4, 5, 6]
    assert '[3/3]' in err


def test_seeds_logged_at_other_intervals_are_averaged_where_both_have_a_line():
    import matplotlib.pyplot as plt
    ax = plt.figure().subplots()
    runs = [dict(training=dict(iter=[1, 2, 3, 4], norm=[1.0, 2.0, 3.0, 4.0])), dict(training=dict(iter=[2, 4], norm=[4.0, 8.0]))]
    plot_norms.draw_training([(dict(color='red'), runs)], ax)
    assert ax.lines[0].get_xydata().tolist() == [[2, 3], [4, 6]]


def test_panels_picks_what_is_measured_and_drawn(run, runs, workplace):
    code, out, _ = run(plot_norms.main, *runs, '--panels=depth,token_norms', '--eval_iters=4', '--out=a.png', '--device=cpu')
    assert code == 0 and (workplace / 'a.png').exists() and out.count('| condition |') == 1
    assert all(set(x) == {'config', 'training', 'depth', 'token_norms'} for x in json.loads((workplace / 'a.json').read_text()).values())
    code, _, err = run(plot_norms.main, '--panels=dept')
    assert code == 2 and 'residual_expansion' in err and "'dept'" in err and err.count('\n') == 1
    assert run(plot_norms.main, '--out=a.xyz')[0] == 2


def test_bad_runs_are_named_in_one_line_and_the_rest_is_drawn(run, runs, workplace):
    good, cut = runs
    (cut / 'ckpt.pt').write_bytes((cut / 'ckpt.pt').read_bytes()[:1000])
    (workplace / 'out' / 'young').mkdir()
    (workplace / 'out' / 'young' / 'log.jsonl').write_text('{}\n')
    other = workplace / 'out' / 'other'
    assert run(train.main, '--dataset=text.txt', *TINY, '--out_dir=out/other')[0] == 0
    state = torch.load(other / 'ckpt.pt', weights_only=True)
    state['config']['dataset'] = 'moved.txt'
    torch.save(state, other / 'ckpt.pt')
    code, out, err = run(plot_norms.main, '--panels=depth', '--eval_iters=2', '--device=cpu')
    assert code == 0 and '| per-loop + rms | 2 |' in out and 'raw' not in out
    left_out = {x.split()[1].rstrip(':'): x for x in err.splitlines() if 'left out' in x}
    assert 'truncated' in left_out['out/text-raw-residual-per_loop-k3'] and 'no checkpoint' in left_out['out/young']
    assert 'moved.txt' in left_out['out/other'] and len(err.splitlines()) == 6


def test_no_runs_at_all_says_what_to_do(run, workplace):
    code, _, err = run(plot_norms.main)
    assert code == 1 and err.count('\n') == 1 and 'train some first' in err
    code, _, err = run(plot_norms.main, 'nowhere')
    assert code == 1 and 'none of these runs' in err
