"""ScMoE as a layer: DeepSpeed's Residual MoE underneath, misuse, DGMoE's rule, initialisation."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scmoe_ds import ScMoE
from scmoe_ds.comm.wire import pack, unpack
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.moe.experts import grouped_experts, is_plain, run_experts
from scmoe_ds.moe.gate import route
from scmoe_ds.moe.kernels import torch_product
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.layout import ExactLayout, PaddedLayout
from scmoe_ds.moe.received import ReceivedRows
from scmoe_ds.moe.shortcut import DGMoE
from scmoe_ds.moe.slices import TokenSlices

HIDDEN, TOKENS, EXPERTS = 16, 40, 4


def make_expert() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, 32), nn.GELU(), nn.Linear(32, HIDDEN))


def make_layer(cls: type[MoE] = ScMoE, **kwargs: object) -> MoE:
    torch.manual_seed(1)
    return cls(HIDDEN, make_expert(), EXPERTS, **{"use_rts": False, "top2_2nd_expert_sampling": False, **kwargs})


def tokens(seed: int = 2) -> Tensor:
    return torch.randn(2, TOKENS // 2, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dispatch", ["exact", "padded"])
@pytest.mark.parametrize("drop_tokens", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_residual_moe_checkpoint_loads_and_computes_the_same(k: int, drop_tokens: bool, dispatch: str) -> None:
    residual = make_layer(MoE, k=k, use_residual=True, drop_tokens=drop_tokens)
    for parameter in residual.parameters():  # DeepSpeed's experts start equal, which would hide a mix-up
        parameter.data.normal_(0, 0.3)
    layer = make_layer(k=k, drop_tokens=drop_tokens, merge="cg2", dispatch=dispatch)
    layer.load_state_dict(residual.state_dict(), strict=True)
    x = tokens()
    target, found = residual(x), layer(x)
    torch.testing.assert_close(found[0], target[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1], target[1]) and torch.equal(found[2], target[2])
    torch.testing.assert_close(layer(x, shortcut=x)[0], target[0], rtol=1e-6, atol=1e-6)
    names = [name for name, _ in residual.named_parameters()]
    for name, a, b in zip(names, gradients(residual, x), gradients(layer, x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dispatch", ["exact", "padded"])
def test_an_adopted_layer_holds_the_same_parameters_and_computes_the_same(dispatch: str) -> None:
    moe = make_layer(MoE, k=2).eval()
    layer = StagedMoE.adopt(moe, dispatch=dispatch)
    assert [(name, id(each)) for name, each in layer.named_parameters()] == [
        (name, id(each)) for name, each in moe.named_parameters()
    ]
    torch.testing.assert_close(layer(tokens())[0], moe(tokens())[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="must be one of 'exact', 'padded'"):
        StagedMoE.adopt(moe, dispatch="dense")


def gradients(layer: MoE, x: Tensor) -> tuple[Tensor, ...]:
    output, l_aux, _ = layer(x)
    return torch.autograd.grad(output.square().sum() + l_aux, list(layer.parameters()))


def test_routed_experts_read_the_shortcut_and_nothing_else() -> None:
    layer = make_layer(merge="add")
    x, tap = tokens(3), tokens(4)
    torch.manual_seed(0)
    output, l_aux, counts = layer(x, shortcut=tap)
    routed_only = output - layer.shared(x)
    torch.manual_seed(0)
    again = layer(torch.zeros_like(x), shortcut=tap)
    torch.testing.assert_close(routed_only, again[0] - layer.shared(torch.zeros_like(x)), rtol=1e-5, atol=1e-5)
    assert torch.equal(l_aux, again[1]) and torch.equal(counts, again[2])


def test_shared_output_may_be_given_or_left_to_finish() -> None:
    layer = make_layer()
    x, tap = tokens(3), tokens(4)
    outputs = []
    for shared in (None, layer.shared(x)):
        routed = layer.begin(tap)
        routed.run_experts()
        outputs.append(layer.finish(routed, x, shared)[0])
    assert torch.equal(outputs[0], outputs[1])


def test_misuse_of_routed_tokens_says_what_happened() -> None:
    layer = make_layer()
    x = tokens()
    routed = layer.begin(x)
    with pytest.raises(RuntimeError, match="before run_experts"):
        layer.finish(routed, x)
    routed.run_experts()
    with pytest.raises(RuntimeError, match="once too often"):
        routed.run_experts()
    with pytest.raises(ValueError, match="another layer's: finish them with the layer that began them"):
        make_layer().finish(routed, x)
    layer.finish(routed, x)
    with pytest.raises(RuntimeError, match="finished already"):
        layer.finish(routed, x)


@pytest.mark.parametrize("cls", [ScMoE, DGMoE, StagedMoE])
def test_finish_takes_what_begin_returned(cls: type[StagedMoE]) -> None:
    with pytest.raises(ValueError, match="routed is a Tensor: finish takes what this layer's begin returned"):
        make_layer(cls).finish(tokens(), tokens())


@pytest.mark.parametrize(
    "shortcut, message",
    [
        (torch.randn(2, 8), r"shortcut of shape \(2, 8\): the last dimension must be 16, the layer's hidden_size"),
        (torch.tensor(1.0), r"shortcut of shape \(\): the last dimension must be 16"),
        (torch.zeros(2, HIDDEN, dtype=torch.int64), r"shortcut of dtype torch\.int64: must be floating point"),
        ((torch.randn(2, HIDDEN), None), r"shortcut is a tuple: must be a tensor .* take the tensor out of it"),
        (None, r"shortcut is a NoneType: must be a tensor \[\.\.\., 16\], normalised$"),
    ],
)
def test_a_shortcut_that_is_none(shortcut: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer().begin(shortcut)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_experts_of_another_dtype_are_named(dtype: torch.dtype) -> None:
    x, layer = tokens().to(dtype), make_layer()
    with pytest.raises(ValueError, match=rf"^shortcut of dtype {dtype}: the experts have torch\.float32; cast"):
        layer.begin(x).run_experts()
    with torch.autocast("cpu", torch.bfloat16):
        layer(tokens().bfloat16())


def test_an_error_of_an_expert_stays_as_it_is() -> None:
    class Failing(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            raise RuntimeError("its own") from KeyError("its cause")

    layer = make_layer_of(Failing(HIDDEN, HIDDEN))
    with pytest.raises(RuntimeError, match=r"^its own$") as found:
        layer.begin(tokens()).run_experts()
    assert isinstance(found.value.__cause__, KeyError)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"^its own$"):
        layer.begin(tokens().bfloat16()).run_experts()


def test_the_signature_begins_as_deepspeeds() -> None:
    theirs = [(each.name, each.default) for each in inspect.signature(MoE).parameters.values()]
    ours = [(each.name, each.default) for each in inspect.signature(ScMoE).parameters.values()]
    residual = [(name, None if name == "use_residual" else default) for name, default in theirs]
    assert ours[: len(theirs)] == residual


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 6, "ep_size": 4}, "divisible by ep_size"),
        ({"k": 5}, "k = 5 must be between 1 and num_experts = 4"),
        ({"merge": "cg3"}, "merge = 'cg3': must be one of 'add', 'cg1', 'cg2'"),
        ({"dispatch": "dense"}, "must be one of 'exact', 'padded'"),
        ({"all_to_all": "ring"}, "must be one of 'collective', 'send_receive'"),
        ({"wire_dtype": "int4"}, "must be one of None, 'bf16', 'fp8'"),
        ({"use_residual": False}, "use_residual=True only"),
        ({"ep_size": 2}, "build the layer after scmoe_ds"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScMoE(HIDDEN, make_expert(), **{"num_experts": EXPERTS, **arguments})


def test_top1_weight_before_and_after_topk() -> None:
    """Eq. 2-3 with k = 1 is the constant 1 and gives the gate no gradient; softmax first gives the probability."""
    gate = make_layer().deepspeed_moe.gate
    x = tokens().view(-1, HIDDEN)
    probability = torch.softmax(x @ gate.wg.weight.T, -1).max(-1).values
    before, after = route(gate, x), route(gate, x, softmax="after_topk")
    kept = before.expert_KT[0] >= 0
    torch.testing.assert_close(before.weight_KT[0], probability * kept)
    torch.testing.assert_close(after.weight_KT[0], kept.float())
    (grad,) = torch.autograd.grad(after.weight_KT.sum(), gate.wg.weight)
    assert grad.abs().max() < 1e-6 < torch.autograd.grad(before.weight_KT.sum(), gate.wg.weight)[0].abs().max()


def test_dgmoe_against_eq_23() -> None:
    layer = make_layer(DGMoE, drop_tokens=False)
    previous, current = tokens(5), tokens(6)
    current.view(-1, HIDDEN)[::2] = previous.view(-1, HIDDEN)[::2]  # every second token: the same first choice
    output, l_aux, counts = layer(current, shortcut=previous)
    experts, gate = layer.deepspeed_moe.experts.deepspeed_experts, layer.deepspeed_moe.gate
    target, conflicts, shares = [], 0, torch.zeros(2, EXPERTS)
    for before, now in zip(previous.view(-1, HIDDEN), current.view(-1, HIDDEN), strict=True):
        p_before, p_now = torch.softmax(gate.wg(before), -1), torch.softmax(gate.wg(now), -1)
        first, ranking = int(p_before.argmax()), p_now.argsort(descending=True).tolist()
        conflicts += ranking[0] == first
        second = ranking[1] if ranking[0] == first else ranking[0]
        shares[0, first] += 1 / TOKENS
        shares[1, second] += 1 / TOKENS
        target.append(p_before[first] * experts[first](before) + p_now[second] * experts[second](now))
    assert TOKENS // 2 <= conflicts < TOKENS
    torch.testing.assert_close(output.view(-1, HIDDEN), torch.stack(target), rtol=1e-5, atol=1e-6)
    assert counts.sum() == 2 * TOKENS
    losses = [
        (torch.softmax(gate.wg(x.view(-1, HIDDEN)), -1).mean(0) * share).sum() * EXPERTS
        for x, share in zip((previous, current), shares, strict=True)
    ]
    torch.testing.assert_close(l_aux, (losses[0] + losses[1]) / 2)
    parameters = list(layer.parameters())
    found = torch.autograd.grad(output.square().sum() + l_aux, parameters, materialize_grads=True)
    loss = torch.stack(target).square().sum() + (losses[0] + losses[1]) / 2
    expected = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dgmoe_has_no_shared_expert() -> None:
    layer = make_layer(DGMoE)
    assert not any(hasattr(layer, name) for name in ("mlp", "coefficient", "shared"))
    with pytest.raises(ValueError, match="k = 1"):
        make_layer(DGMoE, k=2)


@pytest.mark.parametrize("merge", ["add", "cg1", "cg2"])
def test_coefficient_sizes(merge: str) -> None:
    coefficient = make_layer(merge=merge).coefficient
    assert (coefficient.out_features if coefficient is not None else 0) == {"add": 0, "cg1": 1, "cg2": 2}[merge]


def test_experts_start_different_and_by_global_id() -> None:
    whole = make_layer().deepspeed_moe.experts.deepspeed_experts
    again = make_layer().deepspeed_moe.experts.deepspeed_experts
    weights = [expert[0].weight for expert in whole]
    assert all(torch.equal(a[0].weight, b[0].weight) for a, b in zip(whole, again, strict=True))
    assert all(not torch.equal(weights[i], weights[j]) for i in range(EXPERTS) for j in range(i))


@pytest.mark.parametrize("logits", ["random", "all to one", "two experts empty"])
def test_exact_layout_holds_the_rows_that_the_padded_one_holds(logits: str) -> None:
    layer = make_layer(k=2, capacity_factor=0.5)
    gate = layer.deepspeed_moe.gate
    x = tokens().view(-1, HIDDEN)
    if logits == "all to one":
        gate.wg.weight.data[0] += 10 * x.mean(0)
        x = x.mean(0, keepdim=True).repeat(TOKENS, 1) + 0.01 * x
    elif logits == "two experts empty":
        gate.wg.weight.data[2:] = -gate.wg.weight.data[:2].sum(0)
        x = x + 5 * gate.wg.weight.data[:2].sum(0)
    routing = route(gate, x)
    exact, padded = ExactLayout.of(routing, TokenSlices()), PaddedLayout.of(routing, TokenSlices())
    rows, buffer = exact.encode(x), padded.encode(x).view(EXPERTS, -1, HIDDEN)
    filled = exact.rows_NPVL.flatten().tolist()
    assert sum(filled) == rows.shape[0] == int((routing.expert_KT >= 0).sum())
    for expert, part in enumerate(rows.split(filled)):
        real = buffer[expert][buffer[expert].abs().sum(-1) > 0]
        assert torch.equal(part.sort(0).values, real.sort(0).values)


def test_received_rows_group_and_ungroup() -> None:
    rows_PL = [[2, 0, 1], [0, 3, 1]]
    labels = [label for rank in range(2) for label in range(3) for _ in range(rows_PL[rank][label])]
    rows = torch.tensor(labels, dtype=torch.float32).unsqueeze(1).requires_grad_()
    received = ReceivedRows.of(torch.tensor(rows_PL))
    grouped = received.group(rows)
    assert grouped.flatten().tolist() == sorted(labels)
    assert received.rows_per_expert == (2, 3, 2)
    ungrouped = received.ungroup(grouped)
    assert torch.equal(ungrouped, rows)
    weights = torch.randn(7, 1)
    (through,) = torch.autograd.grad(ungrouped, grouped, weights, retain_graph=True)
    order = sorted(range(7), key=labels.__getitem__)
    assert torch.equal(through, weights[order])
    assert torch.equal(torch.autograd.grad(ungrouped, rows, weights)[0], weights)


@pytest.mark.parametrize("rows_PL", [[[2, 1, 4]], [[2], [3]], [[0, 0], [0, 0]], [[0, 5], [0, 0]]])
def test_received_rows_of_one_rank_of_one_expert_and_none(rows_PL: list[list[int]]) -> None:
    received, number = ReceivedRows.of(torch.tensor(rows_PL)), sum(map(sum, rows_PL))
    rows = torch.arange(number * 2.0).view(number, 2).requires_grad_()
    assert torch.equal(received.group(rows), rows) and torch.equal(received.ungroup(rows), rows)
    received.ungroup(received.group(rows)).sum().backward()
    assert rows.grad is not None and torch.equal(rows.grad, torch.ones_like(rows))


def test_gradients_with_and_without_a_shortcut_that_needs_them() -> None:
    layer = make_layer()
    for needs in (True, False):
        tap = tokens(7).requires_grad_(needs)
        layer.zero_grad()
        layer(tokens(8), shortcut=tap)[0].sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        assert (tap.grad is not None) == needs


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch 2.6 has no grouped_mm")
@pytest.mark.parametrize("swiglu", [False, True])
def test_grouped_experts_equal_separate_ones(swiglu: bool) -> None:
    """torch's grouped product has a CPU form for bf16; the layer uses it on GPUs."""
    settings = GPTSettings(2, HIDDEN, 2, 64, 8, swiglu=swiglu, ffn_hidden_size=32)
    experts = make_layer_of(MLP(settings)).deepspeed_moe.experts.bfloat16()
    assert all(is_plain(expert) for expert in experts.deepspeed_experts)
    rows, counts = torch.randn(20, HIDDEN, dtype=torch.bfloat16, requires_grad=True), [5, 0, 9, 6]
    direction = torch.randn(20, HIDDEN, dtype=torch.bfloat16)
    results = []
    for function in (run_experts, partial(grouped_experts, product=torch_product)):
        output = function(experts, rows, counts)
        parameters = [rows, *experts.parameters()]
        results.append([output, *torch.autograd.grad(output, parameters, direction, materialize_grads=True)])
    for separate, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, separate, rtol=2e-2, atol=2e-2)


def make_layer_of(expert: nn.Module) -> ScMoE:
    return ScMoE(HIDDEN, expert, EXPERTS)


def test_no_tokens_at_all() -> None:
    layer = make_layer()
    output, l_aux, counts = layer(torch.zeros(1, 0, HIDDEN))
    (output.sum() + l_aux).backward()
    assert output.shape == (1, 0, HIDDEN) and l_aux == 0 and counts.tolist() == [0] * EXPERTS
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(("wire_dtype", "error"), [("bf16", 2**-8), ("fp8", 2**-4)])
def test_wire_formats(wire_dtype: str, error: float) -> None:
    rows = torch.randn(50, 64) * torch.logspace(-6, 6, 50).unsqueeze(1)
    rows[7] = 0
    packed = pack(rows, wire_dtype)
    assert packed.element_size() * packed.shape[1] == {"bf16": 2 * 64, "fp8": 64 + 4}[wire_dtype]
    back = unpack(packed, wire_dtype, torch.float32)
    largest = rows.abs().amax(-1, keepdim=True)
    assert back.dtype == torch.float32 and torch.equal(back[7], rows[7])
    # Relative to the element for normal numbers; below e4m3's smallest step, relative to the row's scale.
    assert ((back - rows).abs() <= error * rows.abs() + largest * 2**-16 * (wire_dtype == "fp8")).all()
    assert pack(rows, None) is rows


def test_fp8_rows_next_to_zero_stay_finite() -> None:
    """448 times smaller, the largest number of such a row would be zero, and so would the scale of its zeros."""
    rows = torch.tensor([[1e-44, 0.0], [0.0, 0.0]])
    assert unpack(pack(rows, "fp8"), "fp8", torch.float32).isfinite().all()


def test_experts_keep_one_wide_tensor_for_backward_and_repeat_no_product() -> None:
    experts = make_layer_of(MLP(GPTSettings(2, HIDDEN, 2, 64, 8))).deepspeed_moe.experts
    rows, wide = torch.randn(80, HIDDEN, requires_grad=True), 4 * HIDDEN

    def kept_and_flops(function) -> tuple[int, int]:  # type: ignore[no-untyped-def]
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.shape[-1] == wide and tensor.shape[0] == 20:
                saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = function()
            torch.autograd.grad(output.square().sum(), [rows, *experts.parameters()])
        return sum(saved.values()), counter.get_total_flops()

    def plain() -> Tensor:
        return torch.cat([e(part) for e, part in zip(experts.deepspeed_experts, rows.split(20), strict=True)])

    (plain_kept, plain_flops), (kept, flops) = (
        kept_and_flops(plain),
        kept_and_flops(lambda: run_experts(experts, rows, [20] * 4)),
    )
    assert plain_kept == 2 * 80 * wide and kept == 80 * wide
    assert flops == plain_flops


@pytest.mark.parametrize("policy", ["Jitter", "RSample"])
def test_gate_noise_acts_in_training_only(policy: str) -> None:
    layer = make_layer(noisy_gate_policy=policy, drop_tokens=False)
    gate, x = layer.deepspeed_moe.gate, tokens().view(-1, HIDDEN)
    first, second = route(gate, x), route(gate, x)
    same = torch.equal(first.weight_KT, second.weight_KT) and torch.equal(first.expert_KT, second.expert_KT)
    assert not same
    layer.eval()
    assert torch.equal(route(gate, x).weight_KT, route(gate, x).weight_KT)


def test_gate_is_fp32_under_autocast() -> None:
    gate, x = make_layer(drop_tokens=False).deepspeed_moe.gate, tokens().view(-1, HIDDEN)
    plain = route(gate, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = route(gate, x)
    assert torch.equal(cast.weight_KT, plain.weight_KT)


def test_shortcut_of_other_tokens() -> None:
    layer = make_layer()
    routed = layer.begin(torch.randn(1, TOKENS, HIDDEN))
    routed.run_experts()
    with pytest.raises(ValueError, match="must be the same tokens"):
        layer.finish(routed, torch.randn(3, TOKENS, HIDDEN))
