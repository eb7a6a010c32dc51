"""DeepSpeed MoE layers in a model that somebody else wrote, replaced: against the same model written with ScMoE."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.speed.replace import Block, Direct, results
from scmoe_ds import ScMoEConfig, ScMoEConfigError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.replace import moe_from_dense, replace_moe_layers, undo_replacement
from scmoe_ds.replace.description import describe_replacement
from scmoe_ds.replace.layer import HookedScMoE
from scmoe_ds.trace.recorder import Recorder
from tests.helpers.hugging_face import FAMILIES

SETTINGS = GPTSettings(4, 16, 2, 32, 12)
EXPERTS = 4


class TheirFeedForward(nn.Module):
    def __init__(self, **moe: Any) -> None:
        super().__init__()
        self.moe = MoE(
            16, MLP(SETTINGS), EXPERTS, **{"capacity_factor": 1.0, "min_capacity": 1, "use_rts": False, **moe}
        )
        self.l_aux: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        output, self.l_aux, _ = self.moe(hidden_states)
        return output


class TheirModel(nn.Module):
    def __init__(self, checkpointing: bool = False, **moe: Any) -> None:
        super().__init__()
        self.checkpointing: str | None = "block" if checkpointing else None
        feeds = [MLP(SETTINGS), TheirFeedForward(**moe), MLP(SETTINGS), TheirFeedForward(**moe)]
        self.layers = nn.ModuleList([Block(SETTINGS, each) for each in feeds])
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.checkpointing == "all":
            return checkpoint(self._layers, hidden, use_reentrant=False)
        return self._layers(hidden)

    def _layers(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            cut = self.checkpointing == "block" and torch.is_grad_enabled()
            hidden = checkpoint(layer, hidden, use_reentrant=False) if cut else layer(hidden)
        return hidden


def section(**fields: Any) -> ScMoEConfig:
    return ScMoEConfig.from_deepspeed({"scmoe": {"shortcut_norm": "shared", **fields}})


def make(seed: int = 0, **moe: Any) -> TheirModel:
    torch.manual_seed(seed)
    return TheirModel(**moe)


def hidden(seed: int = 1) -> Tensor:
    return torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def run(model: nn.Module, value: Tensor | None = None) -> dict[str, Tensor]:
    """Output and all gradients by name."""
    value = hidden() if value is None else value
    model.zero_grad()
    torch.manual_seed(2)  # DeepSpeed's top-2 gate draws random numbers
    output = model(value)
    (output.square().mean() + sum(each.l_aux for each in feeds(model) if each.l_aux is not None)).backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {**found, "input": value.grad, "output": output.detach()}


def feeds(model: nn.Module) -> list[TheirFeedForward]:
    return [module for module in model.modules() if isinstance(module, TheirFeedForward)]


def replaced_layers(model: nn.Module) -> list[HookedScMoE]:
    return [module for module in model.modules() if isinstance(module, HookedScMoE)]


def require_equal(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= tolerance * max(1.0, float(value.abs().max())), name


def test_fed_with_its_own_input_a_residual_moe_is_what_it_was() -> None:
    model = make(use_residual=True)
    before, names = run(copy.deepcopy(model)), list(model.state_dict())
    replace_moe_layers(model, {"scmoe": section().written})  # as `initialize`, it takes the JSON too
    for layer in replaced_layers(model):
        layer.pair = None
    require_equal(run(model), before, 1e-6)
    assert list(model.state_dict()) == names, "old checkpoints load"


@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
@pytest.mark.parametrize(("shortcut_norm", "join"), [("shared", "end"), ("own", "end"), ("own", "late")])
def test_replaced_equals_written_directly(position: str, shortcut_norm: str, join: str) -> None:
    """Each pair of TheirModel against a run of this package's GPT with the same weights."""
    few = {"capacity_factor": 1.0, "min_capacity": 1, "use_rts": False}
    config = section(position=position, merge="cg2", shortcut_norm=shortcut_norm, join=join, **few)
    model = make(use_residual=True)
    replace_moe_layers(model, config)
    direct = Direct(SETTINGS, config, EXPERTS, model)
    expected = results(direct, hidden())
    del expected["loss"]
    for _ in range(2):  # the first pass looks for operators and overlaps nothing
        require_equal(run(model), expected, 1e-6)
    slots = [layer.pair.schedule.slots for layer in replaced_layers(model)]
    if join == "end":  # replaced layers count parameters instead of FLOPs
        assert slots == [each.schedule.slots for each in direct.runs]
    else:
        assert [bool(layer.pair.late_window) for layer in replaced_layers(model)] == [True, False]


def test_undone_late_joins_leave_no_hook() -> None:
    model = make(use_residual=True)
    before = run(copy.deepcopy(model))
    replace_moe_layers(model, section(join="late"))
    run(copy.deepcopy(model))
    undo_replacement(model)
    require_equal(run(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_that_scale_their_attention_cannot_join_late() -> None:
    """As Granite's; the first pass finds it out. One that is found before leaves the model as it was."""
    model = make(use_residual=True)
    replace_moe_layers(model, section(join="late"))
    model.layers[2].self_attn.register_forward_hook(lambda module, args, output: 0.5 * output)
    with pytest.raises(ScMoEConfigError, match="does not add its attention's output as it is"):
        run(model)
    model = make(use_residual=True)
    model.layers[2].attended, model.layers[2].self_attn = model.layers[2].self_attn, nn.Identity()
    model.layers[2].mixer = model.layers[2].attended
    del model.layers[2].self_attn
    del model.layers[2].attended
    with pytest.raises(ScMoEConfigError, match="has no attention"):
        replace_moe_layers(model, section(join="late"))
    assert not replaced_layers(model)


def test_a_dropout_behind_an_attention_is_not_the_attention() -> None:
    """GPT-NeoX has one beside it, `post_attention_dropout`, whose time nobody measures."""
    model = moe_from_dense(FAMILIES["GPT-NeoX"](), section(join="late"))
    first, last = (layer.pair for layer in replaced_layers(model))
    assert first.late.place == "gpt_neox.layers.2.attention" and first.late_window.operators == ("attention",)
    (line,) = (line for line in describe_replacement(model, replaced_layers(model)) if "join: " in line)
    assert line.endswith("join: the output of gpt_neox.layers.2.attention, gpt_neox.layers.3")
    assert last.late_window is None


def test_a_dispatch_that_leaves_behind_the_next_block_is_not_beside_its_attention() -> None:
    for tap, is_beside in (("{previous}:input", True), ("{previous}:output", False)):
        model = make(use_residual=True)
        replace_moe_layers(model, section(join="late", tap=tap))
        assert replaced_layers(model)[0].pair.late_window.after_dispatch == is_beside


def test_an_activation_checkpoint_may_not_end_before_a_late_join() -> None:
    model = make(use_residual=True)
    replace_moe_layers(model, section(join="late"))
    expected = run(model)
    model.checkpointing = "all"
    require_equal(run(model), expected, 1e-6)
    model.checkpointing = "block"
    with pytest.raises(ScMoEConfigError, match=r"an activation checkpoint around layers.1.mlp.moe"):
        run(model)


@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_every_slot_and_chunk_gives_the_same(position: str) -> None:
    model = make(use_residual=True)
    replace_moe_layers(model, section(position=position))
    serial = run(model)
    operators = len(replaced_layers(model)[0].pair.operators())
    assert operators == {"pos1": 2, "pos2": 3, "pos3": 4}[position]
    for slot in range(1, operators + 2):
        for chunks in (1, 2):
            for layer in replaced_layers(model):
                layer.pair.schedule = Schedule(slot, chunks)
            require_equal(run(model), serial, 1e-6)


def test_undone_it_is_what_it_was() -> None:
    model = make(k=2)
    before, layers = run(copy.deepcopy(model)), feeds(model)
    kept = [each.moe for each in layers]
    replace_moe_layers(model, section())
    assert all(layer.deepspeed_moe.gate.k == 1 for layer in replaced_layers(model))
    run(model)
    undo_replacement(model)
    assert [each.moe for each in layers] == kept and not replaced_layers(model)
    require_equal(run(model), before)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("source", ["fresh", "mean", 2])
def test_a_plain_moe_gets_a_shared_expert(source: str | int) -> None:
    model = make(k=2)
    experts = [dict(each.named_parameters()) for each in feeds(model)[0].moe.deepspeed_moe.experts.deepspeed_experts]
    replace_moe_layers(model, section(shared_from=source))
    layer = replaced_layers(model)[0]
    for name, parameter in layer.mlp.named_parameters():
        assert getattr(parameter, "allreduce", True), "not a routed expert"
        held = [each[name].detach() for each in experts]
        if source == "mean":
            torch.testing.assert_close(parameter.detach(), torch.stack(held).mean(0))
        elif isinstance(source, int):
            assert torch.equal(parameter, held[source]) and parameter is not experts[source][name]
        elif parameter.ndim > 1:
            assert not any(torch.equal(parameter, each) for each in held)
    assert layer.coefficient.out_features == 1, "cg1"


def test_old_checkpoints_load_and_new_parts_keep_their_values() -> None:
    old = make(seed=5, k=2)
    model = make()
    replace_moe_layers(model, section(shortcut_norm="own"))
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(old.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, old.state_dict().get(name, fresh[name])), name
    assert any(name not in old.state_dict() for name in fresh)


def test_without_gradients_and_in_evaluation() -> None:
    model = make(use_residual=True)
    replace_moe_layers(model, section())
    model.eval()
    with torch.no_grad():
        first, second = model(hidden()), model(hidden())
    assert torch.equal(first, second)
    torch.testing.assert_close(model(hidden()).detach(), first, rtol=1e-5, atol=1e-6)


def test_several_forwards_before_a_backward() -> None:
    model = make(use_residual=True)
    replace_moe_layers(model, section())
    apart = [run(model, hidden(seed)) for seed in (1, 2)]
    model.zero_grad()
    values = [hidden(seed) for seed in (1, 2)]
    losses = []
    for value in values:
        output = model(value)
        losses.append(output.square().mean() + sum(each.l_aux for each in feeds(model)))
    sum(losses).backward()
    for value, one in zip(values, apart, strict=True):
        torch.testing.assert_close(value.grad, one["input"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, apart[0][name] + apart[1][name], rtol=1e-5, atol=1e-6)


def test_the_log_says_what_was_replaced_and_then_what_runs_between(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scmoe_ds")
    model = make(k=2)
    replace_moe_layers(model, section(shortcut_norm="own", overlap={"expert_slot": 3}))
    assert caplog.messages == [
        "replaced 2 MoE layers of TheirModel by ScMoE: layers.{1,3}.mlp.moe (top-1 of 4 experts, was top-2; a new "
        "shared expert; merge cg1)",
        "  tap: the input of layers.{0,2}.post_attention_layernorm, through its own norm (LayerNorm); join: the "
        "output of layers.{1,3}.mlp.moe",
    ]
    caplog.clear()
    for _ in range(2):
        run(model)
    with torch.no_grad():
        model(hidden())
    assert caplog.messages == [
        "schedule of MoE layer 0–1 (layers.{1,3}.mlp.moe): dispatch ⇢ mlp → self_attn → [routed experts] → shared ⇢ combine "
        "(overlapped; set by scmoe.overlap.expert_slot)"
    ]


@pytest.mark.parametrize("where", ["block", "all"])
def test_under_activation_checkpointing(where: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make(use_residual=True)
    replace_moe_layers(model, section())
    plain = run(model)
    model = make(use_residual=True)
    replace_moe_layers(model, section())
    model.checkpointing = where
    for _ in range(2 if where == "block" else 1):
        require_equal(run(model), plain, 1e-6)
    said = "an activation checkpoint begins between it and its tap" in caplog.text
    assert said == (where == "block")


def test_a_cut_pair_knows_one_forward_pass_only() -> None:
    model = make(use_residual=True)
    replace_moe_layers(model, section())
    model.checkpointing = "block"
    outputs = [model(hidden(seed)) for seed in (1, 2)]
    outputs[1].square().mean().backward()
    with pytest.raises(RuntimeError, match="several forward passes before a backward pass"):
        outputs[0].square().mean().backward()


def test_reentrant_checkpointing_is_refused() -> None:
    model = make(use_residual=True)
    replace_moe_layers(model, section())
    for layer in model.layers:
        layer.forward = lambda value, inner=layer.forward: checkpoint(inner, value, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"reentrant activation checkpointing .* cuts them apart"):
        run(model)


def test_a_recorder_hears_of_every_operator() -> None:
    model = make(use_residual=True)
    replace_moe_layers(model, section(position="pos3"))
    run(model)
    recorder = Recorder(torch.device("cpu"))
    replaced_layers(model)[1].pair.recorder = recorder.pair(0)
    run(model)
    heard = {(span.name, span.phase) for span in recorder.spans()}
    for name in ("gate", "encode", "self_attn", "mlp", "self_attn 2", "shared", "experts", "decode"):
        assert {(name, "forward"), (name, "backward")} <= heard, name


BAD = {
    "no MoE": (lambda: nn.ModuleList([nn.Linear(2, 2)]), {}, "ModuleList holds no MoE layer of DeepSpeed"),
    "first block": (
        lambda: nn.Sequential(nn.ModuleList([Block(SETTINGS, TheirFeedForward())])),
        {},
        r"0\.0\.mlp\.moe is in the first block of 0",
    ),
    "no ModuleList": (lambda: nn.Sequential(TheirFeedForward()), {}, "in no nn.ModuleList"),
    "wrong number of experts": (make, {"num_experts": 8}, r"scmoe\.num_experts = 8: layers\.1\.mlp\.moe has 4"),
    "another architecture": (make, {"architecture": "dgmoe"}, 'architecture "scmoe"'),
    "no such tap": (make, {"tap": "{previous}.nowhere:input"}, "has no such module"),
    "tap without a side": (make, {"tap": "{previous}.mlp"}, "must end in"),
    "shared from nobody": (make, {"shared_from": 9}, r"experts 0 … 3"),
    "tutel": (lambda: make_tutel(), {}, "use_tutel"),
}


def make_tutel() -> nn.Module:
    model = make()
    feeds(model)[0].moe.deepspeed_moe.use_tutel = True
    return model


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_replaced_says_why_and_stays(case: str) -> None:
    build, fields, message = BAD[case]
    model = build()
    with pytest.raises(ScMoEConfigError, match=message):
        replace_moe_layers(model, section(**fields))
    assert not replaced_layers(model) and not any(module._forward_pre_hooks for module in model.modules())


def test_a_tap_that_does_not_run_before_or_has_another_shape_says_so() -> None:
    model = make()
    replace_moe_layers(model, section(tap="{block}.mlp:output"))
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.moe ran, but not its tap layers\.1\.mlp before it"):
        run(model)
    model = make()
    replace_moe_layers(model, section())
    model.layers[0].post_attention_layernorm.register_forward_pre_hook(lambda _, args: (args[0][:, :6],), prepend=True)
    with pytest.raises(RuntimeError, match="a stage boundary lies between them"):
        model.layers[0].post_attention_layernorm(hidden())
        model.layers[1](hidden())


def test_a_post_norm_model_of_this_package_is_refused() -> None:
    config = ScMoEConfig.from_deepspeed({"scmoe": {"architecture": "topk", "num_experts": EXPERTS}})
    model = GPT(replace(SETTINGS, norm_placement="post"), config)
    with pytest.raises(ScMoEConfigError, match=r"runs.0.blocks.0 is a post-norm block of scmoe_ds: .* build the model"):
        replace_moe_layers(model, section())


class WithCrossAttention(Block):
    """Three sub-layers; its attention is tried with a keyword first, as Megatron-DeepSpeed does."""

    def __init__(self, feed_forward: nn.Module) -> None:
        super().__init__(SETTINGS, feed_forward)
        self.cross, self.cross_layernorm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.input_layernorm(hidden)
        try:
            attended = self.self_attn(normed, cpu_offloading=False)
        except TypeError:
            attended = self.self_attn(normed)
        hidden = hidden + attended
        hidden = hidden + self.cross(self.cross_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def with_cross_attention() -> nn.Module:
    model = make(use_residual=True)
    torch.manual_seed(3)
    model.layers = nn.ModuleList([WithCrossAttention(layer.mlp) for layer in model.layers])
    return model


def test_operators_are_the_models_own_each_of_them_once() -> None:
    results = []
    for slot in ("auto", 1, 2, 3, 4, 5):
        model = with_cross_attention()
        replace_moe_layers(model, section(position="pos2", replace=True, overlap={"expert_slot": slot}))
        run(model)
        results.append(run(model))
        pair = replaced_layers(model)[0].pair
        assert [operator.label for operator in pair.operators()] == ["mlp", "self_attn", "cross", "shared"]
        assert slot == "auto" or pair.schedule.expert_slot == slot
    for found in results[1:]:
        require_equal(found, results[0], 1e-6)
    model = with_cross_attention()
    replace_moe_layers(model, section(position="pos2", replace=True, overlap={"expert_slot": 6}))
    with pytest.raises(ScMoEConfigError, match=r"has 4 operators \(mlp, self_attn, cross, shared\); use 1 … 5"):
        run(model)


def deepspeed_checkpoints(model: nn.Module, blocks: int) -> None:
    """Megatron-DeepSpeed's --checkpoint-activations --checkpoint-num-layers `blocks`."""

    def forward(value: Tensor) -> Tensor:
        for first in range(0, len(model.layers), blocks):
            chunk = model.layers[first : first + blocks]

            def through(hidden: Tensor, chunk: nn.ModuleList = chunk) -> Tensor:
                for layer in chunk:
                    hidden = layer(hidden)
                return hidden

            value = deepspeed.checkpointing.checkpoint(through, value)
        return value

    model.forward = forward


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.8") or Version(deepspeed.__version__) < Version("0.19.8"),
    reason="torch before 2.8 does not show DeepSpeed's checkpoints; DeepSpeed before 0.19.8 has them on GPUs only",
)
@pytest.mark.parametrize(
    ("blocks", "fields"),
    [(1, {"position": "pos2"}), (2, {"position": "pos2"}), (1, {"tap": "{block}.input_layernorm:input"})],
)
def test_deepspeeds_activation_checkpointing(blocks: int, fields: dict[str, Any]) -> None:
    """What cuts a layer from its tap is refused, and both remedies of the message work."""
    model = make(use_residual=True)
    replace_moe_layers(model, section(**fields))
    plain = {name: value for name, value in run(model).items() if "l_aux" not in name}
    model = make(use_residual=True)
    replace_moe_layers(model, section(**fields))
    deepspeed_checkpoints(model, blocks)
    for each in feeds(model):  # a loss that leaves a reentrant checkpoint by another way has no gradient
        each.l_aux = None
    if blocks == 1 and "tap" not in fields:
        with pytest.raises(RuntimeError, match=r"--checkpoint-num-layers 2\), or set scmoe\.tap to a module inside"):
            run_without_aux(model)
        return
    expected = run_without_aux(replace_moe_layers(make(use_residual=True), section(**fields)))
    for _ in range(2):
        require_equal(run_without_aux(model), expected, 1e-6)
    assert plain.keys() == expected.keys()


def run_without_aux(model: nn.Module) -> dict[str, Tensor]:
    """As `run`, for the model's output alone."""
    value = hidden()
    model.zero_grad()
    torch.manual_seed(2)
    output = model(value)
    output.square().mean().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {**found, "input": value.grad, "output": output.detach()}


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_replaced_model_feeds_itself(make_copy: Callable[[nn.Module], nn.Module]) -> None:
    """As those that keep averaged weights make one."""
    model = replace_moe_layers(make(), section())
    other = make_copy(model)
    expected = [run(model) for _ in range(2)]
    for pass_number, want in enumerate(expected):
        require_equal(run(other), want)
        assert all(
            layer.pair is not None and layer.pair._recomputation.in_pieces == (pass_number > 0)
            for layer in replaced_layers(other)
        )
    for one, two in zip(replaced_layers(model), replaced_layers(other), strict=True):
        assert one.pair is not None and two.pair is not None and one.pair is not two.pair
        names = [each.label for each in one.pair.operators()]
        assert names == [each.label for each in two.pair.operators()] and len(names) > 1
        assert two.pair.recorder is one.pair.recorder
    undo_replacement(other)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())
    require_equal(run(model), expected[1])
