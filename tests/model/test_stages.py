import pytest
import timm
import torch
from torch import nn

import hf_scan  # noqa: F401
from hf_scan.model.stages import StageState, cut_into_stages


# The smallest network of every module file of timm that is cut and runs in a few seconds. What is between two stages
# differs: maps with the channels first or last, tokens with and without class tokens, several tensors, position
# encodings, sizes.
BACKBONES = """
cifar_resnet20 cifar_resnet50 cifar_vgg16_bn cifar_wrn20_8 convit_tiny test_byobnet test_convnext cpubone_nano
crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0
efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 gcvit_xxtiny ghostnet_050 hardcorenas_b
hgnetv2_b0 iformer_t inception_next_atto lcnetv2_small levit_128s lowformer_b0 test_mambaout test_coatnet
poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilevit_xxs test_nfnet pit_ti_224 pvt_v2_b0 rdnet_tiny
regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d resnetblur18 test_resnet resnetv2_18 rexnet_100
selecsls42 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos
ese_vovnet19b_slim_dw xcit_nano_12_p8_224 eva02_tiny_patch14_224 coatnet_nano_rw_224 vit_relpos_small_patch16_224
""".split()  # noqa: SIM905


SLOW = """
halonet_h1 convmixer_768_32 deepseek_vit_412m sam2_hiera_tiny naflexvit_base_patch16_parfac_gap qwen3_vit_88m
beit_base_patch16_224 cait_xxs24_224 davit_tiny focalnet_tiny_srf hiera_tiny_224 inception_resnet_v2 inception_v3
inception_v4 mobilenetv5_base nasnetalarge nest_tiny_jx nextvit_small pnasnet5large sequencer2d_s
swinv2_tiny_window16_256 swinv2_cr_tiny_224 vgg11 samvit_base_patch16_224 vitamin_small_224 volo_d1_224
legacy_xception xception41p
""".split()  # noqa: SIM905


# Not in the oldest timm that is admitted. All others are in each.
NEWER = """
    cpubone_nano cspnext_tiny efficientvim_m1 vit_tiny_patch16_dinov3_qkvb iformer_t lcnetv2_small lowformer_b0
    test_coatnet test_vit_relpos deepseek_vit_412m qwen3_vit_88m
""".split()  # noqa: SIM905
MISSING = {name for name in NEWER if not timm.is_model(name)}
EVERY_FAMILY = [
    *(name for name in BACKBONES if name not in MISSING),
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW if name not in MISSING),
]


def run(stages, backbone, images):
    state = StageState.from_images(images)
    for stage in stages:
        state = stage.run(backbone, state)
        yield stage, state


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_every_family_runs_in_stages(name):
    """Bit for bit what the plain model gives; and images that leave the batch change nothing for the others."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=10).eval()
    stages = cut_into_stages(backbone)
    images = torch.randn(3, *backbone.pretrained_cfg["input_size"])
    with torch.no_grad():
        plain = backbone(images)
        for stage, state in run(stages, backbone, images):
            if stage is not stages[-1]:
                feature = stage.feature(state)
                assert feature.shape[:2] == (3, stage.channels)
                assert feature.shape[2] == pytest.approx(images.shape[2] / stage.reduction, rel=0.1, abs=1)
        assert torch.equal(backbone.forward_head(state.values[0]), plain)

        rows, state = torch.tensor([2, 0]), StageState.from_images(images)
        for stage in stages:
            state = stage.run(backbone, state)
            if stage is stages[0]:
                state = state.select(rows)
        few = backbone.forward_head(state.values[0])
    torch.testing.assert_close(few, plain[rows], rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize(
    ("size", "kwargs"),
    [
        ((32, 128), {"img_size": (32, 128)}),  # 2x8 tokens, as many as 4x4
        ((128, 32), {"dynamic_img_size": True}),
        ((36, 130), {"dynamic_img_size": True, "dynamic_img_pad": True}),
        ((64, 64), {"img_size": 64, "patch_size": (32, 8)}),
    ],
)
def test_tokens_make_up_the_grid_that_they_came_from(size, kwargs):
    """Not a square because their number is one: each token of the map is that of its own place in the image."""
    torch.manual_seed(0)
    backbone = timm.create_model("test_vit", num_classes=10, **kwargs).eval()
    first = cut_into_stages(backbone, [0])[0]
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        state = first.run(backbone, StageState.from_images(images))
        _, maps = backbone.forward_intermediates(images, indices=[0], intermediates_only=False)
    assert torch.equal(first.feature(state), maps[0])


def test_every_module_file_of_timm_is_known():
    """A new family belongs to the list above, or to those that are refused or too large to run here."""
    files = {file: set(timm.list_models(module=file)) for file in timm.list_modules()}
    known = {file for file, names in files.items() if names.intersection(BACKBONES + SLOW)}
    refused = {"coat", "gemma4_vit", "hrnet", "mvitv2", "twins"}
    assert {file for file, names in files.items() if names} - known - refused == set()


@pytest.mark.parametrize("name", ["coat_tiny", "hrnet_w18_small", "mvitv2_tiny", "twins_svt_small"])
def test_other_families_are_refused(name):
    with torch.device("meta"):
        backbone = timm.create_model(name)
    with pytest.raises(
        ValueError, match=r"(expected once|cannot be cut into stages|0 `feature_info` taps).* another backbone"
    ):
        cut_into_stages(backbone)


@pytest.mark.parametrize("exit_points", [[1], [0, 2], ["layer2"], ["layer1", "layer3"], [0, 1, 2, 3]])
def test_any_subset_of_exit_points(exit_points):
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=10).eval()
    images = torch.randn(1, 3, 64, 64)
    stages = cut_into_stages(backbone, exit_points)
    names = ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert [stage.name for stage in stages[:-1]] == [
        names[point] if isinstance(point, int) else point for point in exit_points
    ]
    with torch.no_grad():
        *_, (_, state) = run(stages, backbone, images)
        assert torch.equal(backbone.forward_head(state.values[0]), backbone(images))


@pytest.mark.parametrize("name", ["legacy_xception", "test_vit", "swin_tiny_patch4_window7_224", "cifar_wrn20_8"])
def test_a_stage_for_every_tap(name):
    """Also inside of blocks, where more than one tensor goes on."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(1, *backbone.pretrained_cfg["input_size"])
    stages = cut_into_stages(backbone, list(range(len(backbone.feature_info) - 1)))
    assert len(stages) == len(backbone.feature_info)
    with torch.no_grad():
        *_, (_, state) = run(stages, backbone, images)
        assert torch.equal(backbone.forward_head(state.values[0]), backbone(images))


def test_cutting_leaves_the_model_as_it_was():
    backbone = timm.create_model("test_resnet")
    backbone.layer1.eval()  # modes differ from module to module
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    cut_into_stages(backbone)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    assert [module.training for module in backbone.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


def test_cutting_works_on_the_meta_device():
    with torch.device("meta"):
        backbone = timm.create_model("test_resnet")
    assert len(cut_into_stages(backbone)) == 4


class _Net(nn.Module):
    """Two stages, and something between them that no module does."""

    pretrained_cfg = {"input_size": (3, 8, 8)}

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.between = between
        self.feature_info = [
            {"num_chs": 4, "reduction": 1, "module": "first"},
            {"num_chs": 4, "reduction": 1, "module": "second"},
        ]

    def forward_features(self, image):
        return self.second(self.between(self.first(image), image))

    def forward_head(self, feature, pre_logits=False):
        return feature.mean((2, 3))


@pytest.mark.parametrize(
    "between",
    [
        lambda x, image: x.relu_(),
        lambda x, image: x + image.mean(1, keepdim=True),
        lambda x, image: x + torch.arange(x.shape[3]),
        lambda x, image: x.reshape(image.shape[0], 4, 8, 8),
        lambda x, image: x * x.new_ones(image.size(0), 4, 1, 1),
    ],
)
def test_what_happens_between_modules_happens(between):
    """Also when the image is still needed, or the number of images, which may have become smaller."""
    torch.manual_seed(0)
    backbone, images = _Net(between), torch.randn(3, 3, 8, 8)
    first, second = cut_into_stages(backbone)
    plain = backbone.forward_features(images)
    assert torch.equal(second.run(backbone, first.run(backbone, StageState.from_images(images))).values[0], plain)
    few = first.run(backbone, StageState.from_images(images)).select(torch.tensor([2, 1]))
    torch.testing.assert_close(second.run(backbone, few).values[0], plain[[2, 1]])


class _Counts(_Net):
    """Counts the images before the exit point, and uses the number behind it."""

    def forward_features(self, image):
        count = image.shape[0]
        return self.second(self.first(image).reshape(count, 4, 8, 8))


def test_the_number_of_images_is_that_of_those_still_there():
    torch.manual_seed(0)
    backbone, images = _Counts(None), torch.randn(3, 3, 8, 8)
    first, second = cut_into_stages(backbone)
    few = first.run(backbone, StageState.from_images(images)).select(torch.tensor([2, 1]))
    torch.testing.assert_close(second.run(backbone, few).values[0], backbone.forward_features(images)[[2, 1]])


def test_a_decision_by_value_is_refused():
    backbone = _Net(lambda x, image: x if x.sum() > 0 else -x)
    with pytest.raises(ValueError, match=r"_Net cannot be cut into stages: .* it decides by what it computes"):
        cut_into_stages(backbone)


def test_weights_are_those_of_the_moment():
    """A stage reads the backbone when it runs, so that weights can be loaded, moved, and modules replaced."""
    backbone, images = timm.create_model("test_vit").eval(), torch.randn(1, 3, 160, 160)
    stages = cut_into_stages(backbone)
    backbone.pos_embed = nn.Parameter(torch.randn_like(backbone.pos_embed))
    backbone.blocks[3] = nn.Identity()
    *_, (_, state) = run(stages, backbone, images)
    assert torch.equal(backbone.forward_head(state.values[0]), backbone(images))


def test_a_model_without_maps_is_refused():
    with pytest.raises(ValueError, match="Linear does not say which images it was made for; expected `image_size`"):
        cut_into_stages(nn.Linear(2, 2))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    with pytest.raises(ValueError, match="Sequential has no map in front of its classifier"):
        cut_into_stages(flat, image_shape=(3, 8, 8))


@pytest.mark.parametrize(
    ("name", "exit_points"),
    [
        ("test_resnet", ["layer1", "layer3.0"]),
        ("cifar_resnet20", ["layer1.1", "layer1", 1, "layer3.1"]),
        ("test_vit", ["blocks.0", "blocks.3"]),
        ("mobilenetv3_small_050", ["blocks.2.1", "blocks.4.1"]),
        ("swin_tiny_patch4_window7_224", ["layers.1.blocks.0", "layers.2.blocks.3"]),
        ("legacy_xception", ["block5", "block9"]),
        ("levit_128s", ["stages.1.blocks.0", "stages.2.downsample"]),
    ],
)
def test_exits_stand_after_any_block(name, exit_points):
    """Maps and grids of tokens, in stages that have an exit at their end too."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(2, *backbone.pretrained_cfg["input_size"])
    stages, hooked = cut_into_stages(backbone, exit_points), {}
    for stage in stages[:-1]:
        module = backbone.get_submodule(stage.name)
        module.register_forward_hook(lambda module, args, output, name=stage.name: hooked.update({name: output}))
    with torch.no_grad():
        plain = backbone(images)
        for stage, state in run(stages, backbone, images):
            if stage is not stages[-1]:
                assert torch.equal(state.values[0], hooked[stage.name])
                feature = stage.feature(state)
                assert feature.shape[1] == stage.channels
                assert feature.shape[2] == pytest.approx(images.shape[2] / stage.reduction, rel=0.1, abs=1)
        assert torch.equal(backbone.forward_head(state.values[0]), plain)


def test_finding_places_keeps_no_trace_of_it():
    """A transformer keeps position biases that it looked up: those of a trial are no numbers."""
    backbone = timm.create_model("levit_128s", num_classes=10).eval()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    cut_into_stages(backbone, ["stages.1.blocks.0"])
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    assert torch.isfinite(backbone(torch.randn(1, 3, 224, 224))).all()


class _Odd(_Net):
    """Runs a module twice, one beside another, and returns what is no map."""

    def __init__(self) -> None:
        super().__init__(None)
        self.looped, self.beside, self.vector = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten()
        self.before, self.overwriting = nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)
        self.constant = nn.Linear(4, 4)
        self.weights = nn.Parameter(torch.zeros(4))

    def forward_features(self, image):
        x = self.first(image)
        for _ in range(2):
            x = self.looped(x)
        x = x + self.beside(x)
        x = self.overwriting(self.before(x))
        x = self.vector(x).reshape(-1, 4, 8, 8) + self.constant(self.weights)[:, None, None]
        return self.second(x)


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ("looped", "which _Odd runs 2 times on the way to its final feature; expected once"),
        ("beside", "which stands in a branch"),
        ("vector", r"which returns \[\(2, 256\)\] for 2 images of \(3, 8, 8\), and no map"),
        ("before", "whose output is overwritten in place"),
        ("constant", "which does not depend on the images"),
        ("between", "which does not exist"),
    ],
)
def test_modules_after_which_there_is_no_exit(point, reason):
    with pytest.raises(ValueError, match=f"`exit_points` holds '{point}', {reason}.* _Odd can exit after"):
        cut_into_stages(_Odd(), [point])


def test_an_image_that_the_network_does_not_take_is_named():
    with pytest.raises(ValueError, match=r"LevitDistilled does not run on an image of \(3, 64, 64\).*image_size"):
        cut_into_stages(timm.create_model("levit_128s"), ["stages.1.blocks.0"], (3, 64, 64))
