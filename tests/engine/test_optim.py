import math

import pytest
import torch
from helpers import golden
from torch import nn

from engine.optim import FUSED, build_optimizer, cosine, parameter_groups, set_schedule
from models import create_model

SCHEDULES = golden("schedules")


@pytest.mark.parametrize("name", SCHEDULES["schedules"])
def test_golden_schedule(name):
    case = SCHEDULES["schedules"][name]
    spec = case["args"]
    steps = spec["epochs"] * spec["niter_per_ep"]
    warmup = spec.get("warmup_steps", 0) or spec.get("warmup_epochs", 0) * spec["niter_per_ep"]
    values = [
        cosine(
            step,
            base=spec["base_value"],
            final=spec["final_value"],
            total_steps=steps,
            warmup_steps=warmup,
            start=spec.get("start_warmup_value", 0.0),
        )
        for step in range(steps)
    ]
    assert len(values) == case["length"] and all(type(v) is float for v in values)
    assert values[:5] == pytest.approx(case["first5"], abs=1e-9) and values[-5:] == pytest.approx(
        case["last5"], abs=1e-9
    )
    for quarter, index in zip(("q1", "q2", "q3"), case["index_q"], strict=True):
        assert values[index] == pytest.approx(case[quarter], abs=1e-9)
    for index, value in case.get("around_warmup_end", {}).items():
        assert values[int(index)] == pytest.approx(value, abs=1e-9)
    for epoch, value in case.get("epoch_starts_0_11_12_13_19", {}).items():
        assert values[int(epoch) * spec["niter_per_ep"]] == pytest.approx(value, abs=1e-9)
    assert values == pytest.approx(case.get("all", values), abs=1e-9)
    assert sum(values) == pytest.approx(case["sum"], rel=1e-9)


def test_golden_layer_decay_groups():
    model = create_model("vit_small_patch16_224")
    expected = SCHEDULES["layer_decay"]["vit_small_depth12_decay0.6"]
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.6)
    assert len(groups) == expected["n_groups"] and sum(len(g["params"]) for g in groups) == expected["n_named_params"]
    for group, order in zip(groups, expected["group_order"], strict=True):
        assert group["lr_scale"] == pytest.approx(order["lr_scale"], abs=1e-12)
        assert group["weight_decay"] == order["weight_decay"]
        assert len(group["params"]) == order["n_tensors"]
        assert sum(p.numel() for p in group["params"]) == order["n_elems"]
    place = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    parameters = dict(model.named_parameters())
    for name, spec in expected["params"].items():
        assert place[id(parameters[name])] == spec["group_index"], name


@pytest.mark.parametrize(
    ("model", "decay", "key"),
    [
        ("vit_large_patch16_224", 0.6, "depth24_decay0.6"),
        ("vit_base_patch16_224", 0.75, "depth12_decay0.75_script_default"),
    ],
)
def test_golden_layer_scales(model, decay, key):
    with torch.device("meta"):
        groups = parameter_groups(create_model(model), weight_decay=0.05, layer_decay=decay)
    expected = sorted(SCHEDULES["layer_decay"][key]["lr_scale_by_layer_id"].values())
    assert sorted({g["lr_scale"] for g in groups}) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "name", ["internvideo2_small_patch14_224", "umt_vit_base_patch16_224", "vit_small_patch16_224"]
)
def test_layer_of_every_parameter(name):
    """Embedding 0, block i at i + 1, all behind the blocks last; no decay for tables, tokens and 1-D parameters."""
    with torch.device("meta"):
        model = create_model(name)
        model.learn_pos_embed()
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
    found = {id(p): (round(13 + math.log(g["lr_scale"], 2)), g["weight_decay"]) for g in groups for p in g["params"]}
    golden_ids = SCHEDULES["layer_decay"]["names_not_in_vit_small_but_rule_covers"]
    assert len(found) == len(list(model.parameters()))
    for key, p in model.named_parameters():
        module, *inner = key.split(".")
        layers = {"blocks": int(inner[0]) + 1 if module == "blocks" else None, "patch_embed": 0, "clip_projector": 13}
        expected = {**golden_ids, **layers}[module if module in layers else key.replace(".bias", ".weight")]
        undecayed = p.ndim == 1 or module in ("pos_embed", "cls_token")
        assert found[id(p)] == (expected, 0.0 if undecayed else 0.05), key


def test_without_layer_decay_there_are_two_groups_and_frozen_parameters_are_left_out():
    model = create_model("vit_tiny_patch16_64")
    none, decayed = parameter_groups(model, weight_decay=0.05)
    assert (
        none["weight_decay"] == 0 and decayed["weight_decay"] == 0.05 and none["lr_scale"] == decayed["lr_scale"] == 1
    )
    assert all(p.ndim == 1 for p in none["params"]) and all(p.ndim > 1 for p in decayed["params"])
    model.freeze_blocks(4)
    for layer_decay in (1.0, 0.6):
        groups = parameter_groups(model, weight_decay=0.05, layer_decay=layer_decay)
        assert all(p.requires_grad for g in groups for p in g["params"])


def test_schedule_reaches_every_group():
    model = create_model("vit_tiny_patch16_64")
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
    optimizer = build_optimizer(groups, name="adamw", lr=1.0, eps=1e-8, betas=[0.9, 0.95])
    set_schedule(optimizer, lr=0.1, weight_decay=0.02)
    assert {round(g["lr"] / g["lr_scale"], 12) for g in optimizer.param_groups} == {0.1}
    assert len({g["lr"] for g in optimizer.param_groups}) == 6
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.02}
    assert {g["betas"] for g in optimizer.param_groups} == {(0.9, 0.95)}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_optimizers_by_name(name):
    model = create_model("vit_tiny_patch16_64", init_scale=1.0)
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.6)
    optimizer = build_optimizer(groups, name=name, lr=1e-2, eps=1e-8, betas=[0.9, 0.999])
    before = model.head.weight.clone()
    model(torch.randn(1, 3, 4, 64, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


@pytest.mark.parametrize("name", FUSED)
def test_one_kernel_steps_as_many_do(name):
    """Beside the class and the options that timm gives the name, without a kernel of its own."""
    torch.manual_seed(0)
    ends = []
    for fused in (True, False):
        parameters = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 64)]
        optimizer = build_optimizer([{"params": parameters}], name=name, lr=1e-2, eps=1e-8, betas=(0.9, 0.95))
        assert optimizer.param_groups[0]["fused"] is True
        if not fused:
            options = optimizer.param_groups[0] | {"fused": False}
            options.pop("decoupled_weight_decay", None)
            optimizer = type(optimizer)(**options)
        for step in range(5):
            for p in parameters:
                p.grad = p.detach().sin() + 0.1 * step
            optimizer.step()
        ends.append(torch.cat([p.detach() for p in parameters]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_adam_s_options_do_not_depend_on_how_its_name_is_written():
    for name in ("adamw", "AdamW"):
        optimizer = build_optimizer(
            [{"params": [torch.nn.Parameter(torch.zeros(2))]}],
            name=name,
            lr=1.0,
            eps=1e-3,
            betas=(0.5, 0.6),
        )
        assert optimizer.defaults["betas"] == (0.5, 0.6) and optimizer.defaults["eps"] == 1e-3


def test_dapt_groups_are_the_reference_s():
    known = SCHEDULES["dapt_groups_vit_small_dec4"]
    with torch.device("meta"):
        model = create_model("pretrain_videomae_small_patch16_224")
    groups = parameter_groups(model, weight_decay=0.05)
    found = {g["weight_decay"]: (len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups}
    assert found == {g["weight_decay"]: (g["n_tensors"], g["n_elems"]) for g in known["groups"]}
    assert any(model.mask_token is p for g in groups if g["weight_decay"] == 0 for p in g["params"])
