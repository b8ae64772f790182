"""
The theory of the blind spot, by autograd. To be read beside the paper: each test is one of its claims.

Notation: a state h = s·u has a scale s = RMS(h) and a direction u. The part of a gradient along h is the only
part that can change s; the rest turns u.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from looped import READOUTS, RECURRENCES, LoopedConfig, LoopedGPT


def make(**flags) -> LoopedGPT:
    torch.manual_seed(0)
    model = LoopedGPT(LoopedConfig(**{**dict(vocab_size=61, block_size=16, loops=4), **flags}))
    for p in model.parameters():  # weights of some size, so that nothing is small by accident
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    return model


def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(61, (3, 17), generator=g)
    return ids[:, :-1], ids[:, 1:]


def state_and_gradient(model, k):
    """h_k and dCE_k/dh_k, each (B, T, C)."""
    idx, targets = batch()
    h = model.states(idx)[k - 1].detach().requires_grad_()
    F.cross_entropy(model.readout(h, k).flatten(0, 1), targets.flatten(), reduction='sum').backward()
    return h.detach(), h.grad


def radial_share(model, k=4):
    """|<dCE/dh, h>| / (|dCE/dh| |h|) of each token, at exit k."""
    h, gradient = state_and_gradient(model, k)
    return F.cosine_similarity(gradient, h, dim=-1).abs()


def hides_the_length(model, k=4):
    """Whether exit k gives a state of fifty times the length the same logits."""
    h = model.states(batch()[0])[k - 1]
    return (model.readout(50 * h, k) - model.readout(h, k)).abs().max() < 1e-3


BLIND = {'rms', 'layernorm', 'cut'}  # rows that claim to send no gradient along the state: is yours one?


@pytest.mark.parametrize('k', [2, 4])
@pytest.mark.parametrize('readout', READOUTS)
def test_a_readout_that_hides_the_length_sends_no_gradient_along_the_state(readout, k, capsys):
    """The theorem of the blind spot, for every row of READOUTS, yours too: reports the share of the gradient
    that points along the state, and fails where it should be 0 and is not. `cut` alone sees the length and
    sends no gradient along the state: it was made to take the two apart."""
    model = make(readout=readout)
    share, hides = radial_share(model, k), hides_the_length(model, k)
    with capsys.disabled():
        print(f'\n{readout}, exit {k}: {"hides" if hides else "sees"} the length; '
              f'share of the gradient along the state {share.mean():.1e}', end=' ')
    if hides or readout in BLIND:
        assert share.max() < 1e-3


@pytest.mark.parametrize('readout, k', [('raw', 2), ('raw', 4), ('final_rms', 2), ('alpha', 4)])
def test_a_readout_that_sees_the_length_sends_a_gradient_along_the_state(readout, k):
    assert radial_share(make(readout=readout), k).mean() > 0.03


@pytest.mark.parametrize('readout, early, last', [
    ('rms', True, True), ('layernorm', True, True), ('final_rms', False, True), ('raw', False, False),
    ('cut', False, False), ('alpha', False, False)])
def test_which_exits_hide_the_length_of_a_state(readout, early, last):
    model = make(readout=readout)
    assert (hides_the_length(model, k=2), hides_the_length(model, k=4)) == (early, last)


def test_alpha_dials_the_radial_gradient_from_blind_to_raw():
    shares = [radial_share(make(readout='alpha', alpha=a)).mean() for a in (0, 0.25, 0.5, 0.75, 1)]
    assert shares[0] < 1e-3 and shares == sorted(shares)
    torch.testing.assert_close(shares[-1], radial_share(make(readout='raw')).mean())


def test_cut_removes_exactly_the_radial_part_of_the_gradient_of_raw_and_changes_no_logit():
    raw, cut = make(readout='raw'), make(readout='cut')
    h, gradient = state_and_gradient(raw, k=4)
    assert torch.equal(cut.readout(h), raw.readout(h))
    radial = (gradient * h).sum(-1, keepdim=True) * h / h.square().sum(-1, keepdim=True)
    torch.testing.assert_close(state_and_gradient(cut, k=4)[1], gradient - radial, atol=1e-6, rtol=1e-4)
    assert radial.norm() > 0.03 * gradient.norm()


@pytest.mark.parametrize('recurrence', RECURRENCES)
@pytest.mark.parametrize('g', [0.1, 10, 1e5])
def test_the_length_is_a_gauge_a_blind_model_has_a_twin_of_every_length_with_the_same_loss(g, recurrence):
    """Multiply all that writes into the state by g, and divide what reads it, the gain of the readout, by g:
    every norm is g times as large, and no loss changes. So nothing in the loss can choose the norm."""
    def twin(readout):
        model = make(readout=readout, recurrence=recurrence).double()
        for m in model.modules():
            if isinstance(m, torch.nn.RMSNorm):
                m.eps = 1e-30  # the only thing in the model that has a length of its own
        before = model(*batch())
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(('emb.weight', 'proj.weight', 'w2.weight')) or name == 'recurrence.weight':
                    p.mul_(g)
            if readout == 'rms':
                model.exposure.weight.div_(g)  # as W, which is tok_emb, has grown
        return before, model(*batch())
    before, after = twin('rms')
    torch.testing.assert_close(after.norms, g * before.norms)
    torch.testing.assert_close(after.losses, before.losses)
    before, after = twin('raw')  # sees the length: the same change of weights changes what it predicts
    assert ((after.losses - before.losses) / before.losses).abs().min() > 0.5


def test_layernorm_is_also_blind_to_the_mean_over_channels_and_rms_is_not():
    idx, targets = batch()
    share = {}
    for readout in 'rms', 'layernorm':
        model = make(readout=readout)
        h = model.states(idx)[-1].detach().requires_grad_()
        F.cross_entropy(model.readout(h).flatten(0, 1), targets.flatten()).backward()
        share[readout] = F.cosine_similarity(h.grad, torch.ones_like(h), dim=-1).abs().mean()
        moved = (model.readout(h + 10) - model.readout(h)).abs().max()
        assert moved < 1e-3 if readout == 'layernorm' else moved > 0.1
    assert share['layernorm'] < 1e-3 < 0.03 < share['rms']


@pytest.mark.parametrize('supervision', ['per_loop', 'terminal'])
def test_the_penalty_pulls_the_state_straight_towards_zero(supervision):
    """The gradient of the penalty in a state is that state, times 2·weight / (K·B·T·C)."""
    model, (idx, targets) = make(norm_penalty=0.1, supervision=supervision), batch()
    states = [h.detach().requires_grad_() for h in model.states(idx)]
    model.states = lambda idx, loops=None: states  # leaves of the graph, whose gradient can be asked for
    with_penalty = torch.autograd.grad(model(idx, targets).loss, states[1], retain_graph=True)[0]
    model.cfg.norm_penalty = 0.0
    without = torch.autograd.grad(model(idx, targets).loss, states[1], allow_unused=True)[0]
    penalty = with_penalty - (0 if without is None else without)
    torch.testing.assert_close(penalty, states[1] * 2 * 0.1 / (4 * states[1].numel()), atol=1e-7, rtol=1e-4)


def test_residual_recurrence_carries_a_factor_on_the_state_and_rms_forgets_it():
    h, h_0 = torch.randn(2, 2, 5, 64)
    residual, rms, damped = (make(recurrence=r) for r in ('residual', 'rms', 'damped'))
    assert torch.equal(residual.carry(50 * h, h_0, 2), 50 * residual.carry(h, h_0, 2))
    torch.testing.assert_close(rms.carry(50 * h, h_0, 2), rms.carry(h, h_0, 2), atol=1e-4, rtol=1e-4)
    ratio = damped.carry(h, h_0, 2).norm() / h.norm()
    assert ratio < 1
    torch.testing.assert_close(damped.carry(50 * h, h_0, 2).norm() / h.norm(), 50 * ratio)


def test_a_large_state_grows_by_steps_of_constant_length_and_turns_as_one_over_its_scale():
    """Pre-norm blocks see u alone: for h = s·u the update does not depend on s, so against h it fades as 1/s.
    This is why nothing in the recurrence itself pulls a scale back that has run away."""
    model = make()
    u = torch.randn(1, 16, 64)
    u = u / u.norm(dim=-1, keepdim=True)
    lengths, turns = [], []
    for s in 1e4, 2e4, 4e4:
        h = s * u
        after = model.step(h, h_0=u, k=2)
        lengths.append((after - h).norm(dim=-1).mean().item())
        turns.append((F.normalize(after, dim=-1) - u).norm(dim=-1).mean().item())
    assert lengths == pytest.approx([lengths[0]] * 3, rel=0.02)
    assert [turns[0], 2 * turns[1], 4 * turns[2]] == pytest.approx([turns[0]] * 3, rel=0.05)


def test_the_state_of_a_bfloat16_run_stays_in_float32():
    """A state of norm 20,000 that moves by 5: bfloat16, with its 8 bits, would not notice."""
    model = make(n_embd=64)
    h = torch.full((1, 4, 64), 20000 / math.sqrt(64))
    direction = torch.randn(64)
    step = 5 * direction / direction.norm()
    for p in (model.blocks[0].proj, model.blocks[0].w2):
        torch.nn.init.zeros_(p.weight)
    block = model.blocks[0]
    block.w2.forward = lambda x: step.to(x.dtype).expand(1, 4, 64)  # the block's update is now known
    with torch.autocast('cpu', torch.bfloat16):
        after = block(h)
    assert after.dtype == torch.float32
    assert (after - h).norm(dim=-1).mean().item() == pytest.approx(5, rel=0.01)
    with torch.autocast('cpu', torch.bfloat16):
        assert {h.dtype for h in make().states(batch()[0])} == {torch.float32}
    assert (h.bfloat16() + step.bfloat16() - h.bfloat16()).float().norm(dim=-1).mean() < 1
