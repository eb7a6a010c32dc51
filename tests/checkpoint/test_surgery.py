"""A trained model's weights as those of a ScMoE: what is kept, what is copied, and how near the first forward is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from scmoe_ds import checkpoint
from scmoe_ds.checkpoint.export import export
from scmoe_ds.checkpoint.source_model import SourceModel
from scmoe_ds.config.names import Merge
from scmoe_ds.data.durable_files import file_entry
from scmoe_ds.engine import connect
from scmoe_ds.errors import CheckpointError, ScMoEConfigError
from scmoe_ds.inference.load import load_trained
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.moe.merge import coefficient_network, merge_outputs
from scmoe_ds.moe.merge_start import start_of_merge
from scmoe_ds.programs import sparsify
from scmoe_ds.programs.adapt import main
from tests.helpers.exports import whole_model, write_export

SETTINGS = GPTSettings(4, 16, 2, 320, 16, normalization="RMSNorm", swiglu=True, ffn_hidden_size=24)
TOKENS = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(3))
SOURCES: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "top_k": 2, "num_experts": 4},
    "shared": {"architecture": "shared_expert", "num_experts": 4},
    "shared add": {"architecture": "overlapped_shared_expert", "merge": "add", "num_experts": 4},
}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, GPT]]:
    """Exports of models whose norms are not all ones, and the models."""
    found = {}
    for name, section in SOURCES.items():
        model = whole_model(SETTINGS, section)
        for number, (key, each) in enumerate(model.named_parameters()):
            if key.endswith("norm.weight"):
                each.data += 0.01 * number
        found[name] = str(write_export(tmp_path_factory.mktemp("source") / "export", model)), model
    return found


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model-00001-of-00001.safetensors")


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    found = model.eval()(TOKENS).logits
    assert found is not None
    return found


def written(directory: Path) -> GPT:
    """The model that an output directory describes, with its weights."""
    model = GPT(*checkpoint.rebuild(json.loads((directory / "config.json").read_text())))
    model.load_state_dict(tensors_of(directory))
    return model


@pytest.mark.parametrize("norm", ["own", "shared"])
@pytest.mark.parametrize(
    ("position", "copied"),
    [("pos1", "blocks.1.mlp_norm"), ("pos2", "blocks.1.mlp_norm"), ("pos3", "blocks.0.attention_norm")],
)
def test_with_the_sources_shared_expert_the_tap_alone_moves(
    position: str, copied: str, norm: str, sources: dict[str, tuple[str, GPT]], tmp_path: Path
) -> None:
    (path, before), out = sources["shared"], tmp_path / "out"
    assert main([path, "--output", str(out), "--position", position, "--shortcut-norm", norm]) == 0
    weights, old = tensors_of(out), dict(before.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in old.items())
    new = {f"runs.{run}.shortcut_norm.weight": old[f"runs.{run}.{copied}.weight"] for run in (0, 1)}
    assert weights.keys() - old.keys() == (new.keys() if norm == "own" else set())
    assert all(torch.equal(weights[name], value) for name, value in new.items() if norm == "own")
    # Independently: the same weights in a model that was built as a ScMoE.
    section = {"architecture": "scmoe", "merge": "cg2", "position": position, "shortcut_norm": norm}
    plain = whole_model(SETTINGS, {**section, "num_experts": 4})
    plain.load_state_dict({**old, **(new if norm == "own" else {})})
    assert torch.equal(logits(written(out)), logits(plain))
    assert not torch.allclose(logits(plain), logits(before)), "the experts read another layer now"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("merge", ["add", "cg1", "cg2"])
def test_a_student_of_which_no_layer_is_converted_is_the_source(
    source: str, merge: Merge, sources: dict[str, tuple[str, GPT]], tmp_path: Path
) -> None:
    (path, before), free = sources[source], {"drop_tokens": False, "use_rts": False, "min_capacity": 0}
    opened = SourceModel.open(Path(path))
    none = opened.student({"merge": merge, "top_k": 1, **free}, [])
    every = opened.with_base(opened.student({"merge": merge, "top_k": 1, **free}))
    for config in (none, every):
        weights, model = opened.surgery(config), GPT(SETTINGS, config)
        model.load_state_dict({name: weights.read(name) for name in weights.names()})
        for name, each in model.named_parameters():
            assert list(weights.shape(name)) == list(each.shape)
        with model.conversion.as_source():
            # DeepSpeed's own class adds the choices of a token in another order.
            torch.testing.assert_close(logits(model), logits(before), rtol=1e-6, atol=2e-6)
    assert none.adapt is not None and none.adapt.layers == []


def test_a_new_shared_expert_is_the_mean_or_the_busiest(sources: dict[str, tuple[str, GPT]], tmp_path: Path) -> None:
    path, before = sources["topk"]
    text = bytes(TOKENS.flatten().tolist() * 3).decode("latin-1").encode()[:96].decode("utf-8", "ignore")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids = torch.tensor(list(text.encode()))
    with torch.no_grad():
        counts = before(ids[: len(ids) // 16 * 16].view(-1, 16)).exp_counts  # of DeepSpeed's own layers
    flags = ["--text-file", str(tmp_path / "text.txt"), "--seq-length", "16", "--batch-size", "2"]
    busiest, mean, scaled = (tmp_path / name for name in ("busiest", "mean", "scaled"))
    assert main([path, "--output", str(busiest), "--shared-expert", "busiest", *flags]) == 0
    assert main([path, "--output", str(mean)]) == 0
    assert main([path, "--output", str(scaled), "--merge", "add", "--dtype", "bf16"]) == 0
    old = before.state_dict()
    for run in (0, 1):
        moe = f"runs.{run}.blocks.1.moe."
        experts = f"{moe}deepspeed_moe.experts.deepspeed_experts."
        for part in ("input.weight", "input.bias", "output.weight", "output.bias"):
            every = torch.stack([old[f"{experts}{number}.{part}"] for number in range(4)])
            assert torch.equal(tensors_of(busiest)[f"{moe}mlp.{part}"], every[counts[run].argmax()])
            torch.testing.assert_close(tensors_of(mean)[f"{moe}mlp.{part}"], every.mean(0))
            small = every.mean(0) * (0.05 if part.startswith("output") else 1)
            torch.testing.assert_close(tensors_of(scaled)[f"{moe}mlp.{part}"].float(), small, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("join", ["end", "late"])
def test_a_fitted_shared_expert_makes_up_for_the_moved_tap(
    join: str, sources: dict[str, tuple[str, GPT]], tmp_path: Path
) -> None:
    (path, before), text, out = sources["topk"], tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(chr(32 + 7 * place % 90) for place in range(320)))
    tokens = torch.tensor(list(text.read_bytes())).view(-1, 16)
    flags = ["--text-file", str(text), "--shared-expert", "fit", "--batch-size", "4", "--join", join]
    assert main([path, "--output", str(out), *flags]) == 0
    assert main([path, "--output", str(tmp_path / "mean"), "--join", join]) == 0
    seen: dict[str, Tensor] = {}
    first, last = (block.mlp_norm for block in before.runs[0].blocks)
    first.register_forward_hook(lambda _, given, __: seen.update({"tap": given[0]}))
    last.register_forward_hook(lambda _, __, value: seen.update({"current": value}))
    with torch.no_grad():
        expected = before(tokens).logits
        moe = before.runs[0].last.moe
        missing_TD = (moe(seen["current"])[0] - moe(last.forward(seen["tap"]))[0]).flatten(0, 1)
        mean, fitted = (tensors_of(tmp_path / name) for name in ("mean", "out"))
        name = "runs.0.blocks.1.moe.mlp."
        inner = F.linear(seen["current"].flatten(0, 1), mean[f"{name}input.weight"], mean[f"{name}input.bias"])
        gate, up = inner.chunk(2, dim=1)
        inner_TF = 0.5 * torch.cat([F.silu(gate) * up, torch.ones(len(inner), 1)], dim=1)
        ridge = (1e-3 * inner_TF.square().sum(0).mean()).sqrt() * torch.eye(25)
        by_rows = torch.cat([inner_TF, ridge]).double(), torch.cat([missing_TD, torch.zeros(25, 16)]).double()
        solution_FD = torch.linalg.lstsq(*by_rows).solution.float()
    torch.testing.assert_close(fitted[f"{name}output.weight"], solution_FD[:-1].t(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fitted[f"{name}output.bias"], solution_FD[-1], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        far, near = ((written(tmp_path / each)(tokens).logits - expected).norm() for each in ("mean", "out"))
    assert near < far


def test_layers_convert_in_part(sources: dict[str, tuple[str, GPT]], tmp_path: Path) -> None:
    path, before = sources["shared"]
    out = tmp_path / "out"
    assert main([path, "--output", str(out), "--layers", "1", "--merge", "cg1", "--join", "late"]) == 0
    model, config = written(out), json.loads((out / "config.json").read_text())["scmoe"]
    base = {"architecture": "overlapped_shared_expert", "top_k": 1, "merge": "cg2"}
    assert config["adapt"]["base"] == base and config["adapt"]["layers"] == [1]
    assert [pair.config.has_shortcut for pair in model.runs] == [False, True]
    model.conversion.only([])
    torch.testing.assert_close(logits(model), logits(before), rtol=1e-6, atol=2e-6)


def test_a_finished_adaptation_is_a_plain_scmoe(
    sources: dict[str, tuple[str, GPT]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was converted step by step keeps its base while it goes on, and loses it in an export of the end."""
    opened, free = SourceModel.open(Path(sources["shared"][0])), {"drop_tokens": False, "use_rts": False}
    config = opened.with_base(opened.student({"merge": "cg1", **free}))
    assert config.adapt is not None
    adapt, weights = config.adapt.model_copy(update={"convert_every": 10}), opened.surgery(config)
    config = config.model_copy(update={"adapt": adapt})
    assert [adapt.converted_after(steps, 2) for steps in (0, 9, 10, 99)] == [[1], [1], [0, 1], [0, 1]]
    model = GPT(SETTINGS, config)
    model.load_state_dict({name: weights.read(name) for name in weights.names()})
    path = write_export(tmp_path / "saved", model)

    def at(iteration: int) -> None:
        """As a checkpoint of that iteration."""
        whole = json.loads((path / "config.json").read_text()) | {"iteration": iteration}
        (path / "config.json").write_text(json.dumps(whole))
        manifest = json.loads((path / "scmoe_files.json").read_text())
        manifest["config.json"] = file_entry(path / "config.json")
        (path / "scmoe_files.json").write_text(json.dumps(manifest))

    at(10)  # its layer 0 has never run as ScMoE
    with pytest.raises(CheckpointError, match=r"1 of 2 layers are converted so far \(.*convert_every = 10\); export a"):
        export(path, tmp_path / "early")
    flags = ["--load", str(path), "--text-file", str(tmp_path / "not read"), "--output", str(tmp_path / "sparse")]
    assert sparsify.main(flags) == 2 and "1 of 2 layers are converted so far" in capsys.readouterr().err
    model.conversion.only([1])
    assert torch.equal(logits(load_trained(path).model), logits(model))
    at(11)
    export(path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["scmoe"]["adapt"] is None
    model.conversion.only([0, 1])
    assert torch.equal(logits(written(tmp_path / "out")), logits(model))
    assert torch.equal(logits(load_trained(path).model), logits(model))


def merged(merge: Merge, network: tuple[Tensor, Tensor] | None, shared: Tensor, routed: Tensor, x: Tensor) -> Tensor:
    layer = coefficient_network(merge, 8)
    if layer is not None:
        assert network is not None
        layer.weight.data, layer.bias.data = network
    with torch.no_grad():
        return merge_outputs(merge, shared, routed, x, layer)


def test_merges_start_near_what_the_layer_computed() -> None:
    draw = torch.Generator().manual_seed(1)
    shared, routed, x = torch.randn(3, 5, 8, generator=draw).unbind()
    cg1 = 0.3 * torch.randn(1, 8, generator=draw), torch.tensor([0.7])
    cg2 = 0.3 * torch.randn(2, 8, generator=draw), torch.tensor([0.7, -0.2])

    def first(merge: Merge, before: Merge | None, old: Any = None) -> Tensor:
        return merged(merge, start_of_merge(merge, before, old, 8), shared, routed, x)

    torch.testing.assert_close(first("cg1", None), routed + 0.05 * shared)
    torch.testing.assert_close(first("cg2", None), 0.95 * routed + 0.05 * shared)
    torch.testing.assert_close(first("cg1", "add"), routed + 0.95 * shared)
    torch.testing.assert_close(first("cg2", "add"), (routed + shared) / 2)
    torch.testing.assert_close(first("cg1", "cg1", cg1), merged("cg1", cg1, shared, routed, x))
    of_shared = F.softmax(F.linear(x, *cg2), dim=-1)[:, 1:]
    torch.testing.assert_close(first("cg1", "cg2", cg2), routed + of_shared * shared)
    small = cg1[0] / 100, cg1[1]
    ratio = torch.sigmoid(F.linear(x, *small))
    torch.testing.assert_close(
        first("cg2", "cg1", small), (routed + ratio * shared) / (1 + ratio), rtol=1e-4, atol=1e-5
    )


def test_sources_that_cannot_become_the_model(sources: dict[str, tuple[str, GPT]], tmp_path: Path) -> None:
    opened = SourceModel.open(Path(sources["topk"][0]))
    config = opened.student({})
    with pytest.raises(
        CheckpointError, match=r"differs in more than .* \(num_layers 4 → 8\); set that as in the source"
    ):
        opened.check(replace(SETTINGS, num_layers=8), config)
    with pytest.raises(ScMoEConfigError, match=r"moe_shared_expert_intermediate_size = 48: .* has no shared expert"):
        opened.check(SETTINGS, config.model_copy(update={"moe_shared_expert_intermediate_size": 48}))
    model = whole_model(replace(SETTINGS, norm_placement="post"), SOURCES["shared"])
    post = SourceModel.open(write_export(tmp_path / "post", model))
    with pytest.raises(
        CheckpointError, match="is a post-norm model: it has no norm that the shortcut's own norm could"
    ):
        post.student({"position": "pos1"})
    weights = post.surgery(post.student({"position": "pos1", "shortcut_norm": "shared"}))
    assert weights.names() == sorted(model.state_dict())
    late = {"architecture": "pipelined_topk", "join": "late", "num_experts": 4}
    with pytest.raises(CheckpointError, match=r'was trained with scmoe\.join = "late"'):
        SourceModel.open(write_export(tmp_path / "late", whole_model(SETTINGS, late)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--layers", "0", "5"], "scmoe.adapt.layers = [0, 5]: the model has the MoE layers 0 … 1; name those"),
        (["--layers", "1", "1"], "scmoe.adapt.layers = [1, 1]: name each MoE layer once"),
        (["--top-k", "5"], "scmoe.top_k = 5: cannot exceed the number of experts (4)"),
        (["--shared-expert", "mean"], "--shared-expert mean: "),
        (["--shard-gb", "nan"], "--shard-gb nan: must be a finite number above 0"),
        (["--noise", "nan"], "--noise nan: must be a finite number of at least 0"),
    ],
)
def test_bad_input(
    flags: list[str],
    said: str,
    sources: dict[str, tuple[str, GPT]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([sources["shared"][0], "--output", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("scmoe adapt: error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_block_allows_pos1_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_export(tmp_path / "in", whole_model(SETTINGS, {**SOURCES["topk"], "moe_every": 1}))
    assert main([str(source), "--output", str(tmp_path / "out"), "--position", "pos2"]) == 2
    assert 'scmoe.position = "pos2": with an MoE in every block' in capsys.readouterr().err
    assert main([str(source), "--output", str(tmp_path / "out")]) == 0
    assert main([str(tmp_path / "out"), "--output", str(tmp_path / "again")]) == 2
    assert 'is a ScMoE already (architecture "scmoe"); go on training it' in capsys.readouterr().err
