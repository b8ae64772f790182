"""
The theory of the blind spot, by autograd. To be read beside the paper: each test is one of its claims.

Notation: a state h = s·u has a scale s = RMS(h) and a direction u. The part of a gradient along h is the only part
that can change s; the rest turns u.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from looped import READOUTS, LoopedConfig, LoopedGPT

BLIND, SEEING = ['rms', 'layernorm'], ['raw', 'alpha']


def make(**flags) -> LoopedGPT:
    torch.manual_seed(0)
    model = LoopedGPT(LoopedConfig(**{**dict(vocab_size=61, block_size=16, loops=4), **flags}))
    for p in model.parameters():  # larger weights than at initialisation, so that nothing is small by accident
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    return model


def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(61, (3, 17), generator=g)
    return ids[:, :-1], ids[:, 1:]


def radial_share(model, k, final):
    """|<dCE/dh, h>| / (|dCE/dh| |h|), a token at a time, at exit k."""
    idx, targets = batch()
    h = model.states(idx)[k - 1].detach().requires_grad_()
    F.cross_entropy(model.readout(h, final).flatten(0, 1), targets.flatten()).backward()
    return F.cosine_similarity(h.grad, h, dim=-1).abs()


@pytest.mark.parametrize('readout', BLIND)
def test_cross_entropy_through_a_normalised_readout_has_no_gradient_along_the_state(readout):
    assert radial_share(make(readout=readout), k=4, final=True).max() < 1e-3


@pytest.mark.parametrize('readout', SEEING)
def test_cross_entropy_through_a_readout_that_sees_scale_has_a_gradient_along_the_state(readout):
    assert radial_share(make(readout=readout), k=4, final=True).mean() > 0.03


def test_final_rms_sees_scale_at_every_exit_but_the_last():
    model = make(readout='final_rms')
    assert radial_share(model, k=2, final=False).mean() > 0.03
    assert radial_share(model, k=4, final=True).max() < 1e-3


def test_alpha_dials_the_radial_gradient_from_blind_to_raw():
    shares = [radial_share(make(readout='alpha', alpha=a), k=4, final=True).mean() for a in (0, 0.25, 0.5, 0.75, 1)]
    assert shares[0] < 1e-3 and shares == sorted(shares)
    torch.testing.assert_close(shares[-1], radial_share(make(readout='raw'), k=4, final=True).mean())


def test_layernorm_is_also_blind_to_the_mean_over_channels_and_rms_is_not():
    idx, targets = batch()
    share = {}
    for readout in BLIND:
        model = make(readout=readout)
        h = model.states(idx)[-1].detach().requires_grad_()
        F.cross_entropy(model.readout(h).flatten(0, 1), targets.flatten()).backward()
        share[readout] = F.cosine_similarity(h.grad, torch.ones_like(h), dim=-1).abs().mean()
        moved = (model.readout(h + 10) - model.readout(h)).abs().max()
        assert moved < 1e-3 if readout == 'layernorm' else moved > 0.1
    assert share['layernorm'] < 1e-3 < 0.03 < share['rms']


@pytest.mark.parametrize('readout', READOUTS)
@pytest.mark.parametrize('final', [True, False])
def test_fifty_times_the_state_changes_no_logit_of_a_blind_readout(readout, final):
    model = make(readout=readout)
    h = model.states(batch()[0])[-1]
    moved = (model.readout(50 * h, final) - model.readout(h, final)).abs().max()
    blind = readout in BLIND or (readout == 'final_rms' and final)
    assert moved < 1e-3 if blind else moved > 1


@pytest.mark.parametrize('supervision', ['per_loop', 'terminal'])
def test_the_penalty_pulls_the_state_straight_towards_zero(supervision):
    """The gradient of the penalty in a state is that state, times 2·weight / (K·B·T·C)."""
    model, (idx, targets) = make(norm_penalty=0.1, supervision=supervision), batch()
    states = [h.detach().requires_grad_() for h in model.states(idx)]
    model.states = lambda idx, loops=None: states
    with_penalty = torch.autograd.grad(model(idx, targets).loss, states[1], retain_graph=True)[0]
    model.cfg.norm_penalty = 0.0
    without = torch.autograd.grad(model(idx, targets).loss, states[1], allow_unused=True)[0]
    penalty = with_penalty - (0 if without is None else without)
    torch.testing.assert_close(penalty, states[1] * 2 * 0.1 / (4 * states[1].numel()), atol=1e-7, rtol=1e-4)


def test_residual_recurrence_carries_a_factor_on_the_state_and_rms_forgets_it():
    h = torch.randn(2, 5, 64)
    residual, rms, damped = (make(recurrence=r) for r in ('residual', 'rms', 'damped'))
    assert torch.equal(residual.carry(50 * h), 50 * residual.carry(h))
    torch.testing.assert_close(rms.carry(50 * h), rms.carry(h), atol=1e-4, rtol=1e-4)
    ratio = damped.carry(h).norm() / h.norm()
    assert ratio < 1
    torch.testing.assert_close(damped.carry(50 * h).norm() / h.norm(), 50 * ratio)


def test_a_large_state_grows_by_steps_of_constant_length_and_turns_as_one_over_its_scale():
    """Pre-norm blocks see u alone: for h = s·u the update does not depend on s, so relative to h it fades as 1/s.
    This is why nothing in the recurrence itself pulls a scale back that has run away."""
    model = make()
    u = torch.randn(1, 16, 64)
    u = u / u.norm(dim=-1, keepdim=True)
    lengths, turns = [], []
    for s in 1e4, 2e4, 4e4:
        h = s * u
        after = model.loop(h)
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
