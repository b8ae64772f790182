"""looped.py against formulas written out here, and its promises as an interface."""

import copy
import itertools
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from looped import EPS, READOUTS, RECURRENCES, SUPERVISIONS, LoopedConfig, LoopedGPT

SMALL = dict(vocab_size=61, block_size=16, n_layer=2, n_head=4, n_embd=32, loops=4)


def make(**flags) -> LoopedGPT:
    torch.manual_seed(0)
    model = LoopedGPT(LoopedConfig(**{**SMALL, **flags}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    return model.eval()


def batch(B=3, T=16):
    ids = torch.randint(61, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def rms_norm(h, gain):
    return h / torch.sqrt((h ** 2).mean(-1, keepdim=True) + EPS) * gain


def layer_norm(h, gain):
    centred = h - h.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred ** 2).mean(-1, keepdim=True) + EPS) * gain


def expected_states(model, idx):
    """Section 1 of the design, by hand: explicit heads, explicit mask."""
    p, c = dict(model.named_parameters()), model.cfg
    h_0 = h = p['tok_emb.weight'][idx] + p['pos_emb.weight'][:idx.size(1)]
    states = []
    mask = torch.triu(torch.full((idx.size(1),) * 2, -math.inf), 1)
    for k in range(c.loops):
        if k and c.recurrence == 'rms':
            h = rms_norm(h, p['recurrence.weight'])
        if k and c.recurrence == 'damped':
            h = h / (1 + torch.exp(-p['recurrence.a']))
        if k:
            h = h + c.inject * h_0
        for i in range(c.n_layer):
            w = {name: p[f'blocks.{i}.{name}.weight']
                 for name in ('norm_attn', 'qkv', 'proj', 'norm_mlp', 'w1', 'w2', 'w3')}
            q, k_, v = (rms_norm(h, w['norm_attn']) @ w['qkv'].T).split(c.n_embd, dim=-1)
            heads = []
            for j in range(c.n_head):
                s = slice(j * c.n_embd // c.n_head, (j + 1) * c.n_embd // c.n_head)
                att = q[..., s] @ k_[..., s].transpose(1, 2) / math.sqrt(c.n_embd // c.n_head) + mask
                heads.append(att.softmax(-1) @ v[..., s])
            h = h + torch.cat(heads, -1) @ w['proj'].T
            m = rms_norm(h, w['norm_mlp'])
            gate = m @ w['w1'].T
            h = h + (gate * torch.sigmoid(gate) * (m @ w['w3'].T)) @ w['w2'].T
        states.append(h)
    return states


def expected_logits(model, h, final):
    readout, W = model.cfg.readout, model.tok_emb.weight
    if readout == 'rms' or readout == 'final_rms' and final:
        h = rms_norm(h, model.exposure.weight)
    elif readout == 'layernorm':
        h = layer_norm(h, model.exposure.weight)
    elif readout == 'alpha':
        h = h * (h ** 2).mean(-1, keepdim=True) ** ((model.cfg.alpha - 1) / 2)
    bias = dict(model.named_parameters()).get('output_bias')
    return h @ W.T if bias is None else h @ W.T + bias


ROWS = ['rms', 'layernorm', 'raw', 'cut', 'final_rms', 'alpha']  # those whose formulas stand above


@pytest.mark.parametrize('flags', [{}, dict(inject=0.7, output_bias='learned', init='gpt2')], ids=str)
@pytest.mark.parametrize('recurrence', ['residual', 'rms', 'damped'])
@pytest.mark.parametrize('readout', ROWS)
def test_states_logits_losses_and_norms_follow_the_equations(readout, recurrence, flags):
    model, (idx, targets) = make(readout=readout, recurrence=recurrence, alpha=0.3, **flags), batch()
    states = expected_states(model, idx)
    for got, want in zip(model.states(idx), states, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    logits = [expected_logits(model, h, k == 4) for k, h in enumerate(states, 1)]
    losses = torch.stack([-z.log_softmax(-1).gather(-1, targets[..., None]).mean() for z in logits])
    with torch.no_grad():
        out = model(idx, targets)
    torch.testing.assert_close(out.losses, losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, losses.mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.norms, torch.stack([(h ** 2).sum(-1).sqrt().mean() for h in states]))
    torch.testing.assert_close(model(idx).logits, logits[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('supervision, norm_penalty', list(itertools.product(SUPERVISIONS, [0.0, 0.01])))
@pytest.mark.parametrize('readout', READOUTS)
def test_training_gradients_are_those_of_the_plain_loss(readout, supervision, norm_penalty):
    model, (idx, targets) = make(readout=readout, supervision=supervision, norm_penalty=norm_penalty), batch()
    model.train()
    out = model(idx, targets)
    got = torch.autograd.grad(out.loss, list(model.parameters()))
    states = model.states(idx)
    losses = [F.cross_entropy(model.readout(h, k).flatten(0, 1), targets.flatten())
              for k, h in enumerate(states, 1)]
    weights = SUPERVISIONS[supervision](4)
    loss = sum(w * ce for w, ce in zip(weights, losses))
    loss = loss + norm_penalty * torch.stack([(h ** 2).mean() for h in states]).mean()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.losses, torch.stack([x for w, x in zip(weights, losses) if w]).detach())
    for g, want in zip(got, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(g, want, atol=1e-5, rtol=1e-4)


def test_the_loss_alone_carries_a_gradient():
    model, (idx, targets) = make(), batch()
    out = model.train()(idx, targets)
    assert out.loss.requires_grad and not out.losses.requires_grad and not out.norms.requires_grad
    assert model(idx).logits.requires_grad and not model(idx).norms.requires_grad


def test_the_loss_is_the_same_with_and_without_gradients():
    for supervision in 'per_loop', 'terminal':
        model, (idx, targets) = make(supervision=supervision, norm_penalty=0.1), batch()
        with torch.no_grad():
            plain = model(idx, targets)
        torch.testing.assert_close(model(idx, targets).losses, plain.losses)
        torch.testing.assert_close(model(idx, targets).loss, plain.loss)
        torch.testing.assert_close(model.train()(idx, targets).loss, plain.loss)


def test_terminal_supervision_reads_out_once_in_training_and_everywhere_in_eval():
    model, (idx, targets) = make(supervision='terminal'), batch()
    read = []
    model.readout = lambda h, k=None: read.append(k) or LoopedGPT.readout(model, h, k)
    assert model.train()(idx, targets).losses.shape == (1,) and read == [None]
    with torch.no_grad():
        assert model.eval()(idx, targets).losses.shape == (4,)
    assert read[1:] == [1, 2, 3, None]


@pytest.mark.parametrize('readout', READOUTS)
def test_training_evaluation_and_sampling_go_through_readout_and_carry(readout):
    """A softcap in readout, and a carry that forgets the state: the loss, eval and generation have them."""
    model, (idx, targets) = make(readout=readout, dropout=0.0), batch()
    plain = model(idx, targets).losses
    model.readout = lambda h, k=None: 2 * torch.tanh(LoopedGPT.readout(model, h, k) / 2)
    z = [model.readout(h, k if k < 4 else None) for k, h in enumerate(model.states(idx), 1)]
    want = torch.stack([F.cross_entropy(x.flatten(0, 1), targets.flatten()) for x in z]).detach()
    for got in model(idx, targets), model.train()(idx, targets):
        torch.testing.assert_close(got.losses, want)
        assert (got.losses - plain).abs().min() > 0.01
    model.eval()
    torch.testing.assert_close(model(idx).logits, z[-1])
    assert model(idx).logits.abs().max() <= 2
    model.carry = lambda h, h_0, k: h_0
    states = model.states(idx)
    assert torch.equal(states[0], states[3]) and torch.equal(model(idx, targets).norms[:1].expand(4), model(idx).norms)


def test_a_target_of_minus_100_is_left_out_of_the_loss_in_training_and_in_eval():
    model, (idx, targets) = make(), batch()
    targets = targets.clone()
    targets[:, 5:] = -100
    logits = model.readout(model.states(idx)[-1])
    want = F.cross_entropy(logits[:, :5].flatten(0, 1), targets[:, :5].flatten())
    for got in model.train()(idx, targets), model.eval()(idx, targets):
        torch.testing.assert_close(got.losses[-1], want.detach())


def test_a_model_in_double_precision_can_be_checked_against_finite_differences_even_twice():
    """The attention of the CPU has no second derivative but in its plain form."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    model = make(readout='raw', n_embd=8, n_layer=1, loops=2, norm_penalty=0.1).double().train()
    idx, targets = batch(B=1, T=3)
    w = model.blocks[0].norm_mlp.weight

    def loss(value):
        return torch.func.functional_call(model, {'blocks.0.norm_mlp.weight': value}, (idx, targets)).loss
    with sdpa_kernel(SDPBackend.MATH):
        assert loss(w).dtype == torch.float64
        assert torch.autograd.gradcheck(loss, w) and torch.autograd.gradgradcheck(loss, w)


def test_recomputing_backward_keeps_no_logits_whatever_the_number_of_exits():
    """From K = 2 to 6, what autograd saves grows by no (B, T, V) tensor, nor by any of half that size."""
    saved, V = {}, 20000
    for loops in 2, 6:
        model = make(vocab_size=V, n_layer=1, loops=loops, block_size=64).train()
        model.recompute()
        idx = torch.randint(V, (8, 64))
        big = {}

        def pack(t):
            if t.numel() >= 8 * 64 * V // 2:
                big[t.data_ptr()] = t.numel()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(idx, idx)
        saved[loops] = sum(big.values())
    assert saved[2] == saved[6]


def test_recomputing_changes_no_gradient_and_keeps_one_state_per_loop():
    sizes, grads = {}, {}
    for on in False, True:
        model, (idx, targets) = make(dropout=0.1).train(), batch()
        if on:
            model.recompute()
        saved = {}

        def pack(t):
            saved[t.data_ptr()] = t.numel()
            return t
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(idx, targets).loss
        sizes[on] = sum(saved.values())
        grads[on] = torch.autograd.grad(loss, list(model.parameters()))
    assert sizes[True] < sizes[False] / 3
    for a, b in zip(grads[True], grads[False]):
        torch.testing.assert_close(a, b)


def test_no_position_sees_a_later_one():
    model, (idx, _) = make(), batch()
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    for a, b in zip(model.states(idx), model.states(changed)):
        torch.testing.assert_close(a[:, :9], b[:, :9])
        assert (a[:, 9:] - b[:, 9:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize('recurrence', RECURRENCES)
def test_a_run_at_3_loops_is_the_prefix_of_a_run_at_5(recurrence):
    model, (idx, _) = make(recurrence=recurrence), batch()
    for a, b in zip(model.states(idx, loops=3), model.states(idx, loops=5)):
        assert torch.equal(a, b)
    assert len(model.states(idx, loops=1)) == 1 and len(model.states(idx)) == 4


def test_the_last_loop_run_is_the_final_one_of_final_rms():
    model, (idx, _) = make(readout='final_rms'), batch()
    h = model.states(idx, loops=2)[-1]
    want = rms_norm(h, model.exposure.weight) @ model.tok_emb.weight.T
    for got in model(idx, loops=2).logits, model.readout(h), model.readout(h, k=4), model.readout(h, k=9):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.readout(h, k=2), h @ model.tok_emb.weight.T)


@pytest.mark.parametrize('n_embd', [64, 256])
@pytest.mark.parametrize('readout', ROWS)
def test_the_initial_loss_of_init_gpt2_is_near_that_of_a_uniform_guess(readout, n_embd):
    torch.manual_seed(0)
    model = LoopedGPT(LoopedConfig(readout=readout, n_embd=n_embd, vocab_size=1000, init='gpt2'))
    ids = torch.randint(1000, (8, 65))
    losses = model(ids[:, :-1], ids[:, 1:]).losses
    assert (losses - math.log(1000)).abs().max() < 0.3


def test_init_torch_is_that_of_pytorch_in_the_order_in_which_the_authors_make_their_layers():
    """So a seed starts from the very weights that it gives them."""
    torch.manual_seed(42)
    model = LoopedGPT(LoopedConfig(n_layer=1))
    torch.manual_seed(42)
    made = [torch.nn.Embedding(256, 64), torch.nn.Embedding(64, 64)]
    made += [torch.nn.Linear(a, b, bias=False) for a, b in ((64, 192), (64, 64), (64, 256), (256, 64), (64, 256))]
    block = model.blocks[0]
    for ours, theirs in zip((model.tok_emb, model.pos_emb, block.qkv, block.proj, block.w1, block.w2, block.w3), made):
        assert torch.equal(ours.weight, theirs.weight)


def test_init_gpt2_makes_what_writes_into_the_state_smaller_by_the_number_of_updates():
    model = LoopedGPT(LoopedConfig(init='gpt2', n_embd=128, n_layer=2, loops=8))
    for block in model.blocks:
        for layer, std in (block.qkv, 0.02), (block.w1, 0.02), (block.w3, 0.02), \
                (block.proj, 0.02 / 32 ** 0.5), (block.w2, 0.02 / 32 ** 0.5):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.tok_emb.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_dropout_is_at_the_three_places_of_the_authors_and_at_no_other(monkeypatch):
    """Embedding, attention weights, output of the mlp."""
    model, (idx, _) = make(dropout=0.5), batch()
    block, x = model.blocks[0], torch.randn(3, 16, 32)
    seen, real = [], F.scaled_dot_product_attention

    def attention(q, k, v, dropout_p, is_causal):
        seen.append(dropout_p)
        return real(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', attention)
    for training, share in (True, 0.5), (False, 0.0):
        model.train(training)
        seen.clear()
        assert (model.embed(idx) == 0).float().mean().item() == pytest.approx(share, abs=0.1)
        assert (block.mlp(x) == 0).float().mean().item() == pytest.approx(share, abs=0.1)
        assert (block.attn(x, None) != 0).all() and seen == [share]
        assert (model.readout(x) != 0).all() and torch.equal(model.carry(x, x, 2), x)


def test_an_output_bias_is_added_at_every_exit_learned_from_zero_or_fixed():
    learned, fixed = make(output_bias='learned'), make(output_bias='unigram')
    assert LoopedGPT(LoopedConfig(output_bias='learned')).output_bias.abs().max() == 0
    assert learned.output_bias.requires_grad and not fixed.output_bias.requires_grad
    idx, targets = batch()
    for model in learned, fixed:
        assert model.output_bias.shape == (61,) and 'output_bias' in model.state_dict()
        h = model.states(idx)[1]
        plain = model.exposure(h) @ model.tok_emb.weight.T
        torch.testing.assert_close(model.readout(h, 2), plain + model.output_bias, atol=1e-5, rtol=1e-4)
    learned.train()(idx, targets).loss.backward()
    assert learned.output_bias.grad.abs().max() > 0


def test_the_embedding_is_the_unembedding():
    model, (idx, _) = make(readout='raw'), batch()
    before = model.readout(torch.ones(1, 1, 32))
    with torch.no_grad():
        model.tok_emb.weight.mul_(2)
    torch.testing.assert_close(model.readout(torch.ones(1, 1, 32)), 2 * before)
    assert sum(p.numel() == 61 * 32 for p in model.parameters()) == 1


@pytest.mark.parametrize('n_layer, n_head, n_embd, count', [
    (8, 8, 512, 43_934_208), (12, 12, 768, 128_822_016)])
def test_the_models_of_the_paper_have_their_exact_sizes(n_layer, n_head, n_embd, count):
    with torch.device('meta'):
        model = LoopedGPT(LoopedConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=256,
                                       vocab_size=20000, loops=4))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize('field, value, allowed', [
    ('loops', 0, 'from 1 to'), ('n_layer', -1, 'from 1 to'), ('loops', 2.5, 'whole'),
    ('n_head', 5, 'multiple'), ('readout', 'rsm', 'final_rms'), ('recurrence', 'none', 'damped'),
    ('supervision', 'all', 'per_loop'),
    ('alpha', 1.1, 'to 1'), ('alpha', -0.1, 'from 0'), ('norm_penalty', -1.0, 'from 0'),
    ('init', 'x', 'gpt2'), ('norm_penalty', math.nan, 'from 0'), ('norm_penalty', math.inf, 'from 0'),
    ('dropout', 1.0, 'to 0.999'),
    ('loops', 10 ** 9, 'to 10000'), ('n_embd', 10 ** 7, 'to 65536'), ('inject', '1', 'a number'),
    ('loops', True, 'whole'), ('loops', np.float64(3), 'whole'), ('dropout', np.array([0.1]), 'a number')])
def test_a_config_that_cannot_work_names_the_field_the_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as e:
        LoopedConfig(**{field: value})
    assert ('n_embd' if field == 'n_head' else field) in str(e.value) and str(value) in str(e.value)
    assert allowed in str(e.value)


def test_a_field_that_a_fork_writes_plainly_works():
    @dataclass
    class Fork(LoopedConfig):
        gate: bool = False
        mode: str | None = None
    assert LoopedGPT(Fork(gate=True)).cfg.gate and Fork(mode='x').mode == 'x'
    with pytest.raises(ValueError, match='gate must be True or False, got 3'):
        Fork(gate=3)


def test_numbers_of_numpy_are_numbers_and_become_plain_ones():
    cfg = LoopedConfig(norm_penalty=np.float64(0.5), alpha=np.float32(0.25), loops=np.int64(3), inject=1)
    assert [type(x) for x in (cfg.norm_penalty, cfg.alpha, cfg.loops, cfg.inject)] == [float, float, int, float]


@pytest.mark.parametrize('recurrence', RECURRENCES)
@pytest.mark.parametrize('readout', READOUTS)
def test_every_model_can_be_pickled_and_copied_and_gives_each_tensor_one_name(readout, recurrence):
    model, (idx, targets) = make(readout=readout, recurrence=recurrence), batch()
    pointers = [t.data_ptr() for t in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers) == len(list(model.parameters()))
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert torch.equal(twin(idx, targets).loss, model(idx, targets).loss)


def test_a_copy_of_a_compiled_model_is_a_model_of_its_own():
    model, (idx, targets) = make(n_layer=1, loops=2), batch()
    model.compile_regions()
    loss = model(idx, targets).loss
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.tok_emb.weight.zero_()
    assert twin(idx, targets).loss.item() == pytest.approx(math.log(61))
    assert model(idx, targets).loss.item() == loss.item() != pytest.approx(math.log(61))


def test_the_gradient_of_cut_is_finite_where_a_state_is_zero():
    h = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    (READOUTS['cut'](None)(h) * torch.tensor([1.0, 0.0])).sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([[1.0, 0.0], [0.64, -0.48]]))


def test_a_bad_call_says_so():
    model, (idx, _) = make(), batch()
    cache = {}
    model.states(idx[:, :5], cache=cache)
    for call in (lambda: model.states(idx, loops=0), lambda: model.states(idx.repeat(1, 2)),
                 lambda: model.states(idx[:, :0]), lambda: model.generate(idx, 1, temperature=-1.0),
                 lambda: model.generate(idx, 1, top_k=0),
                 lambda: model.states(idx[:, :2], cache=cache),  # it would not be causal
                 lambda: model.states(idx[:, :1], loops=6, cache=cache),  # what loops 5 and 6 saw is not there
                 lambda: model.states(idx[:, :1], loops=2, cache=cache),
                 lambda: model(idx, idx.T), lambda: model(idx, idx[:, 1:])):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(IndexError):
        model(idx + 61)


@pytest.mark.parametrize('recurrence', RECURRENCES)
@pytest.mark.parametrize('readout', READOUTS)
@pytest.mark.parametrize('loops', [1, 6])
def test_greedy_generation_is_that_of_recomputing_everything(readout, recurrence, loops):
    """Through the cache, past block_size and beyond the trained depth."""
    model, (idx, _) = make(readout=readout, recurrence=recurrence), batch(T=5)
    want = idx
    for _ in range(25):
        logits = model(want[:, -16:], loops=loops).logits
        want = torch.cat((want, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(idx, 25, loops=loops, temperature=0), want)


def test_a_new_token_costs_one_position_until_the_window_slides():
    model, (idx, _) = make(), batch(B=1, T=5)
    fed = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: fed.append(args[0].size(1)))
    model.generate(idx, 14, loops=1)
    assert fed == [5] + [1] * 11 + [16] * 2


def test_the_same_seed_samples_the_same_text_and_top_k_1_is_greedy():
    model, (idx, _) = make(), batch(T=5)
    texts = []
    for seed in 1, 1, 2:
        torch.manual_seed(seed)
        texts.append(model.generate(idx, 20))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert torch.equal(model.generate(idx, 10, top_k=1), model.generate(idx, 10, temperature=0))
    assert torch.equal(model.generate(idx, 0), idx)


def test_flops_count_every_matrix_once_per_visit():
    """By torch's own counter. On the CPU it does not see into attention, whose share is added by formula."""
    from torch.utils.flop_counter import FlopCounterMode
    for supervision in 'per_loop', 'terminal':
        model = make(supervision=supervision).train()
        idx, targets = batch()
        with FlopCounterMode(display=False) as counter:
            model(idx, targets).loss.backward()
        counts = counter.get_flop_counts()['Global'].items()
        matmuls = sum(n for op, n in counts if 'attention' not in str(op))
        attention = 12 * 32 * 16 * model.cfg.n_layer * model.cfg.loops * idx.numel()
        assert matmuls + attention == model.flops_per_token() * idx.numel()


def test_compiled_regions_give_the_same_gradients_and_depth_compiles_nothing_new():
    import torch._dynamo
    stats = torch._dynamo.utils.counters['stats']
    idx, targets = batch()
    graphs = []
    for n_layer, loops in (2, 2), (4, 5):
        torch._dynamo.reset()
        stats.clear()
        model = make(n_layer=n_layer, loops=loops).train()
        plain = model(idx, targets)
        plain.loss.backward()
        want = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        model.compile_regions()
        out = model(idx, targets)
        out.loss.backward()
        torch.testing.assert_close(out.loss, plain.loss, atol=1e-4, rtol=1e-4)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, want[name], atol=1e-4, rtol=1e-3)
        graphs.append(stats['unique_graphs'])
        with torch.no_grad():
            model(idx, targets)
            evaluated = stats['unique_graphs']
            model(idx, targets, loops=loops + 3)
        assert stats['unique_graphs'] == evaluated
    assert graphs == [2, 2]  # a block, and the cross-entropy of an exit
