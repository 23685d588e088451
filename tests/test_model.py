"""Which streams each method shows the network, and what a model's configuration builds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import tyro
import yaml
from torch import Tensor, nn

from dropgen_fast.config import plain
from dropgen_fast.errors import InputError
from dropgen_fast.fusion import StreamFusion
from dropgen_fast.losses import build_loss
from dropgen_fast.model import DropGen, FusionConfig, Method, ModelConfig, build_model

TINY = ("base_channels=4", "downsamplings=1")
PATCH = (8, 8, 8)


def model(method: str, *, image_channels: int = 1, **settings: Any) -> DropGen:
    torch.manual_seed(0)
    config = ModelConfig(**{"method": method, "network_options": TINY, "precision": "fp32", **settings})
    return build_model(config, image_channels=image_channels, classes=3, patch=PATCH)


def seen(fused: Tensor, image_channels: int = 1) -> tuple[Tensor, Tensor]:
    """Whether the image, and each feature channel, has reached the network: (N,) and (N, Cf) bool."""
    kept = fused.flatten(2).any(2)
    return kept[:, :image_channels].any(1), kept[:, image_channels:]


def test_dropgen_drops_single_channels_in_training() -> None:
    """At p = 0.75, of 64 × 13 channels: 208 are kept, with a standard deviation of 12.5; survivors are multiplied by 4."""
    net = model("dropgen").train()
    image, features = torch.rand(64, 1, *PATCH), torch.randn(64, 12, 4, 4, 4)
    fused = net.fused(image, features=features)
    kept = fused.flatten(2).any(2)
    assert abs(int(kept.sum()) - 208) < 5 * 12.5
    assert torch.equal(fused[kept[:, 0], 0], 4 * image[kept[:, 0], 0])
    image_seen, features_seen = seen(net.eval().fused(image, features=features))
    assert image_seen.all()
    assert features_seen.all()


def test_stream_dropout_drops_the_image_and_by_default_never_the_features() -> None:
    """Of 400 images 300 are dropped, with a standard deviation of 8.7; survivors are not rescaled."""
    net = model("stream-dropout").train()
    image, features = torch.rand(400, 1, *PATCH), torch.randn(400, 12, 4, 4, 4)
    fused = net.fused(image, features=features)
    image_seen, features_seen = seen(fused)
    assert features_seen.all()
    assert abs(int(image_seen.sum()) - 100) < 5 * 8.7
    assert torch.equal(fused[image_seen, :1], image[image_seen])
    both = model("stream-dropout", fusion=FusionConfig(p=(0.5, 0.5))).train()
    image_seen, features_seen = seen(both.fused(image, features=features))
    assert torch.equal(image_seen, ~features_seen.any(1))


@pytest.mark.parametrize("training", [True, False])
def test_features_alone(training: bool) -> None:
    """Two images with the same features, one of which cannot even be read, give the same scores."""
    net = model("features", image_channels=2).train(training)
    dropping_nothing = model("no-dropout", image_channels=2).train(training)
    features = torch.randn(2, 24, 4, 4, 4)
    images = torch.rand(2, 2, *PATCH), torch.full((2, 2, *PATCH), torch.nan)
    fused = [net.fused(image, features=features) for image in images]
    assert torch.equal(*fused)
    assert not fused[0][:, :2].any()
    assert torch.equal(fused[0][:, 2:], dropping_nothing.fused(images[0], features=features)[:, 2:])
    assert torch.equal(net(images[0], features=features), net(images[1], features=features))
    # The extractor's features are seen.
    assert not torch.equal(net(images[0]), net(images[0].flip(2)))
    # A fixed draw goes for the features in training, and as ever for nothing in evaluation.
    keep = torch.zeros(2, 26, dtype=torch.bool)
    keep[:, 1] = keep[:, 5] = True
    image_seen, features_seen = seen(net.fused(images[0], keep, features=features), 2)
    assert not image_seen.any()
    assert features_seen.sum(1).tolist() == ([1, 1] if training else [24, 24])


def test_features_alone_need_features() -> None:
    with pytest.raises(ValueError, match="features must be given where use_image is False"):
        StreamFusion(0.0, use_image=False)(torch.rand(1, 1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"p must be 0 where use_image is False, got 0\.5"):
        StreamFusion(0.5, use_image=False)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_dropped_and_the_image_alone(training: bool) -> None:
    image = torch.rand(4, 2, *PATCH)
    image_seen, features_seen = seen(model("no-dropout", image_channels=2).train(training).fused(image), 2)
    assert image_seen.all()
    assert features_seen.all()
    erm = model("erm", image_channels=2).train(training)
    assert erm.extractor is None
    assert torch.equal(erm.fused(image), image)


def test_every_method_with_features_has_the_same_network() -> None:
    """So that only the streams differ; and the drop rate may be given for all of them."""
    fusion = FusionConfig(p=(0.5,), at_least_one=True)
    assert model("erm", fusion=fusion).extractor is None
    networks = [model(method, fusion=fusion).network for method in get_args(Method) if method != "erm"]
    assert len(networks) == 4
    first = networks[0].state_dict()
    for network in networks[1:]:
        assert all(torch.equal(value, first[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("settings", [
    {}, {"method": "erm"}, {"method": "features"}, {"method": "no-dropout", "activation_checkpointing": True},
    {"method": "stream-dropout", "fusion": FusionConfig(p=(0.5, 0.25), p_start=(0.1,), p_ramp_steps=7, at_least_one=True),
     "extractor_stride": 2, "extractor_weights": Path("/weights/a.pth"), "network": "monai.networks.nets:DynUNet",
     "network_options": ("filters=[4, 8, 8]", "deep_supervision=true"), "precision": "fp32"},
])
def test_a_configuration_comes_back_from_its_plain_values(settings: dict[str, Any]) -> None:
    """As a checkpoint holds them, and as config.yaml does."""
    config = ModelConfig(**settings)
    for saved in (plain(config), yaml.safe_load(yaml.safe_dump(plain(config)))):
        assert ModelConfig.from_plain(saved) == config
        moved = ModelConfig.from_plain(saved, extractor_weights=Path("elsewhere.pth"))
        assert moved == dataclasses.replace(config, extractor_weights=Path("elsewhere.pth"))


@pytest.mark.parametrize("change", [lambda saved: saved | {"wings": 2}, lambda saved: {},
                                    lambda saved: saved | {"fusion": {"mode": "stream"}}])
def test_settings_of_another_version(change: Any) -> None:
    with pytest.raises(InputError, match="another version's"):
        ModelConfig.from_plain(change(plain(ModelConfig())))


def test_the_method_is_one_field_of_the_command_line() -> None:
    for method in get_args(Method):
        assert tyro.cli(ModelConfig, args=["--method", method, "--activation-checkpointing"]) == ModelConfig(
            method=method, activation_checkpointing=True)


@pytest.mark.parametrize(("method", "p", "message"), [
    ("dropgen", (1.0,), r"fusion: p must be in \[0, 1\), got 1.0"),
    ("stream-dropout", (0.7, 0.7), "fusion: .*sum is at most 1"),
    ("dropgen", (0.1, 0.2, 0.3), "fusion.p must be one drop rate or two"),
])
def test_drop_rates_that_cannot_be(method: str, p: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(method, fusion=FusionConfig(p=p))


@pytest.mark.parametrize(("network", "options"), [
    ("monai.networks.nets:DynUNet", ("filters=[4, 8, 8]", "strides=[1, 2, 2]", "deep_supervision=true")),
    ("test_networks:Listing", ()),
])
def test_deep_supervision_is_for_training(network: str, options: tuple[str, ...]) -> None:
    """In training the loss gets what the network gives, in evaluation the model gives one tensor."""
    net = model("no-dropout", network=network, network_options=options)
    image = torch.rand(2, 1, *PATCH)
    output = net.train()(image)
    assert output.shape == (2, 2, 3, *PATCH) if isinstance(output, Tensor) else len(output) == 2
    build_loss("dice_ce", (), 3)(output, torch.zeros(2, 1, *PATCH, dtype=torch.uint8)).backward()
    assert all(p.grad is not None for p in net.parameters())
    with torch.no_grad():
        scores = net.eval()(image)
    assert scores.shape == (2, 3, *PATCH)
    if "Listing" in network:
        assert torch.equal(scores, net.network(net.fused(image))[0])


def test_activation_checkpointing_is_a_field() -> None:
    """The same scores and gradients, in bfloat16 too, under the same names."""
    image = torch.rand(2, 1, *PATCH)
    found = []
    for recompute in (False, True):
        net = model("no-dropout", activation_checkpointing=recompute, precision="bf16").train()
        net(image).float().square().sum().backward()
        found.append((net.network.activation_checkpointing, dict(net.named_parameters()), net.state_dict()))
    (off, plainly, state), (on, again, state_again) = found
    assert (off, on) == (False, True)
    assert list(state) == list(state_again)
    assert all(torch.equal(value, state_again[name]) for name, value in state.items())
    assert all(torch.equal(p.grad, again[name].grad) for name, p in plainly.items())


def test_the_batch_is_tried() -> None:
    config = ModelConfig(method="erm", network="monai.networks.nets:UNet",
                         network_options=("channels=[4, 8, 16, 32]", "strides=[2, 2, 2]", "norm=BATCH"))
    build_model(config, image_channels=1, classes=2, patch=PATCH, batch_size=2)
    with pytest.raises(InputError, match=r"a single voxel is left.*larger batch_size"):
        build_model(config, image_channels=1, classes=2, patch=PATCH, batch_size=1)


def test_the_model_s_state_is_the_network_s() -> None:
    net = model("features")
    assert isinstance(net.network, nn.Module)
    assert {name.partition(".")[0] for name in net.state_dict()} == {"network"}


def test_stride_gives_coarse_features_that_the_fusion_interpolates() -> None:
    config = ModelConfig(network_options=("base_channels=4", "downsamplings=1"), extractor_stride=2)
    model = build_model(config, image_channels=1, classes=3, patch=(8, 8, 8))
    assert model.extractor is not None
    assert model.extractor(torch.rand(1, 1, 8, 8, 8)).shape == (1, 12, 4, 4, 4)
    assert model(torch.rand(1, 1, 8, 8, 8)).shape == (1, 3, 8, 8, 8)
